"""How many tokens of a text a bundle is to read: what the victim was made for, if memory suffices.

Attention may take memory with the square of a text's length, by how much depends on the victim. So
nothing is guessed: texts of doubling lengths are run, and the process is watched.
"""

import threading
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice

import psutil
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from models.bundle.manifest import LEAST_LENGTH
from models.bundle.verify import free_memory
from models.engines.base import Encoding
from models.engines.pytorch import (
    CHARS_PER_TOKEN,
    LONGEST_INPUT,
    SHORT_INPUT,
    best_device,
    collate,
)
from models.errors import VictimError
from models.network.guarded import Guarded
from models.offline.io.classifiers import max_length_of
from models.offline.io.progress import note

SHARE = 4
"""One text may take a fourth of the free memory: a training step has up to two of the longest."""
WATCH_S = 0.002
"""Seconds between looks at the memory of the process."""


def check_length(given: int, victim: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a victim can read so many tokens.

    Raises:
        VictimError: it cannot, or they are too few for a text.
    """
    most = max_length_of(victim, tokenizer)
    if not LEAST_LENGTH <= given <= most:
        raise VictimError(
            f"--max-length {given}: this victim reads {LEAST_LENGTH} to {most} tokens of a text, "
            "special tokens included"
        )


def choose_length(
    guarded: Guarded, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], made_for: int
) -> int:
    """Return how many tokens to read of a text; print why, unless the victim reads few anyway.

    Args:
        guarded: the module, on its device; trained on texts of growing lengths, without a step.
        tokenizer: the victim's.
        texts: any, to make those texts of.
        made_for: tokens that the victim can read.
    """
    if made_for <= SHORT_INPUT:
        return made_for
    most, seconds = min(made_for, LONGEST_INPUT), 0.0
    long = " ".join(islice(cycle(texts), most))[: CHARS_PER_TOKEN * most]
    start, free = peak_memory(lambda: None), free_device_memory()

    def need(length: int) -> int:
        nonlocal seconds
        ids = tokenizer(long, truncation=True, max_length=length)["input_ids"]
        started = time.perf_counter()
        used = peak_memory(lambda: _train_on(guarded, tokenizer, ids)) - start
        seconds = time.perf_counter() - started
        return used

    length, too_much = longest_that_fits(need, most, free)
    why = "as many as the victim can" if most == made_for else f"the victim can read {made_for}"
    if too_much is not None:
        why = (
            f"the next length may need {too_much / 1e9:.1f} GB for each, over a fourth of the "
            f"{free / 1e9:.1f} GB that are free; the victim can read {made_for}"
        )
    note(
        f"texts are read up to {length} tokens, {why}; a pass of the longest one tried took "
        f"{seconds:.1f} s here (--max-length sets another length)"
    )
    return length


def longest_that_fits(need: Callable[[int], int], most: int, free: int) -> tuple[int, int | None]:
    """Double a length from `SHORT_INPUT` to at most `most`, as far as memory suffices.

    Args:
        need: returns how many bytes a text of so many tokens takes, by trying.
        most: tokens.
        free: bytes, of which a text may take one in `SHARE`.

    Returns:
        The length, and how many bytes the next one would have taken; None if it is `most`.
    """
    length, used = SHORT_INPUT, need(SHORT_INPUT)
    while length < most:
        longer = min(2 * length, most)
        expected = int(used * (longer / length) ** 2)  # not tried, since it may end the process
        if expected > free / SHARE:
            return length, expected
        used = need(longer)
        if used > free / SHARE:
            return length, used
        length = longer
    return length, None


def peak_memory(run: Callable[[], object]) -> int:
    """Return the most memory in use while something runs, in bytes: of the device, or of Linux."""
    if best_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    process, done, seen = psutil.Process(), threading.Event(), list[int]()

    def watch() -> None:
        while not done.wait(WATCH_S):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(seen, default=0) or process.memory_info().rss


def free_device_memory() -> int:
    """Return how many bytes are free for tensors of the device that models run on."""
    if best_device().type != "cuda":
        return free_memory()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + unused


def _train_on(guarded: Guarded, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
    """Do what training does to one text, but for the step."""
    pad_id = int(tokenizer.pad_token_id or 0)
    inputs = collate([Encoding(tuple(ids), False)], pad_id, best_device())
    guarded.psim.set_adapter(guarded.checkpoints[-1])
    trained = [weights for weights in guarded.parameters() if weights.requires_grad]
    torch.autograd.grad(guarded.training_logits(inputs).sum(), trained, allow_unused=True)
