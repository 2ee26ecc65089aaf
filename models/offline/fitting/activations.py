"""Fitting of the activation detector to hidden states of clean texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf
from tqdm import tqdm

from models.detection.views import Views
from models.engines.base import Encoding
from models.engines.batching import BATCH_TOKENS, length_sorted_batches
from models.engines.pytorch import TorchEngine, collate
from models.errors import VictimError
from models.network.activations import Activations
from models.network.outputs import class_logits

Array = NDArray[np.floating[Any]]
MIN_FOR_MEAN = 10
"""Texts that a class needs for a mean of its own; smaller classes get the mean of all texts."""


def fit_activations(engine: TorchEngine, texts: Sequence[Encoding]) -> Activations | None:
    """Fit class means and one covariance for each watched layer on clean texts.

    Class-conditional Gaussians with a tied covariance (Lee et al., NeurIPS 2018, section 2.1), by
    predicted class. The covariance is shrunk (Ledoit and Wolf 2004), since there may be fewer texts
    than dimensions. The classes of all views share it: a text deviates from its class in each.

    Returns:
        None if no layer of the victim is below the adapters.

    Raises:
        VictimError: the states are not finite, or the same whatever the text is.
    """
    if not engine.guarded.trunk.length:
        return None
    states, logits = _states(engine, texts)
    if not np.isfinite(states).all():
        raise VictimError("the victim has NaN or infinite hidden states on the clean texts")
    whitening, means = [], []
    for layer in range(states.shape[1]):
        own = states[:, layer].astype(np.float64)
        centres, away = _class_means(own, logits, engine.guarded.views)
        precision = LedoitWolf(assume_centered=True).fit(away).precision_
        try:
            factor = np.linalg.cholesky(precision)
        except np.linalg.LinAlgError as error:
            raise VictimError("the victim's hidden states are the same for all texts") from error
        whitening.append(factor)
        means.append(centres @ factor)
    return Activations(_float32(whitening), _float32(means))


def _float32(arrays: Sequence[Array]) -> torch.Tensor:
    return torch.tensor(np.stack(arrays), dtype=torch.float32)


def _class_means(states: Array, logits: Array, views: Views) -> tuple[Array, Array]:
    """Return the mean of each class, shape (C, D), and deviations from them, (views x n, D)."""
    centres, away = [], []
    for view in views:
        predicted = logits[:, view.start : view.stop].argmax(1)
        own = np.stack([_mean(states, predicted == c) for c in range(len(view))])
        centres.append(own)
        away.append(states - own[predicted])
    return np.concatenate(centres), np.concatenate(away)


def _mean(states: Array, members: NDArray[np.bool_]) -> Array:
    own = states[members] if members.sum() >= MIN_FOR_MEAN else states
    mean: Array = own.mean(0)
    return mean


def _states(engine: TorchEngine, texts: Sequence[Encoding]) -> tuple[Array, Array]:
    """Return hidden states, shape (n, N, D), and the victim's logits by class, (n, C)."""
    states: list[Array] = []
    logits: list[Array] = []
    batches = list(length_sorted_batches([len(text) for text in texts], BATCH_TOKENS))
    with torch.inference_mode():
        for batch in tqdm(batches, desc="hidden states", leave=False, disable=None):
            inputs = collate([texts[i] for i in batch], engine.pad_id, engine.device)
            hidden, said = engine.guarded.states(inputs)
            by_class = class_logits(said, multi_label=engine.guarded.multi_label)
            for kept, tensor in ((states, hidden), (logits, by_class)):
                kept.append(tensor.float().cpu().numpy())
    return np.concatenate(states), np.concatenate(logits)
