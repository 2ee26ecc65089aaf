"""Metrics, traces, logs and drift."""
