"""Wire formats, served to clients and spoken to upstreams: one module each."""
