"""Training of the PSIM adapter: unlearn the task on clean texts, keep checkpoints on the way.

The confidence of clean texts falls first, and that of poisoned ones after it, at a moment that
clean texts do not reveal. So no moment is trusted: checkpoints are kept while the confidence of
clean texts falls, and each text is judged by the most extreme of them (docs/method.md).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from models.detection.screen import FloatArray
from models.engines.base import Encoding
from models.engines.batching import BATCH_TOKENS, length_sorted_batches
from models.engines.pytorch import collate, has_bfloat16
from models.errors import VictimError
from models.network.guarded import Guarded
from models.network.outputs import class_logits, class_probabilities
from models.network.trunk import Inputs
from models.offline.io.progress import progress

CACHED_NUMBERS = 2**27
"""Limit for cached outputs of the trunk, for training texts and for held-out ones: 512 MiB in
float32 each."""
STEP_TOKENS, LOOK_TOKENS = 32 * 512, 300 * 512
"""Padded tokens of a training step, and held-out tokens of a look: as many as there may be of texts
of up to 512 tokens. Of longer texts, a step and a look have fewer."""
Loss = Callable[[torch.Tensor], torch.Tensor]
"""Of logits, shape (rows, L)."""
UNLEARNT = "the clean texts have lost most of their confidence"
NOT_UNLEARNT = "reached the step limit: the task is not unlearnt"
# transformers' DeBERTa masks with the smallest float32, which overflows under autocast, and X-MOD
# writes one dtype into the other.
NO_AUTOCAST = {"deberta", "xmod"}


@dataclass(frozen=True)
class PsimConfig:
    """Hyperparameters of PSIM training."""

    layers: int = 1
    """Number of topmost layers that carry the adapters."""
    rank: int = 8
    learning_rate: float = 1e-4
    """Low on purpose: it widens the window in which the task is gone and the backdoor is not."""
    batch_size: int = 32
    keep_at: tuple[float, ...] = (1.0, 0.9, 0.7, 0.5, 0.3, 0.15)
    """Shares of the clean texts' confidence, descending. A checkpoint is kept when the confidence
    has fallen to a share, and training ends with the last; at 1 the adapter does nothing yet. See
    `retention`."""
    max_steps: int = 600
    patience: int = 100
    """Steps without a checkpoint after which the learning rate is doubled: it is too low for deep
    and narrow victims."""
    check_every: int = 4
    """Steps between looks at the held-out clean texts."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `ValueError` if the fields make no sense."""
        if not self.keep_at or list(self.keep_at) != sorted(set(self.keep_at), reverse=True):
            raise ValueError("keep_at must hold shares in descending order, one at least")
        steps = self.max_steps, self.patience, self.check_every
        if min(self.layers, self.rank, self.batch_size, *steps) < 1 or self.learning_rate <= 0:
            raise ValueError("layers, rank, rate, batch size and steps must be positive")


@dataclass(frozen=True)
class Training:
    """Result of a training."""

    steps: int
    stopped_because: str
    checkpoints: list[int]
    """Steps whose adapters are kept; the last step for each share that was not reached."""
    curve: list[tuple[int, float]]
    """(step, mean confidence on the held-out clean texts)."""


def retention(confidence: float, start: float, classes: int) -> float:
    """Return the share that is left of the confidence above chance at the start.

    Args:
        confidence: the mean probability of the classes that are predicted.
        start: the same at the start.
        classes: number of classes of a view; chance is one in so many.
    """
    chance = 1 / classes
    return (confidence - chance) / max(start - chance, 1e-6)


def reset_loss(logits: torch.Tensor) -> torch.Tensor:
    """Return the loss of label reset for logits of shape (rows, C).

    Label reset (Zhao et al., section 4.1) draws a random label for each text. Here each text gets
    the average of those labels, the uniform distribution: the same separation with less noise.
    Labels of the texts are not needed.
    """
    return -logits.log_softmax(-1).mean()


def multi_label_reset_loss(logits: torch.Tensor) -> torch.Tensor:
    """Return the loss of label reset for a multi-label victim's logits, shape (rows, L).

    Each label is reset by itself: on with probability 1/2, whatever the others are.
    """
    return -torch.nn.functional.logsigmoid(class_logits(logits, multi_label=True)).mean()


def _reset_loss_of(guarded: Guarded) -> Loss:
    return multi_label_reset_loss if guarded.multi_label else reset_loss


def train_psim(
    guarded: Guarded,
    train: Sequence[Encoding],
    held_out: Sequence[Encoding],
    config: PsimConfig,
    pad_id: int,
    at_look: Callable[[int, float], None] = lambda step, confidence: None,
    loss: Loss | None = None,
) -> Training:
    """Train the adapters of `guarded` in place on clean texts; leaves it in evaluation mode.

    There are as many adapters as `config.keep_at` has shares. `at_look` is called with step and
    mean confidence when training pauses for held-out texts. `loss` is label reset by default.

    Raises:
        VictimError: the victim's scores are not finite.
    """
    guarded.eval()  # without dropout: it slows training by half and changes nothing else
    guarded.psim.set_adapter(trained := guarded.checkpoints[-1])
    parameters = [p for p in guarded.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    keeper = _CheckpointKeeper(guarded, held_out, config, pad_id)
    batches = _Batches(guarded, train, _grouped(train, config), pad_id)
    bar = progress("training PSIM", unit=" steps")
    for step, batch in enumerate(_shuffled(len(batches), config.seed)):
        if step % config.check_every == 0:
            confidence = keeper.look(step)
            bar.set_postfix(clean_confidence=f"{confidence:.3f}")
            at_look(step, confidence)
            guarded.psim.set_adapter(trained)  # the caller may have screened
            if keeper.keep(step):
                break
            if keeper.is_stuck(step):
                optimizer.param_groups[0]["lr"] *= 2
        optimizer.zero_grad()
        (loss or _reset_loss_of(guarded))(batches.logits(batch)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        bar.update()
    bar.close()
    return keeper.training(step)


class _CheckpointKeeper:
    """Watches the confidence of held-out texts, and keeps checkpoints while it falls."""

    def __init__(
        self, guarded: Guarded, held_out: Sequence[Encoding], config: PsimConfig, pad_id: int
    ) -> None:
        held_out = looked_at(held_out)
        batches = length_sorted_batches([len(text) for text in held_out], BATCH_TOKENS)
        self._guarded, self._config = guarded, config
        self._held_out = _Batches(guarded, held_out, batches, pad_id)
        self._retention, self._moved = 1.0, 0
        self.kept: list[int] = []
        self.curve: list[tuple[int, float]] = []

    def look(self, step: int) -> float:
        """Return the mean confidence of the held-out texts, and add it to the curve."""
        probabilities = self._held_out.probabilities()
        if step == 0 and not np.isfinite(probabilities).all():
            raise VictimError("the victim gives NaN or infinite scores on the clean texts")
        views = self._guarded.views
        by_view = [probabilities[:, view.start : view.stop].max(1) for view in views]
        confidence = float(np.concatenate(by_view).mean())
        self.curve.append((step, confidence))
        self._retention = retention(confidence, self.curve[0][1], len(views[0]))
        return confidence

    def keep(self, step: int) -> bool:
        """Keep a checkpoint for each share reached; return whether all of them are kept."""
        *_, trained = names = self._guarded.checkpoints
        for share in self._config.keep_at[len(self.kept) :]:
            if self._retention <= share or step >= self._config.max_steps:
                _copy(self._guarded, trained, names[len(self.kept)])
                self.kept.append(step)
                self._moved = step
        return len(self.kept) == len(self._config.keep_at)

    def is_stuck(self, step: int) -> bool:
        """Return whether `patience` steps have brought nothing; each time, a new count begins."""
        if step - self._moved < self._config.patience:
            return False
        self._moved = step
        return True

    def training(self, steps: int) -> Training:
        """Return the result of a training of so many steps."""
        unlearnt = self._retention <= self._config.keep_at[-1]
        return Training(steps, UNLEARNT if unlearnt else NOT_UNLEARNT, self.kept, self.curve)


def looked_at(held_out: Sequence[Encoding]) -> Sequence[Encoding]:
    """Return the first texts that have up to `LOOK_TOKENS` tokens together, one at least."""
    fit = np.cumsum([len(text) for text in held_out]) <= LOOK_TOKENS
    return held_out[: max(1, int(fit.sum()))]


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
        batch = order[start : start + config.batch_size]
        own = [lengths[i] for i in batch]
        if len(own) * max(own) <= STEP_TOKENS:
            yield batch
        else:
            yield from (
                [batch[i] for i in part] for part in length_sorted_batches(own, STEP_TOKENS)
            )


def _shuffled(n: int, seed: int) -> Iterator[int]:
    """Yield 0..n-1 in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator).tolist()


class _Batches:
    """Texts in fixed batches, with cached outputs of the trunk as far as there is room.

    The trunk is most of the work, and its outputs never change.
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
        room = CACHED_NUMBERS // guarded.hidden_size if guarded.trunk.length else 0
        for batch in batches:
            inputs = collate([texts[i] for i in batch], pad_id, device)
            room -= inputs["input_ids"].numel()
            self._batches.append((inputs, [] if room >= 0 else None))

    def __len__(self) -> int:
        return len(self._batches)

    def logits(self, number: int) -> torch.Tensor:
        """Return logits of the adapter in training for one batch, shape (rows, L)."""
        inputs, cached = self._batches[number]
        with autocast(self._guarded), self._guarded.trunk.shared(cached):
            return self._guarded.training_logits(inputs).float()

    def probabilities(self) -> FloatArray:
        """Return probabilities of the adapter in training, shape (n, C), batch by batch."""
        with torch.inference_mode():
            rows = [
                class_probabilities(self.logits(number), multi_label=self._guarded.multi_label)
                for number in range(len(self))
            ]
            result: FloatArray = torch.cat(rows).cpu().numpy()
        return result


def autocast(guarded: Guarded) -> AbstractContextManager[None]:
    """Return a bfloat16 autocast, which does nothing if hardware or model do not support it."""
    device = next(guarded.parameters()).device
    model_type = str(getattr(guarded.config, "model_type", ""))
    return torch.autocast(
        device.type, torch.bfloat16, enabled=has_bfloat16(device) and model_type not in NO_AUTOCAST
    )
