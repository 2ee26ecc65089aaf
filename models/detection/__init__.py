"""The rule that calls a text poisoned, and its calibration."""
