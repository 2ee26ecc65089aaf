"""HTTP, without a word about screening."""
