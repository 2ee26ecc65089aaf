"""How many tokens of a text are read, as far as memory suffices."""

from collections.abc import Callable

import numpy as np
import pytest

from models.engines.base import Encoding
from models.offline.fitting import psim
from models.offline.io.input_length import longest_that_fits, peak_memory


def linear(length: int) -> int:
    return 1000 * length


def quadratic(length: int) -> int:
    return length * length


@pytest.mark.parametrize(
    ("need", "most", "free", "length"),
    [
        (quadratic, 8192, 4 * 8192**2, 8192),
        (quadratic, 8192, 4 * 8192**2 - 1, 4096),
        (quadratic, 1026, 4 * 1026**2, 1026),
        (quadratic, 1026, 4 * 1024**2, 1024),
        (quadratic, 8192, 0, 512),
        (linear, 8192, 10**9, 8192),
        (linear, 8192, 40 * 10**6, 4096),
    ],
)
def test_lengths_double_as_far_as_memory_suffices(
    need: Callable[[int], int], most: int, free: int, length: int
) -> None:
    tried = list[int]()

    def trying(tokens: int) -> int:
        tried.append(tokens)
        return need(tokens)

    found, too_much = longest_that_fits(trying, most, free)
    assert (found, tried[-1]) == (length, length), "no length is tried that may not fit"
    assert (too_much is None) == (length == most)
    assert too_much is None or too_much > free / 4


def test_a_length_that_took_more_than_expected_is_not_chosen() -> None:
    found, too_much = longest_that_fits(lambda length: length**3, 8192, 5 * 1024**3)
    assert (found, too_much) == (1024, 4 * 1024**3)
    found, too_much = longest_that_fits(lambda length: length**3, 8192, 3 * 1024**3)
    assert (found, too_much) == (512, 1024**3)


def test_the_peak_of_memory_is_seen_even_if_it_is_free_again_afterwards() -> None:
    def run() -> None:
        for _ in range(5):
            np.ones(2**26)  # half a GiB

    before = peak_memory(lambda: None)
    assert peak_memory(run) - before > 2**28
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 // 0)


def some(*lengths: int) -> list[Encoding]:
    return [Encoding((7,) * length, False) for length in lengths]


def test_steps_and_looks_have_no_more_tokens_for_long_texts() -> None:
    config = psim.PsimConfig()
    short = [*psim._grouped(some(*[512] * 100), config)]
    assert [len(batch) for batch in short] == [32, 32, 32, 4]
    texts = some(*[8192] * 20, *[100] * 80)
    batches = [*psim._grouped(texts, config)]
    assert sorted(i for batch in batches for i in batch) == [*range(100)]
    for batch in batches:
        assert len(batch) * max(len(texts[i]) for i in batch) <= psim.STEP_TOKENS
    assert max(map(len, batches)) > 16, "short texts still share a step"
    assert psim.looked_at(some(*[512] * 300)) == some(*[512] * 300)
    assert len(psim.looked_at(some(*[8192] * 300))) == psim.LOOK_TOKENS // 8192
    assert len(psim.looked_at(some(10**6, 5))) == 1
