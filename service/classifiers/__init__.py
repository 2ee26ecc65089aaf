"""The classifier behind the screen: in this process, or elsewhere."""
