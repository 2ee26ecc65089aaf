"""Overlapping windows over the tokens of a text."""


def windows(count: int, size: int, overlap: int) -> list[slice]:
    """Return windows of up to `size` of `count` tokens; the last one ends at their end.

    Each run of `overlap` tokens lies whole in a window.
    """
    overlap = min(overlap, size - 1)
    starts = range(0, max(1, count - overlap), size - overlap)
    return [slice(start, start + size) for start in (min(s, max(0, count - size)) for s in starts)]
