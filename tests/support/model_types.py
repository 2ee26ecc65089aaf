"""A tiny classifier of each model type that transformers can classify with, built offline.

`python -m tests.support.model_types` writes the table of docs/compatibility.md that says which of
them can be guarded.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from models.engines.base import Encoding
from models.engines.pytorch import collate
from models.errors import VictimError
from models.network.adapters import lora_config
from models.network.check import guard_checked
from models.network.guarded import Guarded
from models.network.trunk import Inputs
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "compatibility.md"
ONE_PASS = "guarded, in one pass for all checkpoints"
SHARED = "guarded, with a pass of the adapted layers for each checkpoint"
WHOLE = "guarded, with a whole pass for each checkpoint"
MODEL_TYPES = list(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
VOCABULARY, CLASSES, LAYERS = 96, 3, 3
_SIZES: dict[str, int] = {
    name: size
    for size, names in (
        (VOCABULARY, "vocab_size entity_vocab_size pronunciation_vocab_size shape_vocab_size"),
        (128, "max_position_embeddings n_positions max_seq_len max_2d_position_embeddings"),
        (
            32,
            "hidden_size d_model n_embd dim emb_dim embedding_size input_embedding_size "
            "word_embed_proj_dim output_embedding_size pooler_hidden_size true_hidden_size "
            "d_latents entity_emb_size intermediate_size n_inner d_inner "
            "moe_intermediate_size shared_expert_intermediate_size encoder_ffn_dim dff d_ff "
            "decoder_ffn_dim ffn_dim hidden_dim feed_forward_size intra_bottleneck_size "
            "prediction_head_size",
        ),
        (
            16,
            "head_dim attention_head_size d_head d_kv kv_channels v_head_dim "
            "linear_key_head_dim linear_value_head_dim qk_nope_head_dim qk_rope_head_dim "
            "qk_head_dim kv_lora_rank q_lora_rank index_head_dim "
            "query_pre_attn_scalar",
        ),
        (
            LAYERS,
            "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
            "num_decoder_layers depth",
        ),
        (
            2,
            "num_attention_heads n_head n_heads num_heads encoder_attention_heads index_n_heads "
            "decoder_attention_heads num_key_value_heads num_kv_heads num_self_attention_heads "
            "linear_num_key_heads linear_num_value_heads n_mamba_heads num_experts moe_topk "
            "num_local_experts n_routed_experts num_experts_per_tok",
        ),
        (1, "n_group topk_group n_shared_experts first_k_dense_replace"),
    )
    for name in names.split()
}
"""Sizes by the names that configs give them."""
_HYBRID = ["linear_attention", "linear_attention", "full_attention"]
_OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "gptj": {"rotary_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6},
    "lilt": {"hidden_size": 48},
    "longformer": {"attention_window": 16},
    "mistral4": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}
        | {"partial_rotary_factor": 1.0, "llama_4_scaling_beta": 0.1}
        | {"original_max_position_embeddings": 128},
    },
    "modernvbert": {"text_config": {"pad_token_id": 0}},
    "mpnet": {"pad_token_id": 1},  # its code knows no other
    "qwen3_5": {"text_config": {"layer_types": _HYBRID}},
    "qwen3_5_text": {"layer_types": _HYBRID},
    "qwen3_next": {"layer_types": _HYBRID},
    "reformer": {
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh", "local"],
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
}
"""What a few model types need besides: sizes that must fit each other."""


def tiny_model(model_type: str, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """Return a classifier with random weights, in evaluation mode.

    Raises:
        ImportError: it needs a package that is not installed.
    """
    config_class: Any = CONFIG_MAPPING[model_type]
    before = transformers.logging.get_verbosity()
    # Default ids of tokens are beyond the vocabulary, which is reported at length.
    transformers.logging.set_verbosity(logging.ERROR)
    try:
        settings = _tiny(config_class().to_dict(), _OVERRIDES.get(model_type, {}))
        config = config_class(**{"pad_token_id": 0} | settings, num_labels=CLASSES)
        text_config: Any = config.get_text_config()
        text_config.pad_token_id, text_config.vocab_size = config.pad_token_id, vocabulary
        torch.manual_seed(0)
        from_config: Any = AutoModelForSequenceClassification.from_config
        model: Any = from_config(config)
    finally:
        transformers.logging.set_verbosity(before)
    for weights in model.parameters():
        if weights.dim() == 2 and len(weights) == CLASSES:
            torch.nn.init.normal_(weights)  # a head that has opinions
    model.eval()
    tiny: PreTrainedModel = model
    return tiny


def _tiny(defaults: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return settings that make the model of a config, and those inside it, tiny."""
    settings: dict[str, Any] = {
        name: _SIZES[name]
        for name, value in defaults.items()
        if name in _SIZES and isinstance(value, int | None)
    }
    for name, value in defaults.items():
        if isinstance(value, dict) and "model_type" in value:
            settings[name] = _tiny(value, overrides.get(name, {}))
    return settings | {
        k: v for k, v in overrides.items() if k not in settings or not isinstance(v, dict)
    }


@dataclass(frozen=True)
class Outcome:
    """What came of guarding a model type."""

    row: str
    """Which row of the table it is in."""
    guarded: Guarded | None = None


def some_encodings() -> list[Encoding]:
    """Return texts of a few lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 90, (n,), generator=generator).tolist() for n in (12, 20, 3, 7)]
    return [Encoding(tuple(own), False) for own in ids]


def pad_id_of(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().pad_token_id)


def some_inputs(model: PreTrainedModel) -> Inputs:
    """Return the same as a padded batch."""
    return collate(some_encodings(), pad_id_of(model), torch.device("cpu"))


def outcome_of(model_type: str, model: PreTrainedModel | None = None) -> Outcome:
    """Guard a model of this type as `psim fit` does, in place; by default a tiny one."""
    try:
        model = model or tiny_model(model_type)
    except ImportError as error:
        package = str(error).strip().split("requires the ")[-1].split()[0]
        return Outcome(f"not tried: needs {package}")
    try:
        guarded = guard_checked(model, lora_config(model, 1), 2, some_inputs(model))
    except VictimError as error:
        return Outcome(f"refused: {error}")
    if guarded.last_layer is not None:
        return Outcome(ONE_PASS, guarded)
    return Outcome(SHARED if guarded.trunk.length else WHOLE, guarded)


def table(rows: Mapping[str, str]) -> str:
    """Return the table of docs/compatibility.md.

    Args:
        rows: row of each model type.
    """
    types: dict[str, list[str]] = {}
    for model_type, row in sorted(rows.items()):
        types.setdefault(row, []).append(model_type)
    first = [row for row in (ONE_PASS, SHARED, WHOLE) if row in types]
    lines = [
        f"| {row} | {', '.join(types[row])} |" for row in [*first, *sorted({*types} - {*first})]
    ]
    return "\n".join(["| What happens | Model types |", "|---|---|", *lines, ""])


def on_page(replaced_by: str | None = None) -> str:
    """Return the table that docs/compatibility.md has, after replacing it if it is to be."""
    before, rest = PAGE.read_text().split("<!-- model types -->\n")
    current, after = rest.split("<!-- /model types -->\n")
    if replaced_by is None:
        return current
    PAGE.write_text(f"{before}<!-- model types -->\n{replaced_by}<!-- /model types -->\n{after}")
    return replaced_by


if __name__ == "__main__":
    on_page(table({model_type: outcome_of(model_type).row for model_type in MODEL_TYPES}))
