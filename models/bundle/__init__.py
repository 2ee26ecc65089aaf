"""The folder that is served: its layout, checks, loading, saving and signing."""
