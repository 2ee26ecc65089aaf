"""Layers that run several times, each time as a layer of its own with the same weights.

ALBERT runs one layer, or a few, again and again. An adapter on such a layer would change all of its
runs. Unrolled, the last run is a module of its own, and so it can have adapters of its own.
"""

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

ENCODER = "albert.encoder"
LAYERS = f"{ENCODER}.albert_layer_groups"
"""Where ALBERT has its groups of layers, and its layers once they are unrolled."""


def unroll(model: nn.Module) -> None:
    """Give every run of an ALBERT's layers a module of its own, in place; leave others as they are.

    Scores stay the same, bit for bit. Weights are shared, so it takes no memory.
    """
    if not _is_albert(model) or _is_unrolled(model):
        return
    encoder: Any = model.get_submodule(ENCODER)
    groups = encoder.albert_layer_groups
    layers = [_sharing_weights(groups[group].albert_layers[n]) for group, n in _runs(model)]
    encoder.albert_layer_groups = nn.ModuleList(layers)
    # The encoder's only: the model's own config is saved with it.
    encoder.config = copy.copy(encoder.config)
    encoder.config.num_hidden_layers = encoder.config.num_hidden_groups = len(layers)


def rolled_name(model: nn.Module, name: str) -> str:
    """Return the name that a weight of an unrolled model had before; of others, the name itself."""
    if not name.startswith(f"{LAYERS}.") or not _is_unrolled(model):
        return name
    number, _, rest = name.removeprefix(f"{LAYERS}.").partition(".")
    group, n = list(_runs(model))[int(number)]
    return f"{LAYERS}.{group}.albert_layers.{n}.{rest}"


def _is_albert(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "model_type", None) == "albert"


def _is_unrolled(model: nn.Module) -> bool:
    return _is_albert(model) and not hasattr(model.get_submodule(f"{LAYERS}.0"), "albert_layers")


def _runs(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield the group, and the number in it, of the layer that each run is of."""
    config: Any = model.config
    for run in range(config.num_hidden_layers):
        # As transformers chooses a group.
        group = int(run / (config.num_hidden_layers / config.num_hidden_groups))
        for number in range(config.inner_group_num):
            yield group, number


def _sharing_weights(layer: nn.Module) -> nn.Module:
    """Return a copy of a layer that has the same parameters."""
    same: dict[int, Any] = {id(weights): weights for weights in layer.parameters()}
    return copy.deepcopy(layer, same)
