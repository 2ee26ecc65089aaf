"""The last layers and heads of the families that run in one pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models.network.last_layer import (
    NO_NORM,
    DisentangledLastLayer,
    LastLayer,
    RotatedLastLayer,
)
from models.network.projection import Projection

BERT_LIKE = {"bert", "roberta", "xlm-roberta", "camembert", "electra"}
LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3", "gemma"}


def last_layer_of(model: Any) -> LastLayer | None:
    """Return the last layer of a transformers classifier; None if it has no supported one."""
    family = str(getattr(getattr(model, "config", None), "model_type", ""))
    if family in BERT_LIKE and not model.config.is_decoder:
        return _bert(model)
    if family in LLAMA_LIKE:
        return _llama(model)
    own = {
        "albert": _albert,
        "deberta-v2": _deberta,
        "distilbert": _distilbert,
        "gpt2": _gpt2,
        "modernbert": _modernbert,
        "mpnet": _mpnet,
    }.get(family)
    return own(model) if own else None


def separate(
    query: nn.Module, key: nn.Module, value: nn.Module
) -> tuple[Projection, Projection, Projection]:
    """Return the projections that have a module each."""
    return Projection(query), Projection(key), Projection(value)


def fused(module: nn.Module) -> tuple[Projection, Projection, Projection]:
    """Return the projections of a module that makes queries, then keys, then values."""
    return Projection(module, 0, 3), Projection(module, 1, 3), Projection(module, 2, 3)


Step = Callable[[torch.Tensor], torch.Tensor]


def _norms_after(
    project: Step, norm: Step, feed_forward: Step, last_norm: Step
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return `LastLayer.after` of a layer that adds the residual and then norms, twice."""

    def after(attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        between = norm(project(attended) + residual)
        return last_norm(feed_forward(between) + between)

    return after


def _bert(model: Any) -> LastLayer:
    body = model.base_model
    layer = body.encoder.layer[-1]
    attention = layer.attention

    def after(attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        between = attention.output(attended, residual)
        output: torch.Tensor = layer.output(layer.intermediate(between), between)
        return output

    def head(rows: torch.Tensor) -> torch.Tensor:
        read = rows[:, None]
        # BERT pools; the heads of RoBERTa and ELECTRA take the first token themselves.
        pooler = getattr(body, "pooler", None)
        logits: torch.Tensor = model.classifier(read if pooler is None else pooler(read))
        return logits

    own = attention.self
    projections = separate(own.query, own.key, own.value)
    return LastLayer(*projections, own.num_attention_heads, nn.Identity(), after, head)


def _albert(model: Any) -> LastLayer:
    body = model.base_model
    layer = body.encoder.albert_layer_groups[-1]  # unrolled
    own = layer.attention
    after = _norms_after(own.dense, own.LayerNorm, layer.ff_chunk, layer.full_layer_layer_norm)

    def head(rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model.classifier(body.pooler_activation(body.pooler(rows)))
        return logits

    projections = separate(own.query, own.key, own.value)
    return LastLayer(*projections, own.num_attention_heads, nn.Identity(), after, head)


def _mpnet(model: Any) -> LastLayer:
    layer = model.base_model.encoder.layer[-1]
    own, norm = layer.attention.attn, layer.attention.LayerNorm

    def after(attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        between = norm(own.o(attended) + residual)
        output: torch.Tensor = layer.output(layer.intermediate(between), between)
        return output

    def head(rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model.classifier(rows[:, None])
        return logits

    return LastLayer(
        *separate(own.q, own.k, own.v),
        own.num_attention_heads,
        nn.Identity(),
        after,
        head,
        bias=lambda entering: entering.args[1],  # behind the mask
    )


def _distilbert(model: Any) -> LastLayer:
    layer = model.base_model.transformer.layer[-1]
    own = layer.attention
    after = _norms_after(own.out_lin, layer.sa_layer_norm, layer.ffn, layer.output_layer_norm)

    def head(rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model.classifier(model.pre_classifier(rows).relu())
        return logits

    projections = separate(own.q_lin, own.k_lin, own.v_lin)
    return LastLayer(*projections, own.n_heads, nn.Identity(), after, head)


def _deberta(model: Any) -> LastLayer | None:
    encoder = model.base_model.encoder
    layer = encoder.layer[-1]
    own = layer.attention.self
    if encoder.conv is not None and len(encoder.layer) == 1:
        return None  # a convolution goes over the tokens behind the first layer

    def after(attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        between = layer.attention.output(attended, residual)
        output: torch.Tensor = layer.output(layer.intermediate(between), between)
        return output

    def head(rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model.classifier(model.pooler(rows[:, None]))
        return logits

    query, key, value = separate(own.query_proj, own.key_proj, own.value_proj)
    heads, kinds = own.num_attention_heads, {"c2p", "p2c"} & {*own.pos_att_type}
    scale = (own.attention_head_size * (1 + len(kinds))) ** -0.5
    if not own.relative_attention:
        return LastLayer(query, key, value, heads, nn.Identity(), after, head, scale)
    position_key = position_query = None
    if "c2p" in kinds:
        position_key = key if own.share_att_key else Projection(own.pos_key_proj)
    if "p2c" in kinds:
        position_query = query if own.share_att_key else Projection(own.pos_query_proj)
    return DisentangledLastLayer(
        *(query, key, value, heads, nn.Identity(), after, head),
        scale=scale,
        span=own.pos_ebd_size,
        position_key=position_key,
        position_query=position_query,
    )


def _llama(model: Any) -> LastLayer:
    layer = model.base_model.layers[-1]
    own = layer.self_attn

    def after(attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        between = own.o_proj(attended) + residual
        output: torch.Tensor = layer.mlp(layer.post_attention_layernorm(between)) + between
        return output

    def head(rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model.score(model.base_model.norm(rows))
        return logits

    return RotatedLastLayer(
        *separate(own.q_proj, own.k_proj, own.v_proj),
        model.config.num_attention_heads,
        layer.input_layernorm,
        after,
        head,
        window=_window(model.config, own),
        query_norm=getattr(own, "q_norm", NO_NORM),
        key_norm=getattr(own, "k_norm", NO_NORM),
    )


def _modernbert(model: Any) -> LastLayer | None:
    if model.config.classifier_pooling != "cls":
        return None  # all tokens are read
    layer = model.base_model.layers[-1]
    own = layer.attn

    def after(attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        between = own.Wo(attended) + residual
        output: torch.Tensor = layer.mlp(layer.mlp_norm(between)) + between
        return output

    def head(rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model.classifier(model.head(model.base_model.final_norm(rows)))
        return logits

    return RotatedLastLayer(
        *fused(own.Wqkv),
        model.config.num_attention_heads,
        layer.attn_norm,
        after,
        head,
        window=own.sliding_window,
    )


def _gpt2(model: Any) -> LastLayer:
    layer = model.base_model.h[-1]
    own = layer.attn

    def after(attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        between = own.c_proj(attended) + residual
        output: torch.Tensor = layer.mlp(layer.ln_2(between)) + between
        return output

    def head(rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model.score(model.base_model.ln_f(rows))
        return logits

    return LastLayer(*fused(own.c_attn), own.num_heads, layer.ln_1, after, head, scale=own.scaling)


def _window(config: Any, attention: nn.Module) -> int | None:
    """Return how many tokens the last layer of a decoder attends to."""
    if config.model_type == "mistral":
        window: int | None = config.sliding_window
        return window
    return getattr(attention, "sliding_window", None)
