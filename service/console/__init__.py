"""Pages for whoever is on call, on a port of their own: what was flagged, and was it poisoned?"""
