"""Envoy's external processing."""
