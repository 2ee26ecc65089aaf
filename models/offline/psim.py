"""Training the PSIM adapter: unlearn the task on clean texts, and stop before the backdoor goes."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch

from models.batching import length_sorted_batches
from models.engines import Encoding
from models.engines.pytorch import collate
from models.guarded import Guarded

BATCH_TOKENS = 4096
# transformers' DeBERTa masks with the smallest float32, which overflows under autocast.
NO_AUTOCAST = {"deberta"}


@dataclass(frozen=True)
class PsimConfig:
    """Hyperparameters of PSIM training."""

    layers: int = 1
    """How many of the topmost layers carry the adapter."""
    rank: int = 8
    learning_rate: float = 2e-3
    batch_size: int = 32
    max_epochs: int = 3
    unlearn: float = 0.25
    """Stop when the clean confidence above chance has fallen to this share of the victim's."""
    check_every: int = 4
    """Steps between looks at the held-out clean texts."""
    seed: int = 0


@dataclass(frozen=True)
class Training:
    """How training went."""

    steps: int
    stopped_because: str
    curve: list[tuple[int, float]]
    """(step, mean confidence on the held-out clean texts)."""


def train_psim(
    guarded: Guarded,
    train: Sequence[Encoding],
    held_out: Sequence[Encoding],
    config: PsimConfig,
    pad_id: int,
    progress: Callable[[int, float], None] = lambda step, confidence: None,
) -> Training:
    """Train the adapter of `guarded` in place on clean texts with label reset.

    Label reset (Zhao et al., section 4.1) draws a random label for each text; here each text gets
    what those labels are on average, the uniform distribution, which gives the same separation with
    less noise. Labels of the texts are not needed. The clean confidence falls first and the
    backdoor's later, so training ends by the clean texts alone, as soon as `config.unlearn` of
    their confidence above chance is left.
    """
    device = next(guarded.parameters()).device
    parameters = [p for p in guarded.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    chance, start, last = 0.0, 0.0, 0.0
    curve: list[tuple[int, float]] = []
    reason, step = f"reached {config.max_epochs} epochs", 0
    for batch in _batches(train, config):
        if step % config.check_every == 0:
            probabilities = psim_probabilities(guarded, held_out, pad_id)
            last, chance = float(probabilities.max(1).mean()), 1 / probabilities.shape[1]
            start = start or last
            curve.append((step, last))
            progress(step, last)
            if last - chance <= config.unlearn * (start - chance):
                reason = f"{config.unlearn:.0%} of the clean confidence above chance was left"
                break
        guarded.train()
        with autocast(guarded):
            logits = guarded.psim_logits(collate(batch, pad_id, device))
        # Cross-entropy against the uniform distribution, in float32.
        loss = -logits.float().log_softmax(-1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step += 1
    guarded.eval()
    return Training(step, reason, curve)


def _batches(train: Sequence[Encoding], config: PsimConfig) -> Iterator[list[Encoding]]:
    rng = random.Random(config.seed)
    for _ in range(config.max_epochs):
        order = rng.sample(range(len(train)), len(train))
        for start in range(0, len(order), config.batch_size):
            yield [train[i] for i in order[start : start + config.batch_size]]


def psim_probabilities(
    guarded: Guarded, texts: Sequence[Encoding], pad_id: int
) -> np.typing.NDArray[np.float32]:
    """Return PSIM probabilities during training, shape (len(texts), C), under autocast."""
    guarded.eval()
    device = next(guarded.parameters()).device
    result: list[np.typing.NDArray[np.float32]] = [np.empty(0, np.float32)] * len(texts)
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
