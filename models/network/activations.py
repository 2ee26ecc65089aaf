"""The activation detector: distances of hidden states to those of clean texts."""

from collections.abc import Sequence

import torch

from models.network.outputs import class_probabilities


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


def to_readings(
    logits: torch.Tensor,
    states: Sequence[torch.Tensor],
    activations: Activations | None,
    *,
    multi_label: bool,
) -> torch.Tensor:
    """Return the features of `Guarded.screen`, shape (rows, V, C), float32.

    Args:
        logits: of the K checkpoints, shape (rows, K, L).
        states: hidden states from `Trunk.watching`.
        activations: the activation detector; None if it is not fitted, and then V is K.
        multi_label: whether each of the L labels may be on; then there are C = 2 L classes.
    """
    readings = class_probabilities(logits, multi_label=multi_label)
    if activations is None:
        return readings
    return torch.cat([readings, activations.distances(states)], 1)
