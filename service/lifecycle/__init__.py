"""The models that are served, and how they are replaced."""
