"""The neural network: a classifier and its PSIM adapters in one module."""
