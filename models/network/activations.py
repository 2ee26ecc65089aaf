"""The activation detector: distances of hidden states to those of clean texts."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from models.network.outputs import class_probabilities


class Run(NamedTuple):
    """What `Guarded.run` gives: the part of a screening pass that is in the victim's dtype."""

    logits: torch.Tensor
    """By checkpoint, shape (rows, K, L)."""
    own: torch.Tensor | None
    """The victim's own logits, shape (rows, L); None if they take a pass of their own."""
    peak: torch.Tensor | None
    """See `attention_peak`, float32, shape (rows,); None without a `LastLayer`."""
    states: Sequence[torch.Tensor]
    """Hidden states from `Trunk.watching`."""


class Activations:
    """Class-conditional Mahalanobis distance of hidden states (Lee et al., NeurIPS 2018, eq. 2).

    Stays in float32 whatever the victim's dtype is.

    Args:
        whitening: by watched layer, shape (N, D, D); h @ whitening has unit covariance.
        means: whitened means of clean texts by predicted class, shape (N, C, D).
    """

    def __init__(self, whitening: torch.Tensor, means: torch.Tensor) -> None:
        self.whitening, self.means = whitening, means

    def distances(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the distances to each class, by watched layer, shape (rows, N, C).

        Args:
            states: hidden states from `Trunk.watching`, N of shape (rows, D).
        """
        device = states[0].device
        self.whitening, self.means = self.whitening.to(device), self.means.to(device)
        whitened = torch.stack(list(states)) @ self.whitening
        # Not as |h|² - 2hm + |m|², which cancels where a text is near the mean.
        by_layer = torch.cdist(whitened, self.means, compute_mode="donot_use_mm_for_euclid_dist")
        return by_layer.transpose(0, 1)


def to_readings(run: Run, activations: Activations | None, *, multi_label: bool) -> torch.Tensor:
    """Return the readings of `Guarded.screen`, shape (rows, V, C), float32.

    Args:
        run: what the victim's part gave.
        activations: the activation detector; None if it is not fitted, and then there are no
            distances.
        multi_label: whether each of the L labels may be on; then there are C = 2 L classes.
    """
    readings = [class_probabilities(run.logits, multi_label=multi_label)]
    if activations is not None:
        readings.append(activations.distances(run.states))
    if run.peak is not None:  # the same for all classes
        readings.append(run.peak[:, None, None].expand(-1, 1, readings[0].shape[2]))
    return torch.cat(readings, 1)
