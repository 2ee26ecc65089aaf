"""Training the PSIM adapter: unlearn the task on clean texts, and stop before the backdoor goes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logit
from tqdm import tqdm
from transformers.trainer_pt_utils import get_length_grouped_indices

from models.batching import length_sorted_batches
from models.engines import Encoding
from models.engines.pytorch import collate
from models.guarded import Guarded
from models.screen import FloatArray

BATCH_TOKENS = 4096
MIN_CLASS = 15
"""Held-out texts of a class below which its tail says nothing."""
UNLEARNT = "most classes are unlearnt"
# transformers' DeBERTa masks with the smallest float32, which overflows under autocast.
NO_AUTOCAST = {"deberta"}


@dataclass(frozen=True)
class PsimConfig:
    """Hyperparameters of PSIM training."""

    layers: int = 1
    """How many of the topmost layers carry the adapter."""
    rank: int = 8
    learning_rate: float = 1e-4
    """Low on purpose: it widens the window in which the task has gone and the backdoor has not."""
    batch_size: int = 32
    max_steps: int = 600
    check_every: int = 10
    """Steps between looks at the held-out clean texts."""
    tail: float = 0.98
    """Quantile of the clean confidence that training watches, class by class."""
    tail_below: float = 0.95
    """A class is unlearnt when its tail is below this..."""
    tail_fall: float = 1.5
    """...and has fallen by this much in log-odds, lest an unsure victim count as unlearnt."""
    seed: int = 0


@dataclass(frozen=True)
class Training:
    """How training went."""

    steps: int
    stopped_because: str
    curve: list[tuple[int, float]]
    """(step, mean confidence on the held-out clean texts)."""


def has_unlearnt(now: FloatArray, start: FloatArray, config: PsimConfig) -> bool:
    """Return whether PSIM has unlearnt more than half of the classes.

    Not all: a class may resist, and waiting for it would cost the backdoors of the others.

    Args:
        now: the tail of the clean confidence by class, shape (classes,).
        start: the same before training.
        config: says what counts as unlearnt.
    """
    unlearnt = (now <= config.tail_below) & (logit(start) - logit(now) >= config.tail_fall)
    return bool(2 * unlearnt.sum() > len(unlearnt))


def class_tails(
    probabilities: FloatArray, predicted: NDArray[np.intp], config: PsimConfig
) -> FloatArray:
    """Return `config.tail` of the confidence by class, shape (classes,); tiny classes are left out.

    Args:
        probabilities: PSIM's, shape (n, C).
        predicted: classes that the victim predicts, shape (n,): groups that training cannot shift.
        config: says which quantile.
    """
    confidence = np.clip(probabilities.max(1), 1e-6, 1 - 1e-6)
    classes, counts = np.unique(predicted, return_counts=True)
    counted = classes[counts >= min(MIN_CLASS, counts.max())]
    return np.array([np.quantile(confidence[predicted == c], config.tail) for c in counted])


def train_psim(
    guarded: Guarded,
    train: Sequence[Encoding],
    held_out: Sequence[Encoding],
    config: PsimConfig,
    pad_id: int,
    at_look: Callable[[int, float], None] = lambda step, confidence: None,
) -> Training:
    """Train the adapter of `guarded` in place on clean texts with label reset.

    Label reset (Zhao et al., section 4.1) draws a random label for each text; here each text gets
    what those labels are on average, the uniform distribution, which gives the same separation with
    less noise. Labels of the texts are not needed.

    The confidence of clean texts falls first, and that of poisoned ones after it. So training ends
    as soon as the held-out clean texts have left the region of extreme confidence, by the tail of
    each class and not by the mean (`has_unlearnt`).

    Args:
        guarded: module whose adapter is trained; left in evaluation mode.
        train: texts to train on.
        held_out: texts to stop by.
        config: hyperparameters.
        pad_id: padding token.
        at_look: called with step and mean clean confidence whenever training pauses to look.
    """
    guarded.eval()  # without dropout: it slows training by half and changes nothing else
    device = next(guarded.parameters()).device
    parameters = [p for p in guarded.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    curve: list[tuple[int, float]] = []
    predicted, start = np.empty(0, np.intp), np.empty(0, np.float32)
    reason = "reached the step limit: the task is not unlearnt"
    bar = tqdm(desc="training PSIM", unit=" steps", disable=None)
    for step, batch in enumerate(_batches(train, config)):
        if step % config.check_every == 0:
            probabilities = psim_probabilities(guarded, held_out, pad_id)
            if step == 0:  # the adapter does nothing yet: this is the victim
                predicted = probabilities.argmax(1)
            tails = class_tails(probabilities, predicted, config)
            start = tails if step == 0 else start
            curve.append((step, float(probabilities.max(1).mean())))
            bar.set_postfix(clean_confidence=f"{curve[-1][1]:.3f}")
            at_look(*curve[-1])
            if has_unlearnt(tails, start, config):
                reason = UNLEARNT
                break
            if step >= config.max_steps:
                break
        with autocast(guarded):
            logits = guarded.psim_logits(collate(batch, pad_id, device))
        # Cross-entropy against the uniform distribution, in float32.
        loss = -logits.float().log_softmax(-1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        bar.update()
    bar.close()
    return Training(step, reason, curve)


def _batches(train: Sequence[Encoding], config: PsimConfig) -> Iterator[list[Encoding]]:
    """Yield batches of similar length in random order, for ever."""
    generator = torch.Generator().manual_seed(config.seed)
    lengths = [len(text) for text in train]
    while True:
        order = get_length_grouped_indices(lengths, config.batch_size, generator=generator)  # type: ignore[no-untyped-call]
        for start in range(0, len(order), config.batch_size):
            yield [train[i] for i in order[start : start + config.batch_size]]


def psim_probabilities(guarded: Guarded, texts: Sequence[Encoding], pad_id: int) -> FloatArray:
    """Return PSIM probabilities during training, shape (len(texts), C), under autocast."""
    device = next(guarded.parameters()).device
    result: list[FloatArray] = [np.empty(0, np.float32)] * len(texts)
    with torch.inference_mode(), autocast(guarded):
        for batch in length_sorted_batches([len(t) for t in texts], BATCH_TOKENS):
            inputs = collate([texts[i] for i in batch], pad_id, device)
            for row, index in zip(guarded.screen(inputs).cpu().numpy(), batch, strict=True):
                result[index] = row
    return np.stack(result)


def autocast(guarded: Guarded) -> AbstractContextManager[None]:
    """Return a bfloat16 autocast where hardware and model can, else one that does nothing."""
    device = next(guarded.parameters()).device
    model_type = str(getattr(guarded.psim.get_base_model().config, "model_type", ""))
    able = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(
        device.type, torch.bfloat16, enabled=able and model_type not in NO_AUTOCAST
    )
