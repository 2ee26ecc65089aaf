"""One label of a multi-label classifier, as a classifier with two classes: it is off, or on."""

import torch

from models.network.guarded import Guarded
from models.network.trunk import Inputs


class OneLabel(Guarded):
    """Shares all modules with the whole classifier.

    Args:
        whole: the classifier.
        label: number of the label.
    """

    def __init__(self, whole: Guarded, label: int) -> None:
        super().__init__(whole.victim, whole.psim, whole.trunk, whole.last_layer)
        self._label = label

    def classify(self, inputs: Inputs) -> torch.Tensor:
        """Return the probabilities that the label is off and on in float32, shape (rows, 2)."""
        on = super().classify(inputs)[:, self._label, None]
        return torch.cat([1 - on, on], 1)
