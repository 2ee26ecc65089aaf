"""API keys: created by a command, kept as hashes in a file, looked up for each request."""
