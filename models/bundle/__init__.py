"""The folder that is served: layout, checks, loading, saving."""
