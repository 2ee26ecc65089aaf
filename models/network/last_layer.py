"""The last layer of a transformer and its head, computed for the one token that is read.

A classifier reads a single position of the last layer's output: the first token, or the last one in
a decoder. Only that position needs a query, an output projection and a feed-forward. So many
adapters on query and value cost little more than one: a text of T tokens and N branches (the
adapters, and the victim without any) takes N rows through the layer and two products of N x heads
vectors with T hidden states. The value projection is applied after the attention, to N vectors
instead of T. Where only queries meet keys, the key projection is folded into the N queries.

The result agrees with transformers' own layer except for rounding. `models.network.families` makes
the layers of the supported families.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from models.network.projection import Projection, and_none


class LayerOutput(NamedTuple):
    """What a last layer gives for the token that is read, by branch."""

    states: torch.Tensor
    """Its output, shape (rows, N, H)."""
    attention: torch.Tensor
    """The bare victim's attention to each token, mean over heads, float32, shape (rows, T)."""


class LayerInput(NamedTuple):
    """What reaches a layer."""

    hidden: torch.Tensor
    """Hidden states, shape (rows, T, H)."""
    args: tuple[Any, ...] = ()
    """What transformers passes besides, by place."""
    kwargs: Mapping[str, Any] = {}
    """What transformers passes besides, by name."""


NO_NORM = nn.Identity()
LEAST_PEAK = 1e-3
"""Floor of a peak. A text without inner tokens has none, and its logarithm must be finite."""


@dataclass(frozen=True)
class LastLayer:
    """One family's last layer; its N branches are the adapters named, and last the bare victim."""

    query: Projection
    key: Projection
    value: Projection
    heads: int
    before: Callable[[torch.Tensor], torch.Tensor]
    """Transforms the layer's input before the projections."""
    after: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """Takes attended values, (rows, N, heads x head size), and the layer's input at the token that
    is read, (rows, 1, H); returns the layer's output there, (rows, N, H)."""
    head: Callable[[torch.Tensor], torch.Tensor]
    """Takes outputs of the layer, (n, H); returns logits, (n, C)."""
    scale: float | None = None
    """Factor of scores; by default 1 / sqrt(head size)."""
    bias: Callable[[LayerInput], torch.Tensor] | None = None
    """Returns the bias of scores by relative position, shape (rows or 1, heads, T, T)."""
    window: int | None = None
    """How far a token sees: to those less than this many positions away; None if there is no
    limit."""

    def __call__(
        self, entering: LayerInput, mask: torch.Tensor, read: torch.Tensor, adapters: Sequence[str]
    ) -> LayerOutput:
        """Return the layer's output at the token that is read.

        Args:
            entering: the layer's input.
            mask: 1 where there is a token, shape (rows, T).
            read: position of the token that is read, shape (rows,); a decoder reads the last one.
            adapters: names of the adapters.
        """
        hidden = entering.hidden
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        x = self.before(hidden)
        q = self.query.by_branch(x[rows, read], adapters).expand(-1, len(adapters) + 1, -1)
        q = torch.unflatten(q, -1, (self.heads, -1))  # (rows, N, heads, head size)
        scores = self._scores(q, x, read, entering.kwargs, adapters)
        scores = scores * (self.scale or q.shape[-1] ** -0.5)
        if self.bias is not None:
            own = self.bias(entering).expand(hidden.shape[0], -1, -1, -1)[rows, :, read]
            scores = scores + own.repeat(1, q.shape[1], 1).to(scores.dtype)
        scores = scores + _padding_bias(self._in_window(mask, read), scores.dtype)
        weights = scores.float().softmax(-1)
        attended = torch.unflatten(weights.to(x.dtype) @ x, 1, q.shape[1:3])
        values = self._values(attended, q.shape[-1], adapters)
        states = self.after(values.flatten(2), hidden[rows, read][:, None])
        return LayerOutput(states, weights[:, -self.heads :].mean(1))

    def _in_window(self, mask: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Return the mask of the tokens that those at `read` attend to, shape (rows, T)."""
        if self.window is None:
            return mask
        positions = torch.arange(mask.shape[1], device=mask.device)
        return mask * ((positions - read[:, None]).abs() < self.window)

    def _groups(self, head_size: int) -> int:
        """Return how many groups of heads have keys and values of their own."""
        return int(self.value.weight.shape[0] // head_size)

    def _scores(
        self,
        q: torch.Tensor,
        x: torch.Tensor,
        read: torch.Tensor,
        kwargs: Mapping[str, Any],
        adapters: Sequence[str],
    ) -> torch.Tensor:
        """Return q . k for each token, shape (rows, N x heads, T).

        Args:
            q: queries, shape (rows, N, heads, head size).
            x: what keys are made of, shape (rows, T, H).
            read: position of the token that is read, shape (rows,).
            kwargs: what transformers passes to the layer by name.
            adapters: names of the adapters.
        """
        groups = self._groups(q.shape[-1])
        q = torch.unflatten(q, 2, (groups, -1))
        # Without computing keys. q . (W x + b): the softmax cancels b, the same for all tokens.
        weight = torch.unflatten(self.key.weight, 0, (groups, -1))
        folded = torch.einsum("rngsd,gdk->rngsk", q, weight)
        if adapters and self.key.is_adapted:
            a, b = self.key.adapters(adapters)
            low = torch.einsum("rngsd,ngdj->rngsj", q[:, :-1], torch.unflatten(b, 1, (groups, -1)))
            folded = folded + and_none(torch.einsum("rngsj,njk->rngsk", low, a), -4)
        return folded.flatten(1, 3) @ x.transpose(1, 2)

    def _values(
        self, attended: torch.Tensor, head_size: int, adapters: Sequence[str]
    ) -> torch.Tensor:
        """Project attended inputs, (rows, N, heads, in), to values, (rows, N, heads, head size)."""
        groups = self._groups(head_size)
        by_group = torch.unflatten(attended, 2, (groups, -1))
        weight = torch.unflatten(self.value.weight, 0, (groups, -1))
        values = torch.einsum("rngsk,gdk->rngsd", by_group, weight)
        if self.value.bias is not None:
            values = values + torch.unflatten(self.value.bias, 0, (groups, -1))[:, None]
        if adapters and self.value.is_adapted:
            a, b = self.value.adapters(adapters)
            low: Any = torch.einsum("rngsk,njk->rngsj", by_group[:, :-1], a)
            added = torch.einsum("rngsj,ngdj->rngsd", low, torch.unflatten(b, 1, (groups, -1)))
            values = values + and_none(added, -4)
        return values.flatten(2, 3)


@dataclass(frozen=True)
class RotatedLastLayer(LastLayer):
    """One that rotates queries and keys by position."""

    query_norm: nn.Module = NO_NORM
    """Norm of a head's queries, before the rotation."""
    key_norm: nn.Module = NO_NORM

    def _scores(
        self,
        q: torch.Tensor,
        x: torch.Tensor,
        read: torch.Tensor,
        kwargs: Mapping[str, Any],
        adapters: Sequence[str],
    ) -> torch.Tensor:
        groups, rows = self._groups(q.shape[-1]), torch.arange(x.shape[0], device=x.device)
        k = self.key.by_branch(x, adapters)  # (rows, T, N or 1, groups x head size)
        branches = k.shape[2]
        k = self.key_norm(torch.unflatten(k, -1, (groups, -1))).flatten(2, 3).transpose(1, 2)
        # Cosines and sines by position, shape (rows or 1, T, head size) each.
        by_row = [part.expand(x.shape[0], -1, -1) for part in kwargs["position_embeddings"]]
        _, k = apply_rotary_pos_emb(k, k, *by_row)
        cos, sin = (part[rows, read][:, None] for part in by_row)
        normed = self.query_norm(q).flatten(1, 2)[:, :, None]
        rotated, _ = apply_rotary_pos_emb(normed, k[:, :, :1], cos, sin)
        grouped = torch.unflatten(rotated[:, :, 0], 1, (q.shape[1], groups, -1))
        by_branch = torch.unflatten(k, 1, (branches, groups))
        return torch.einsum("rngsd,rngtd->rngst", grouped, by_branch).flatten(1, 3)


@dataclass(frozen=True)
class DisentangledLastLayer(LastLayer):
    """One of DeBERTa's second version: what is where is scored too. The first token is read."""

    span: int = 0
    """Relative positions on either side that have an embedding."""
    position_key: Projection | None = None
    """Makes keys of relative positions, which queries of tokens meet."""
    position_query: Projection | None = None
    """Makes queries of relative positions, which meet keys of tokens."""

    def _scores(
        self,
        q: torch.Tensor,
        x: torch.Tensor,
        read: torch.Tensor,
        kwargs: Mapping[str, Any],
        adapters: Sequence[str],
    ) -> torch.Tensor:
        # Relative positions, (1, T, T), and embeddings of them, (2 x span, H).
        relative, embeddings = kwargs["relative_pos"][0], kwargs["rel_embeddings"]

        def embedded(positions: torch.Tensor) -> torch.Tensor:
            rows: torch.Tensor = embeddings[(positions + self.span).clamp(0, 2 * self.span - 1)]
            return rows

        def by_head(projected: torch.Tensor) -> torch.Tensor:
            split: torch.Tensor = torch.unflatten(projected, -1, (self.heads, -1))
            return split

        k = by_head(self.key(x))
        scores = torch.einsum("rnhd,rthd->rnht", q, k)
        if self.position_key is not None:
            keys = by_head(self.position_key(embedded(relative[0])))
            scores = scores + torch.einsum("rnhd,thd->rnht", q, keys)
        if self.position_query is not None:
            # From the other token's side; adapted where it is the projection of queries.
            made = self.position_query.by_branch(embedded(-relative[:, 0]), adapters)
            scores = scores + torch.einsum("tnhd,rthd->rnht", by_head(made), k)
        return scores.flatten(1, 2)


def _padding_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the bias of scores, shape (rows, 1, T): as good as minus infinity at padding."""
    return (1 - mask.to(dtype))[:, None] * torch.finfo(dtype).min


def attention_peak(attention: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the largest attention to one inner token of each text, float32, shape (rows,).

    What a trigger does, it does through attention: the token that is read looks at the trigger and
    at little else (Lyu et al., "A Study of the Attention Abnormality in Trojaned BERTs", NAACL
    2022). So this is a detector.

    The first and the last token do not count: they are special ones, or, in a decoder, the one that
    every text attends to by default and the one that is read.

    The fewer tokens there are, the more falls to each. So the peak is multiplied by the fourth root
    of their number, which makes it much the same for clean texts of any length: over 13 victims,
    their peaks fall with the number's power -0.27 on average (docs/method.md).

    Args:
        attention: of the token that is read, mean over heads, shape (rows, T).
        mask: 1 where there is a token, padded on the right, shape (rows, T).
    """
    number = mask.sum(1)
    positions = torch.arange(mask.shape[1], device=mask.device)
    inner = (positions > 0) & (positions < number[:, None] - 1)
    peak = (attention.float() * inner).amax(1)
    return (peak * (number - 2).clamp(min=1).float() ** 0.25).clamp(min=LEAST_PEAK)
