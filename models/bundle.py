"""Bundles: a folder with victim, PSIM adapter, tokenizer, calibration and a manifest of it all.

A bundle is untrusted input. Nothing is opened before its hash has been compared with the manifest,
and nothing is ever unpickled.
"""
