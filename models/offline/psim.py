"""Training the PSIM adapter: unlearn the task on clean texts, and stop before the backdoor goes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm
from transformers.trainer_pt_utils import get_length_grouped_indices

from models.batching import length_sorted_batches
from models.engines import Encoding
from models.engines.pytorch import collate
from models.guarded import Guarded

BATCH_TOKENS = 4096
RETENTION = 0.5
"""Share of the clean confidence above chance; with more left, the task is not unlearnt."""
# transformers' DeBERTa masks with the smallest float32, which overflows under autocast.
NO_AUTOCAST = {"deberta"}


@dataclass(frozen=True)
class PsimConfig:
    """Hyperparameters of PSIM training."""

    layers: int = 1
    """How many of the topmost layers carry the adapter."""
    rank: int = 8
    learning_rate: float = 1e-4
    """Low on purpose: at 5e-4 and above the backdoor goes with the task (docs/method.md)."""
    batch_size: int = 32
    max_steps: int = 600
    check_every: int = 10
    """Steps between looks at the held-out clean texts."""
    patience: int = 3
    """Looks over which the plateau must last."""
    plateau: float = 0.02
    """Training has levelled off when retention falls by less than this within the patience."""
    seed: int = 0


@dataclass(frozen=True)
class Training:
    """How training went."""

    steps: int
    stopped_because: str
    curve: list[tuple[int, float]]
    """(step, mean confidence on the held-out clean texts)."""


def has_levelled_off(retention: Sequence[float], config: PsimConfig) -> bool:
    """Return whether PSIM has unlearnt the task and unlearns no more.

    Args:
        retention: at each look so far, the share of the victim's clean confidence above chance that
            is left; starts at 1, where training has hardly begun to act: that is no plateau.
        config: says how long the plateau must last, and how flat it must be.
    """
    recent = retention[-config.patience - 1 :]
    return (
        len(recent) > config.patience
        and recent[-1] < RETENTION
        and max(recent) - recent[-1] < config.plateau
    )


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

    The clean confidence falls, dips into a plateau, and stays there; while it falls, poisoned texts
    fall as well, and for some steps the two are not apart. So training ends on the plateau, which
    the held-out clean texts show (`has_levelled_off`).

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
    retention: list[float] = []
    bar = tqdm(desc="training PSIM", unit=" steps", disable=None)
    for step, batch in enumerate(_batches(train, config)):
        if step % config.check_every == 0:
            probabilities = psim_probabilities(guarded, held_out, pad_id)
            mean, chance = float(probabilities.max(1).mean()), 1 / probabilities.shape[1]
            curve.append((step, mean))
            retention.append((mean - chance) / max(curve[0][1] - chance, 1e-6))
            bar.set_postfix(clean_confidence=f"{mean:.3f}")
            at_look(step, mean)
            if step >= config.max_steps or has_levelled_off(retention, config):
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
    reason = "levelled off" if has_levelled_off(retention, config) else "reached the step limit"
    left = f"{retention[-1]:.0%} of the clean confidence above chance is left"
    return Training(step, f"{reason}: {left}", curve)


def _batches(train: Sequence[Encoding], config: PsimConfig) -> Iterator[list[Encoding]]:
    """Yield batches of similar length in random order, for ever."""
    generator = torch.Generator().manual_seed(config.seed)
    lengths = [len(text) for text in train]
    while True:
        order = get_length_grouped_indices(lengths, config.batch_size, generator=generator)  # type: ignore[no-untyped-call]
        for start in range(0, len(order), config.batch_size):
            yield [train[i] for i in order[start : start + config.batch_size]]


def psim_probabilities(
    guarded: Guarded, texts: Sequence[Encoding], pad_id: int
) -> np.typing.NDArray[np.float32]:
    """Return PSIM probabilities during training, shape (len(texts), C), under autocast."""
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
