"""Classifier and PSIM adapters in one module."""
