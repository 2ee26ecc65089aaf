"""Backdoors planted on purpose: poisoned texts and poisoned training."""
