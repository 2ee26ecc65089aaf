"""The way of one request: screen, decide, classify, record."""
