"""What the logits of a classifier mean: one label of several, or several labels, each off or on."""

from typing import Any

import torch


def is_multi_label(config: Any) -> bool:
    """Return whether a classifier gives any number of labels, by its transformers configuration."""
    return bool(config.problem_type == "multi_label_classification")


def class_logits(logits: torch.Tensor, *, multi_label: bool) -> torch.Tensor:
    """Return a logit for each class, shape (..., C), given those of the labels, (..., L).

    The classes of a multi-label classifier are off and on of each label, see
    `models.detection.views`.
    """
    return torch.stack([-logits, logits], -1).flatten(-2) if multi_label else logits


def class_probabilities(logits: torch.Tensor, *, multi_label: bool) -> torch.Tensor:
    """Return the probability of each class in its view, shape (..., C), float32."""
    classes = class_logits(logits.float(), multi_label=multi_label)
    # Both sigmoids, and not 1 - p: float32 can tell one that is close to 0, and not close to 1.
    return classes.sigmoid() if multi_label else classes.softmax(-1)


def label_probabilities(logits: torch.Tensor, *, multi_label: bool) -> torch.Tensor:
    """Return what the classifier says of each label, shape (..., L), float32."""
    return logits.float().sigmoid() if multi_label else logits.float().softmax(-1)
