"""Batches of texts of similar length under a token budget, since padding wastes work."""

from collections.abc import Iterator, Sequence

BATCH_TOKENS = 4096
"""Token budget of a batch in the offline half."""


def length_sorted_batches(
    lengths: Sequence[int], max_tokens: int, max_rows: int = 64
) -> Iterator[list[int]]:
    """Yield lists of indices into `lengths`, longest first, each index exactly once.

    A batch's padded size, rows times its longest length in tokens, stays within `max_tokens`
    (a single text longer than that is a batch of its own), its rows within `max_rows`.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batch[0]] if batch else lengths[index]
        if batch and (len(batch) == max_rows or (len(batch) + 1) * longest > max_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
