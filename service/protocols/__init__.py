"""Wire formats, for clients and for upstreams: one module each."""
