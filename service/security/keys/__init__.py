"""API keys: made by a command, kept as hashes in a file, found by what a caller sends."""
