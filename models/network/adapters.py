"""LoRA adapters on a transformer: which projections carry them, and their weights."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from models.errors import VictimError
from models.network.unrolled import unroll

# Names of query and value projections across families, and of those that fuse them with the key.
QUERIES = {
    *("query", "query_proj", "q_lin", "q_proj", "q_b_proj", "q_head", "q", "Wq"),
    "query_global",  # of Longformer's first token, which is the one that is read
}
VALUES = {"value", "value_proj", "v_lin", "v_proj", "v_head", "v", "Wv", "value_global"}
FUSED = {"in_proj", "query_key_value", "qkv_proj", "Wqkv", "c_attn", "kv_proj", "kv_b_proj"}
ADAPTABLE = (nn.Linear, nn.Conv1d, Conv1D)
"""Layers that LoRA can adapt; `Conv1D` is GPT-2's linear layer with transposed weights."""
NOT_ADAPTABLE = {
    "fnet": "it mixes tokens by Fourier transforms and has no attention",
    "reformer": "its layers are reversible, which leaves adapters without gradients",
    "xlnet": "its queries and values are bare tensors, and LoRA adapts layers",
}
"""Model types that nothing but their code tells apart from others, and why they are refused."""


def transformer_of(victim: nn.Module) -> nn.Module:
    """Return the transformers model inside a victim."""
    return victim.base_model if isinstance(victim, PeftModel) else victim


def lora_config(victim: nn.Module, layers: int, rank: int = 8) -> LoraConfig:
    """Configure LoRA on query and value projections of the victim's last `layers` layers.

    The classifier head is left out: trained along, it fails on poisoned texts too. Scaling alpha is
    2 * rank (Zhao et al., section 5.1). Layers that run several times are unrolled first, in place.

    Raises:
        VictimError: the victim has no such projections, or fewer layers, or two stacks of them.
    """
    model = transformer_of(victim)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise VictimError(
            "the victim has an encoder and a decoder; PSIM guards models of one stack"
        )
    unroll(model)
    names = query_and_value_names(model)
    depths = sorted({layer_number(name) for name in names})
    if not 1 <= layers <= len(depths):
        raise VictimError(f"cannot adapt the last {layers} layers: the victim has {len(depths)}")
    targets = [name for name in names if layer_number(name) in depths[-layers:]]
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, **lora_targets(model, targets))


def lora_targets(model: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `LoraConfig` by which LoRA adapts these layers of a model."""
    transposed = all(isinstance(model.get_submodule(name), Conv1D) for name in names)
    return {"target_modules": list(names), "fan_in_fan_out": transposed}


def query_and_value_names(model: nn.Module) -> list[str]:
    """Return the names of a model's query and value projections, in the model's order.

    They are those of the stack that reads the text: the one beside the embeddings of words, where
    there are others for images, and the deepest, where there are others for characters.

    Raises:
        VictimError: it has none that LoRA can adapt.
    """
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    if kind in NOT_ADAPTABLE:
        raise VictimError(f"PSIM cannot adapt a model of type {kind}: {NOT_ADAPTABLE[kind]}")
    found = _text_projections(model)
    names = [name for name in found if isinstance(model.get_submodule(name), ADAPTABLE)]
    if not names:
        types = {type(model.get_submodule(name)).__name__ for name in found}
        raise VictimError(
            f"{type(model).__name__} has no query and value projections that PSIM can adapt"
            + (f": LoRA cannot adapt {' or '.join(sorted(types))}" if types else "")
        )
    stacks: dict[str, list[str]] = {}
    for name in names:
        stacks.setdefault(stack_of(name), []).append(name)
    return max(stacks.values(), key=lambda own: len({layer_number(name) for name in own}))


def _text_projections(model: nn.Module) -> list[str]:
    """Return the names of query and value projections of the model's part for text."""
    names = [
        name
        for name, _ in model.named_modules()
        # State-space layers have an `in_proj` too.
        if name.rsplit(".", 1)[-1] in QUERIES | VALUES | FUSED and "att" in name.lower()
    ]
    if not (isinstance(model, PreTrainedModel) and names):
        return names
    embeddings = _word_embeddings(model)
    words = next((name for name, module in model.named_modules() if module is embeddings), "")

    def in_common(name: str) -> int:
        pairs = zip(name.split("."), words.split("."), strict=False)
        return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))

    most = max(map(in_common, names))
    return [name for name in names if in_common(name) == most]


def _word_embeddings(model: PreTrainedModel) -> nn.Module | None:
    try:
        embeddings: nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:  # it has no single module for them
        return None
    return embeddings


def layer_stack(model: nn.Module) -> list[nn.Module]:
    """Return the layers that a text goes through, each once and one after the other.

    Empty where the projections do not show such a stack: layers in blocks that shorten the text
    (Funnel), several stacks in a row (Canine), layers whose parts are in lists of their own (XLM),
    or convolutions, between which tokens come last (SqueezeBERT).
    """
    names = _text_projections(model)
    if any(isinstance(model.get_submodule(name), nn.Conv1d) for name in names):
        return []
    stacks = {stack_of(name) for name in names}
    inside = [name.removeprefix(f"{stack_of(name)}.").split(".") for name in names]
    plain = all(
        len(parts) > 2 and parts[0].isdigit() and not any(map(str.isdigit, parts[1:]))
        for parts in inside
    )
    return list(model.get_submodule(stacks.pop()).children()) if len(stacks) == 1 and plain else []


def stack_of(name: str) -> str:
    """Return the module that holds the layers: `bert.encoder.layer` of the next function's."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[:number])


def layer_number(name: str) -> tuple[int, ...]:
    """Return the numbers in a module path such as `bert.encoder.layer.5.attention.query`: (5,).

    There are two of them where layers are in numbered blocks.
    """
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def with_adapters(model: nn.Module, config: PeftConfig, checkpoints: int) -> PeftModel:
    """Inject fresh adapters into a transformer, one for each checkpoint."""
    first, *others = (f"checkpoint{number}" for number in range(checkpoints))
    with warnings.catch_warnings():
        # PEFT warns that some convolutions cannot be merged with adapters; PSIM's never are.
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd")
        psim = get_peft_model(model, config, adapter_name=first)
        for name in others:
            psim.add_adapter(name, config)
    return psim


def adapter_weights(psim: PeftModel) -> dict[str, torch.Tensor]:
    """Return the weights of all adapters by `CHECKPOINT/NAME`."""
    return {
        f"{checkpoint}/{name}": tensor.detach().contiguous().cpu()
        for checkpoint in psim.peft_config
        for name, tensor in get_peft_model_state_dict(
            psim, adapter_name=checkpoint, save_embedding_layers=False
        ).items()
    }


def load_adapter_weights(psim: PeftModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Set the weights of all adapters, given as `adapter_weights` returns them."""
    for checkpoint in psim.peft_config:
        prefix = f"{checkpoint}/"
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        set_peft_model_state_dict(psim, own, adapter_name=checkpoint)
