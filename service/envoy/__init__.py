"""Envoy's external processing (ext_proc)."""
