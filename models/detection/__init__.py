"""The rule that calls a text poisoned, its calibration, and the trigger search."""
