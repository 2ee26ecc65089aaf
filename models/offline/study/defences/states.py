"""Hidden states of a victim's own forward pass, which baselines look for anomalies in."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from models.detection.screen import FloatArray
from models.engines.base import Encoding
from models.engines.batching import in_batches
from models.engines.pytorch import TorchEngine, collate
from models.network.adapters import transformer_of
from models.network.last_token import last_positions, reads_last_token


class States(NamedTuple):
    """What the victim computes for n texts, with H = layers + 1 for the embeddings first."""

    probabilities: FloatArray
    """Of the classes, shape (n, C)."""
    read: FloatArray
    """States of the token that the classifier reads, shape (n, H, D): the first, or a decoder's
    last."""
    mean: FloatArray
    """Means of the states of all tokens, shape (n, H, D)."""


Reader = Callable[[Sequence[str]], States]
"""Function that runs the victim on texts."""


def read_states(engine: TorchEngine, texts: Sequence[str]) -> States:
    """Run a victim without PSIM on texts.

    Args:
        engine: runs the victim; from `bare_engine`.
        texts: at least one.
    """
    victim: Any = engine.guarded.victim
    reads_last = reads_last_token(transformer_of(victim))

    def forward(batch: Sequence[Encoding]) -> list[tuple[FloatArray, FloatArray, FloatArray]]:
        inputs = collate(batch, engine.pad_id, engine.device)
        with torch.inference_mode():
            output = victim(**inputs, output_hidden_states=True)
            hidden = torch.stack(output.hidden_states, 1).float()
            mask = inputs["attention_mask"]
            # Prompts take places before the text's own.
            mask = torch.nn.functional.pad(mask, (hidden.shape[2] - mask.shape[1], 0), value=1)
            places = last_positions(mask) if reads_last else torch.zeros_like(mask[:, 0])
            read = hidden[torch.arange(len(hidden), device=hidden.device), :, places]
            shares = mask / mask.sum(1, keepdim=True)
            mean = torch.einsum("nhtd,nt->nhd", hidden, shares)
            found = output.logits.float().softmax(-1), read, mean
        return list(zip(*(tensor.cpu().numpy() for tensor in found), strict=True))

    rows = in_batches(forward, engine.encode(texts))
    return States(*(np.stack(column) for column in zip(*rows, strict=True)))
