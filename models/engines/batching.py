"""Batches of texts of similar length under a token budget, since padding wastes work."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import TypeVar

BATCH_TOKENS = 4096
"""Token budget of a batch where all texts are at hand."""
Text = TypeVar("Text", bound=Sized)
Row = TypeVar("Row")


def in_batches(
    forward: Callable[[list[Text]], Iterable[Row]],
    texts: Sequence[Text],
    done: Callable[[int], object] = lambda number: None,
) -> list[Row]:
    """Return what `forward` gives for each text, in their order, in batches of similar length.

    Args:
        forward: takes a batch.
        texts: encodings, or the states that are left of them.
        done: called after each batch, with the number of texts in it.
    """
    rows: dict[int, Row] = {}
    for batch in length_sorted_batches([len(text) for text in texts], BATCH_TOKENS):
        rows |= zip(batch, forward([texts[i] for i in batch]), strict=True)
        done(len(batch))
    return [rows[i] for i in range(len(texts))]


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
