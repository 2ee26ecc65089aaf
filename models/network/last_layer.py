"""The last layer of a transformer and its head, computed for the one token that is read.

A classifier reads a single position of the last layer's output: the first token, or the last one in
a decoder. Only that position needs a query, an output projection and a feed-forward. So many
adapters on query and value cost little more than one: a text of T tokens and N branches (the
adapters, and the victim without any) takes N rows through the layer and two products of N x heads
vectors with T hidden states. The value projection is applied after the attention, to N vectors
instead of T. Where nothing rotates the keys, the key projection is folded into the N queries.

The result agrees with transformers' own layer except for rounding. `last_layer_of` lists the
supported families.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

BERT_LIKE = {"bert", "roberta", "xlm-roberta", "camembert", "electra"}
LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3", "gemma"}
Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines by position, shape (rows or 1, T, head size) each."""


class LayerInput(NamedTuple):
    """What reaches a layer."""

    hidden: torch.Tensor
    """Hidden states, shape (rows, T, H)."""
    rotation: Rotation | None = None
    """Rotation of queries and keys, in families that have one."""
    bias: torch.Tensor | None = None
    """Bias of scores by relative position, shape (rows or 1, heads, T, T), in families that have
    one."""


NO_NORM = nn.Identity()


@dataclass(frozen=True)
class LastLayer:
    """One family's last layer; its N branches are the adapters named, and last the bare victim."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    heads: int
    before: Callable[[torch.Tensor], torch.Tensor]
    """Transforms the layer's input before the projections."""
    after: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """Takes attended values, (rows, N, heads x head size), and the layer's input at the token that
    is read, (rows, 1, H); returns the layer's output there, (rows, N, H)."""
    head: Callable[[torch.Tensor], torch.Tensor]
    """Takes outputs of the layer, (n, H); returns logits, (n, C)."""
    query_norm: nn.Module = NO_NORM
    key_norm: nn.Module = NO_NORM
    """Norm of a head's keys, and so of queries."""
    window: int | None = None
    """Tokens that one attends to, itself and those before it; None if there is no limit."""

    def __call__(
        self, entering: LayerInput, mask: torch.Tensor, read: torch.Tensor, adapters: Sequence[str]
    ) -> torch.Tensor:
        """Return the layer's output at the token that is read, by branch, shape (rows, N, H).

        Args:
            entering: the layer's input.
            mask: 1 where there is a token, shape (rows, T).
            read: position of the token that is read, shape (rows,); a decoder reads the last one.
            adapters: names of the adapters.
        """
        hidden, rotation, bias = entering
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        x = self.before(hidden)
        q = self._queries(x[rows, read], adapters)
        if rotation is None:
            scores = self._scores(q, x)
        else:
            scores = self._rotated_scores(q, x, read, rotation)
        scores = scores * q.shape[-1] ** -0.5
        if bias is not None:
            own = bias.expand(hidden.shape[0], -1, -1, -1)[rows, :, read]
            scores = scores + own.repeat(1, q.shape[1], 1).to(scores.dtype)
        scores = scores + _padding_bias(self._in_window(mask, read), scores.dtype)
        attended = (scores.float().softmax(-1).to(x.dtype) @ x).unflatten(1, q.shape[1:3])
        values = self._values(attended, q.shape[-1], adapters)
        return self.after(values.flatten(2), hidden[rows, read][:, None])

    def _queries(self, own: torch.Tensor, adapters: Sequence[str]) -> torch.Tensor:
        """Return queries of the token that is read, shape (rows, N, heads, head size)."""
        q: torch.Tensor = _base(self.query)(own)[:, None].expand(-1, len(adapters) + 1, -1)
        if adapters and isinstance(self.query, LoraLayer):
            q = q + _deltas(self.query, own, adapters)
        normed: torch.Tensor = self.query_norm(torch.unflatten(q, -1, (self.heads, -1)))
        return normed

    def _in_window(self, mask: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Return the mask of the tokens that those at `read` attend to, shape (rows, T)."""
        if self.window is None:
            return mask
        positions = torch.arange(mask.shape[1], device=mask.device)
        return mask * (positions > read[:, None] - self.window)

    def _groups(self, head_size: int) -> int:
        """Return how many groups of heads have keys and values of their own."""
        return int(_base(self.value).weight.shape[0] // head_size)

    def _scores(self, q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return q . k for each token, shape (rows, N x heads, T), without computing the keys."""
        groups = self._groups(q.shape[-1])
        # q . (W x + b): the bias is the same for all tokens, so the softmax cancels it.
        weight = _base(self.key).weight.unflatten(0, (groups, -1))
        folded = torch.einsum("rngsd,gdk->rngsk", torch.unflatten(q, 2, (groups, -1)), weight)
        return folded.flatten(1, 3) @ x.transpose(1, 2)

    def _rotated_scores(
        self, q: torch.Tensor, x: torch.Tensor, read: torch.Tensor, rotation: Rotation
    ) -> torch.Tensor:
        """Return q . k for each token, shape (rows, N x heads, T), both rotated by position."""
        groups, rows = self._groups(q.shape[-1]), torch.arange(x.shape[0], device=x.device)
        k = self.key_norm(self.key(x).unflatten(-1, (groups, -1)))
        k = k.transpose(1, 2)  # (rows, groups, T, head size)
        by_row = [part.expand(x.shape[0], -1, -1) for part in rotation]
        _, k = apply_rotary_pos_emb(k, k, *by_row)
        cos, sin = (part[rows, read][:, None] for part in by_row)
        rotated, _ = apply_rotary_pos_emb(q.flatten(1, 2)[:, :, None], k[:, :, :1], cos, sin)
        grouped = rotated[:, :, 0].unflatten(1, (q.shape[1], groups, -1))
        return torch.einsum("rngsd,rgtd->rngst", grouped, k).flatten(1, 3)

    def _values(
        self, attended: torch.Tensor, head_size: int, adapters: Sequence[str]
    ) -> torch.Tensor:
        """Project attended inputs, (rows, N, heads, in), to values, (rows, N, heads, head size)."""
        groups, projection = self._groups(head_size), _base(self.value)
        by_group = torch.unflatten(attended, 2, (groups, -1))
        weight = projection.weight.unflatten(0, (groups, -1))
        values = torch.einsum("rngsk,gdk->rngsd", by_group, weight).flatten(2, 3)
        if projection.bias is not None:
            bias = projection.bias.unflatten(0, (groups, -1))
            values = values + bias.repeat_interleave(self.heads // groups, 0)
        if adapters and isinstance(self.value, LoraLayer):
            values = values + _attended_deltas(self.value, attended, adapters, groups)
        return values


def _padding_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the bias of scores, shape (rows, 1, T): as good as minus infinity at padding."""
    return (1 - mask.to(dtype))[:, None] * torch.finfo(dtype).min


def _base(module: nn.Module) -> Any:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _adapted(module: Any, adapters: Sequence[str]) -> tuple[Any, Any]:
    """Return A, shape (N - 1, r, in), and scaled B, (N - 1, out, r), of the adapters."""
    # Not kept from call to call: they may be trained, converted or loaded in between.
    a, b = (
        torch.stack([by_name[name].weight for name in adapters])
        for by_name in (module.lora_A, module.lora_B)
    )
    return a, b * b.new_tensor([module.scaling[name] for name in adapters])[:, None, None]


def _deltas(module: nn.Module, x: torch.Tensor, adapters: Sequence[str]) -> torch.Tensor:
    """Return the adapters' part of a projection of x, (rows, in), by branch; zeros last."""
    a, b = _adapted(module, adapters)
    low = (x @ a.flatten(0, 1).T).unflatten(1, a.shape[:2])
    return nn.functional.pad(torch.einsum("rnj,noj->rno", low, b), (0, 0, 0, 1))


def _attended_deltas(
    module: nn.Module, attended: torch.Tensor, adapters: Sequence[str], groups: int
) -> torch.Tensor:
    """Return the adapters' part of attended values, shape (rows, N, heads, head size).

    Args:
        module: the projection of values.
        attended: inputs weighted by attention, shape (rows, N, heads, in).
        adapters: names of N - 1 adapters; the last branch gets zeros.
        groups: number of groups of heads that have values of their own.
    """
    a, b = _adapted(module, adapters)
    low: Any = torch.einsum("rnhi,nji->rnhj", attended[:, :-1], a)
    by_group = low.unflatten(2, (groups, -1))
    added = torch.einsum("rngsj,ngdj->rngsd", by_group, b.unflatten(1, (groups, -1)))
    return nn.functional.pad(added.flatten(2, 3), (0, 0, 0, 0, 0, 1))


def last_layer_of(model: Any) -> LastLayer | None:
    """Return the last layer of a transformers classifier; None if its family is not supported."""
    family = str(getattr(getattr(model, "config", None), "model_type", ""))
    if family in BERT_LIKE and not model.config.is_decoder:
        return _bert(model)
    if family in LLAMA_LIKE:
        return _llama(model)
    own = {"distilbert": _distilbert, "mpnet": _mpnet}.get(family)
    return own(model) if own else None


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
    return LastLayer(
        own.query, own.key, own.value, own.num_attention_heads, nn.Identity(), after, head
    )


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

    return LastLayer(own.q, own.k, own.v, own.num_attention_heads, nn.Identity(), after, head)


def _distilbert(model: Any) -> LastLayer:
    layer = model.base_model.transformer.layer[-1]
    own = layer.attention

    def after(attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        between = layer.sa_layer_norm(own.out_lin(attended) + residual)
        output: torch.Tensor = layer.output_layer_norm(layer.ffn(between) + between)
        return output

    def head(rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model.classifier(model.pre_classifier(rows).relu())
        return logits

    return LastLayer(own.q_lin, own.k_lin, own.v_lin, own.n_heads, nn.Identity(), after, head)


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

    return LastLayer(
        own.q_proj,
        own.k_proj,
        own.v_proj,
        model.config.num_attention_heads,
        layer.input_layernorm,
        after,
        head,
        query_norm=getattr(own, "q_norm", NO_NORM),
        key_norm=getattr(own, "k_norm", NO_NORM),
        window=_window(model.config, own),
    )


def _window(config: Any, attention: nn.Module) -> int | None:
    """Return how many tokens the last layer of a decoder attends to."""
    if config.model_type == "mistral":
        window: int | None = config.sliding_window
        return window
    return getattr(attention, "sliding_window", None)
