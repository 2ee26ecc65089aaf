"""The path of a request: screen, decide, classify, record."""
