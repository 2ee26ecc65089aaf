"""The command `psim`, the one place that knows both the service and the offline half."""
