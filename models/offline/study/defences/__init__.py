"""Defences from the literature that PSIM is compared with, and the language model of ONION."""
