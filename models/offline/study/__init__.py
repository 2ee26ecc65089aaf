"""Attacks, defences and tuning strategies side by side, by recipe."""
