"""Tiny random-weight victims of each architecture family."""

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

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
