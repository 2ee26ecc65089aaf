"""Engines, which compute the guarded forward pass, and batches of texts for them."""
