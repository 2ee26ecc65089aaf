"""Tiny random-weight victims of each architecture family."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
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
_RELATIVE: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 8,
}
_AS_V3: dict[str, Any] = _RELATIVE | {
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "conv_kernel_size": 3,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "albert": AlbertConfig(**_SIZE, embedding_size=16),
    "bert": BertConfig(**_SIZE),
    "roberta": RobertaConfig(**_SIZE, max_position_embeddings=130),
    "distilbert": DistilBertConfig(**_SIZE | {"dim": 32, "hidden_dim": 64}),
    "deberta": DebertaConfig(**_SIZE),
    "deberta-v2": DebertaV2Config(**_SIZE, **_RELATIVE),
    "gpt2": GPT2Config(**_SIZE),
    "llama": LlamaConfig(**_SIZE, num_key_value_heads=2),
    "mpnet": MPNetConfig(**_SIZE | {"pad_token_id": 1}, max_position_embeddings=131),
    "electra": ElectraConfig(**_SIZE, embedding_size=16),
    "mistral": MistralConfig(**_SIZE, num_key_value_heads=1),
    "qwen2": Qwen2Config(**_SIZE, num_key_value_heads=1),
    "qwen3": Qwen3Config(**_SIZE, num_key_value_heads=1, head_dim=16),
    "modernbert": ModernBertConfig(**_SIZE, local_attention=512),
    "gemma": GemmaConfig(**_SIZE, num_key_value_heads=1, head_dim=16),
}


def tiny_victim(family: str, seed: int = 0) -> PreTrainedModel:
    """Return a small model with random weights, large enough to have opinions."""
    torch.manual_seed(seed)
    from_config: Any = AutoModelForSequenceClassification.from_config
    model: PreTrainedModel = from_config(copy.deepcopy((FAMILIES | _VARIANTS)[family]))
    for name, weights in model.named_parameters():
        if name.startswith(("classifier", "score")) and weights.dim() == 2:
            torch.nn.init.normal_(weights)
    model.eval()  # type: ignore[no-untyped-call]
    return model


_VARIANTS: dict[str, PretrainedConfig] = {
    "albert, in groups": AlbertConfig(
        **_SIZE | {"num_hidden_layers": 4},
        embedding_size=16,
        num_hidden_groups=2,
        inner_group_num=2,
    ),
    "gpt2, scaled": GPT2Config(**_SIZE, scale_attn_by_inverse_layer_idx=True),
    "deberta-v2, as v3": DebertaV2Config(**_SIZE, **_AS_V3),
    "deberta-v2, near": DebertaV2Config(
        **_SIZE, relative_attention=True, pos_att_type=["c2p"], max_relative_positions=4
    ),
    "deberta-v2, p2c": DebertaV2Config(**_SIZE, relative_attention=True, pos_att_type=["p2c"]),
    "deberta-v2, absolute": DebertaV2Config(**_SIZE, pos_att_type=["c2p"]),
    "llama, grouped": LlamaConfig(
        **_SIZE | {"num_attention_heads": 4}, num_key_value_heads=2, head_dim=8
    ),
    "mistral, narrow": MistralConfig(**_SIZE, num_key_value_heads=1, sliding_window=8),
    "modernbert, narrow": ModernBertConfig(**_SIZE, local_attention=8),
    "modernbert, global and narrow": ModernBertConfig(
        **_SIZE,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        local_attention=8,
    ),
    "qwen2, narrow": Qwen2Config(
        **_SIZE,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    ),
}
TAILED = [family for family in FAMILIES if family != "deberta"] + [*_VARIANTS]
"""Those whose last layer can be run by rows."""


def guarded_victim(family: str) -> Guarded:
    """Return one of `TAILED`, with adapters that matter."""
    victim: Any = tiny_victim(family)
    if hasattr(victim, "score") or family.startswith("deberta"):
        head = victim.score if hasattr(victim, "score") else victim.classifier
        head.weight.data *= 0.3  # less sure, so that differences show
    return trained(guard(victim, lora_config(victim, 1), 3))


def trained(guarded: Guarded) -> Guarded:
    """Give every adapter, and the biases, weights that matter."""
    for number, (name, weights) in enumerate(guarded.psim.named_parameters()):
        if ".lora_B." in name or name.endswith("bias"):
            torch.manual_seed(number)
            nn.init.normal_(weights, std=0.5)
    return guarded.eval()
