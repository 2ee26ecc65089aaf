"""Metrics, traces, logs, drift."""
