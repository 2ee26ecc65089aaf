"""Screening files, streams and folders with a bundle."""
