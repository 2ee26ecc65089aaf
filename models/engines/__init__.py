"""Engines: what computes the guarded forward pass, and how texts become its batches."""
