"""LoRA adapters on a transformer: which projections carry them, and their weights."""

from collections.abc import Mapping

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

from models.errors import VictimError

# Names of query and value projections across families, and of those that fuse them with the key.
QUERIES = {"query", "query_proj", "q_lin", "q_proj", "q"}
VALUES = {"value", "value_proj", "v_lin", "v_proj", "v"}
FUSED = {"in_proj", "query_key_value", "qkv_proj", "Wqkv"}


def transformer_of(victim: nn.Module) -> nn.Module:
    """Return the transformers model inside a victim."""
    return victim.base_model if isinstance(victim, PeftModel) else victim


def lora_config(victim: nn.Module, layers: int, rank: int = 8) -> LoraConfig:
    """Configure LoRA on query and value projections of the victim's last `layers` layers.

    The classifier head is left out: trained along, it fails on poisoned texts too. Scaling alpha is
    2 * rank (Zhao et al., section 5.1).

    Raises:
        VictimError: the victim has no such projections, or fewer layers, or two stacks of them.
    """
    model = transformer_of(victim)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise VictimError(
            "the victim has an encoder and a decoder; PSIM guards models of one stack"
        )
    names = query_and_value_names(model)
    depths = sorted({layer_number(name) for name in names})
    if not 1 <= layers <= len(depths):
        raise VictimError(f"cannot adapt the last {layers} layers: the victim has {len(depths)}")
    targets = [name for name in names if layer_number(name) in depths[-layers:]]
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets)


def query_and_value_names(model: nn.Module) -> list[str]:
    """Return the names of a model's query and value projections, in the model's order.

    Raises:
        VictimError: it has none.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in QUERIES | VALUES | FUSED
    ]
    if not names:
        raise VictimError(
            f"{type(model).__name__} has no query and value projections that PSIM can adapt; "
            "supported are BERT, RoBERTa, DistilBERT, DeBERTa, MPNet and LLaMA-type models"
        )
    return names


def layer_number(name: str) -> int:
    """Return the layer number in a module path such as `bert.encoder.layer.5.attention.query`."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def with_adapters(model: nn.Module, config: PeftConfig, checkpoints: int) -> PeftModel:
    """Inject fresh adapters into a transformer, one for each checkpoint."""
    first, *others = (f"checkpoint{number}" for number in range(checkpoints))
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
