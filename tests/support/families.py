"""Tiny random-weight victims of each architecture family."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    LlamaConfig,
    MPNetConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

from models.network.adapters import lora_config
from models.network.guarded import Guarded, guard

VOCABULARY = 30522
_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "num_labels": 3,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "bert": BertConfig(**_SIZE),
    "roberta": RobertaConfig(**_SIZE, max_position_embeddings=130),
    "distilbert": DistilBertConfig(**_SIZE | {"dim": 32, "hidden_dim": 64}),
    "deberta": DebertaConfig(**_SIZE),
    "deberta-v2": DebertaV2Config(**_SIZE, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "llama": LlamaConfig(**_SIZE, num_key_value_heads=2),
    "mpnet": MPNetConfig(**_SIZE | {"pad_token_id": 1}, max_position_embeddings=130),
}


def tiny_victim(family: str, seed: int = 0) -> PreTrainedModel:
    """Return a small model with random weights, large enough to have opinions."""
    torch.manual_seed(seed)
    from_config: Any = AutoModelForSequenceClassification.from_config
    model: PreTrainedModel = from_config(copy.deepcopy(FAMILIES[family]))
    for name, weights in model.named_parameters():
        if name.startswith(("classifier", "score")) and weights.dim() == 2:
            torch.nn.init.normal_(weights)
    model.eval()  # type: ignore[no-untyped-call]
    return model


TAILED = ["bert", "roberta", "distilbert", "llama", "llama, grouped"]
"""Those whose last layer can be run by rows."""


def guarded_victim(family: str) -> Guarded:
    """Return one of `TAILED`, with adapters that matter."""
    victim: Any
    if family == "llama, grouped":
        config = FAMILIES["llama"].to_dict() | {"num_attention_heads": 4, "head_dim": 8}
        torch.manual_seed(0)
        from_config: Any = AutoModelForSequenceClassification.from_config
        victim = from_config(LlamaConfig(**config))
    else:
        victim = tiny_victim(family)
    return trained(guard(victim, lora_config(victim, 1), 3))


def trained(guarded: Guarded) -> Guarded:
    """Give every adapter, and the biases, weights that matter."""
    for number, (name, weights) in enumerate(guarded.psim.named_parameters()):
        if ".lora_B." in name or name.endswith("bias"):
            torch.manual_seed(number)
            nn.init.normal_(weights, std=0.5)
    return guarded.eval()
