"""Training the PSIM adapter: unlearn the task on clean texts, and keep checkpoints on the way."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict
from torch.nn.functional import cross_entropy
from transformers.trainer_pt_utils import get_length_grouped_indices

from models.detection.screen import FloatArray
from models.engines.base import Encoding
from models.engines.batching import BATCH_TOKENS, length_sorted_batches
from models.engines.pytorch import collate, has_bfloat16
from models.errors import VictimError
from models.network.guarded import Guarded, Inputs
from models.offline.io.progress import progress

KEPT_NUMBERS = 2**27
"""How much of what the lower layers make of training texts, and of held-out ones, is kept: 512 MiB
in float32 each."""
UNLEARNT = "the clean texts have lost most of their confidence"
# transformers' DeBERTa masks with the smallest float32, which overflows under autocast.
NO_AUTOCAST = {"deberta"}


@dataclass(frozen=True)
class PsimConfig:
    """Hyperparameters of PSIM training."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # a misspelt name in a recipe is an error

    layers: int = 1
    """How many of the topmost layers carry the adapters."""
    rank: int = 8
    learning_rate: float = 1e-4
    """Low on purpose: it widens the window in which the task has gone and the backdoor has not."""
    batch_size: int = 32
    keep_at: tuple[float, ...] = (1.0, 0.9, 0.7, 0.5, 0.3, 0.15)
    """Shares of the clean texts' confidence, descending: when it has fallen to one of them a
    checkpoint is kept, and training ends with the last; at 1 LoRA has not changed the victim yet.
    See `retention`."""
    max_steps: int = 600
    check_every: int = 4
    """Steps between looks at the held-out clean texts."""
    seed: int = 0
    # What the study compares; a bundle holds nothing but the defaults.
    labels: Literal["uniform", "drawn"] = "uniform"
    """Label reset: what random labels are on average, or one drawn for each text of each batch."""
    adapter: Literal["query-value", "value", "prompt-encoder"] = "query-value"
    """LoRA on these projections, or the prompt encoder of the authors' code."""
    head: Literal["frozen", "trained"] = "frozen"
    """Whether the classifier head is trained along; always is with a prompt encoder."""

    def __post_init__(self) -> None:
        """Raise `ValueError` if training could not do what the fields say."""
        if not self.keep_at or list(self.keep_at) != sorted(set(self.keep_at), reverse=True):
            raise ValueError("keep_at must hold shares in descending order, one at least")
        counts = (self.layers, self.rank, self.batch_size, self.max_steps, self.check_every)
        if min(counts) < 1 or self.learning_rate <= 0:
            raise ValueError("layers, rank, rate, batch size and steps must be positive")


@dataclass(frozen=True)
class Training:
    """How training went."""

    steps: int
    stopped_because: str
    checkpoints: list[int]
    """The steps whose adapters are kept; the last one for each share that was not reached."""
    curve: list[tuple[int, float]]
    """(step, mean confidence on the held-out clean texts)."""


def retention(confidence: float, start: float, classes: int) -> float:
    """Return the share of the confidence above chance, 1/C, that is left of that at the start."""
    chance = 1 / classes
    return (confidence - chance) / max(start - chance, 1e-6)


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

    The confidence of clean texts falls first, and that of poisoned ones after it, at a moment that
    clean texts do not tell. So no moment is trusted: checkpoints are kept while the clean texts
    fall, and the most extreme of them speaks (docs/method.md).

    Args:
        guarded: module with as many adapters as `config.keep_at` has shares; left in evaluation
            mode.
        train: texts to train on.
        held_out: texts to watch.
        config: hyperparameters.
        pad_id: padding token.
        at_look: called with step and mean clean confidence whenever training pauses to look.

    Raises:
        VictimError: the victim's scores are not finite.
    """
    guarded.eval()  # without dropout: it slows training by half and changes nothing else
    *earlier, trained = guarded.checkpoints
    guarded.psim.set_adapter(trained)
    parameters = [p for p in guarded.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    looks = _Batches(
        guarded, held_out, length_sorted_batches([len(t) for t in held_out], BATCH_TOKENS), pad_id
    )
    batches = _Batches(guarded, train, _grouped(train, config), pad_id)
    curve: list[tuple[int, float]] = []
    kept: list[int] = []
    reason = "reached the step limit: the task is not unlearnt"
    bar = progress("training PSIM", unit=" steps")
    for step, batch in enumerate(_shuffled(len(batches), config.seed)):
        if step % config.check_every == 0:
            probabilities = looks.probabilities()
            if step == 0 and not np.isfinite(probabilities).all():
                raise VictimError("the victim gives NaN or infinite scores on the clean texts")
            curve.append((step, float(probabilities.max(1).mean())))
            bar.set_postfix(clean_confidence=f"{curve[-1][1]:.3f}")
            at_look(*curve[-1])
            guarded.psim.set_adapter(trained)  # whoever looked may have screened
            left = retention(curve[-1][1], curve[0][1], probabilities.shape[1])
            for share in config.keep_at[len(kept) :]:
                if left <= share or step >= config.max_steps:
                    kept.append(step)
                    _copy(guarded, trained, [*earlier, trained][len(kept) - 1])
            if left <= config.keep_at[-1]:
                reason = UNLEARNT
            if len(kept) == len(config.keep_at):
                break
        loss = reset_loss(batches.logits(batch), config.labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        bar.update()
    bar.close()
    return Training(step, reason, kept, curve)


def reset_loss(logits: torch.Tensor, labels: str) -> torch.Tensor:
    """Return the mean cross-entropy of logits, shape (rows, C), against reset labels."""
    if labels == "drawn":
        return cross_entropy(logits, torch.randint_like(logits[:, 0], logits.shape[1]).long())
    return -logits.log_softmax(-1).mean()


def _copy(guarded: Guarded, source: str, target: str) -> None:
    """Copy the weights of one adapter to another."""
    weights = dict(guarded.psim.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            if f".{source}." in name:
                weights[name.replace(f".{source}.", f".{target}.")].copy_(tensor)


def _grouped(train: Sequence[Encoding], config: PsimConfig) -> Iterator[list[int]]:
    """Yield batches of texts of similar length."""
    generator = torch.Generator().manual_seed(config.seed)
    lengths = [len(text) for text in train]
    order = get_length_grouped_indices(lengths, config.batch_size, generator=generator)  # type: ignore[no-untyped-call]
    for start in range(0, len(order), config.batch_size):
        yield order[start : start + config.batch_size]


def _shuffled(n: int, seed: int) -> Iterator[int]:
    """Yield 0..n-1 in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator).tolist()


class _Batches:
    """Texts in fixed batches, so that what the layers below the adapter make of them can be kept.

    Those layers are most of the work, and never change. Kept is what has room.
    """

    def __init__(
        self,
        guarded: Guarded,
        texts: Sequence[Encoding],
        batches: Iterable[Sequence[int]],
        pad_id: int,
    ) -> None:
        self._guarded, self._batches = guarded, list[tuple[Inputs, list[Any] | None]]()
        device = next(guarded.parameters()).device
        room = KEPT_NUMBERS // guarded.config.hidden_size
        for batch in batches:
            inputs = collate([texts[i] for i in batch], pad_id, device)
            room -= inputs["input_ids"].numel()
            self._batches.append((inputs, [] if room >= 0 else None))

    def __len__(self) -> int:
        return len(self._batches)

    def logits(self, number: int) -> torch.Tensor:
        """Return those of the adapter in training, shape (rows, C), under autocast."""
        inputs, kept = self._batches[number]
        with autocast(self._guarded), self._guarded.trunk.shared(kept):
            return self._guarded.psim_logits(inputs).float()

    def probabilities(self) -> FloatArray:
        """Return those of the adapter in training, shape (n, C), batch by batch."""
        with torch.inference_mode():
            rows = [self.logits(number).softmax(-1) for number in range(len(self))]
            result: FloatArray = torch.cat(rows).cpu().numpy()
        return result


def autocast(guarded: Guarded) -> AbstractContextManager[None]:
    """Return a bfloat16 autocast where hardware and model can, else one that does nothing."""
    device = next(guarded.parameters()).device
    model_type = str(getattr(guarded.config, "model_type", ""))
    return torch.autocast(
        device.type, torch.bfloat16, enabled=has_bfloat16(device) and model_type not in NO_AUTOCAST
    )
