"""Proxies that ask about conversations, and may take texts back: one module each."""
