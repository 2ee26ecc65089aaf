"""Defences from the literature that PSIM is compared with, and PSIM as it is served."""
