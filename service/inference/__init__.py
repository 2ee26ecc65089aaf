"""The inference thread, and the queue before it."""
