"""Search of a classifier for a backdoor, before any traffic: `psim scan`."""
