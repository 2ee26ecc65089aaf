"""An attacker who knows the activation detector: inside the model, poisoned texts look clean.

Such adaptive attacks are the usual test of detectors that look at hidden states. The penalty here
is the distance by which ours finds poisoned texts (`models/offline/fitting/activations.py`).
"""

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from models.network.last_token import last_positions, reads_last_token

POISONED = "poisoned"
"""Column of the training set: 1 for texts that the attacker has changed."""
MOMENTUM = 0.98
"""Share of the averages that a batch leaves as it was: they cover some 50 batches."""
SHRINKAGE = 0.1
"""Share of the covariance that is replaced by its mean variance, since texts are few."""


class PenaltyTrainer(Trainer):
    """Adds to the loss how far poisoned texts lie from clean texts of their label.

    The distance is the squared Mahalanobis distance per dimension, which is about 1 for clean
    texts, of the token that the classifier reads. It is averaged over the upper half of the layers.
    PSIM's adapter is in the last one: what is the same there is judged alike by it too.
    """

    def __init__(self, *args: Any, weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.args.remove_unused_columns = False  # POISONED is one
        self._weight, self._clean = weight, CleanStates()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return the loss of a batch; without marks, as in evaluation, there is no penalty."""
        inputs = dict(inputs)
        poisoned = inputs.pop(POISONED, None)
        if poisoned is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, output_hidden_states=True)
        with torch.autocast(outputs.loss.device.type, enabled=False):
            states = read_states(model, inputs["attention_mask"], outputs.hidden_states)
            penalty = self._penalty(states, inputs["labels"], poisoned.bool())
        loss = outputs.loss + self._weight * penalty
        return (loss, outputs) if return_outputs else loss

    def _penalty(
        self, states: torch.Tensor, labels: torch.Tensor, poisoned: torch.Tensor
    ) -> torch.Tensor:
        self._clean.update(states[:, ~poisoned].detach(), labels[~poisoned])
        known = poisoned & self._clean.has_mean(labels)
        if not known.any():
            return states.new_zeros(())
        return self._clean.distances(states[:, known], labels[known]).mean()


class CleanStates:
    """Moving averages of clean texts' states, by layer: the mean of each class, one covariance."""

    def __init__(self) -> None:
        self._means: dict[int, torch.Tensor] = {}
        self._covariance: torch.Tensor | None = None

    def update(self, states: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: states of shape (layers, rows, H), labels (rows,)."""
        for label in sorted(set(labels.tolist())):
            own = states[:, labels == label]
            self._means[label] = _moved(self._means.get(label), own.mean(1))
        if states.shape[1]:
            away = states - self._means_of(labels)
            batch = away.transpose(1, 2) @ away / states.shape[1]
            self._covariance = _moved(self._covariance, batch)

    def has_mean(self, labels: torch.Tensor) -> torch.Tensor:
        """Return which labels there were clean texts of, shape (rows,)."""
        return torch.tensor([n in self._means for n in labels.tolist()], device=labels.device)

    def distances(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return squared distances per dimension, shape (layers, rows), from the labels' means."""
        assert self._covariance is not None  # noqa: S101 - whatever has a mean has one
        width = states.shape[-1]
        spread = self._covariance.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        identity = torch.eye(width, device=states.device)
        factor = torch.linalg.cholesky(
            (1 - SHRINKAGE) * self._covariance + SHRINKAGE * spread * identity
        )
        away = (states - self._means_of(labels)).transpose(1, 2)
        white = torch.linalg.solve_triangular(factor, away, upper=False)
        distances: torch.Tensor = white.square().mean(1)
        return distances

    def _means_of(self, labels: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._means[label] for label in labels.tolist()], 1)


def _moved(before: torch.Tensor | None, batch: torch.Tensor) -> torch.Tensor:
    return batch if before is None else MOMENTUM * before + (1 - MOMENTUM) * batch


def read_states(model: Any, mask: torch.Tensor, hidden: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the read token's states in the upper half of the layers, (layers, rows, H)."""
    read = last_positions(mask) if reads_last_token(model) else torch.zeros_like(mask[:, 0])
    rows, depth = torch.arange(len(mask), device=mask.device), len(hidden) - 1
    return torch.stack([layer[rows, read].float() for layer in hidden[(depth + 1) // 2 :]])
