"""The layers below all adapters: run once for all checkpoints, and watched on the way."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.jit._trace import is_tracing

from models.network.last_layer import LayerInput
from models.network.last_token import last_positions

Inputs = Mapping[str, torch.Tensor]
"""`input_ids` and `attention_mask`, shape (rows, T) each, padded on the right."""

WATCHED_DEPTHS = 1 / 2, 5 / 6
"""Relative depths between which hidden states tell texts apart: past the words, before the
classes. Which layer does is another one for each victim, and clean texts do not show it."""
MAX_WATCHED = 5
"""Layers that are watched at most, evenly spaced, since neighbours see much the same."""


class Trunk:
    """Layers that no adapter changes.

    Args:
        stack: all layers of a transformer, in their order.
        length: how many of them, from the lowest, are the trunk.
        reads_last: whether the classifier reads the last token and not the first.
        prompted: whether prompts may come before the text.
        pad_id: the token that such a classifier takes for padding wherever it is, if any.
        windowed: whether layers attend to a window of tokens.
    """

    def __init__(
        self,
        stack: Sequence[nn.Module] = (),
        length: int = 0,
        *,
        reads_last: bool = False,
        prompted: bool = False,
        pad_id: int | None = None,
        windowed: bool = False,
    ) -> None:
        layers, depth = stack[:length], max(len(stack), 1)
        self.length, self.share = length, length / depth
        first, last = (min(max(1, round(share * depth)), length) for share in WATCHED_DEPTHS)
        spaced = np.linspace(first, last, MAX_WATCHED).round()
        self.watched: list[int] = sorted({int(number) for number in spaced if number})
        """Numbers, from 1, of the layers whose output is watched."""
        self.reads_last, self._prompted, self._pad_id = reads_last, prompted, pad_id
        self._windowed, self._stopping = windowed, False
        self._kept: list[Any] | None = None
        self._states: list[torch.Tensor] | None = None
        self._inputs: Inputs = {}
        for number, layer in enumerate(layers, 1):
            # The instance's forward and not a module around it: names of weights stay as they are.
            layer.forward = self._run(layer.forward, number, number == len(layers))
        for above in stack[length : length + 1]:
            above.forward = self._stoppable(above.forward)

    @contextmanager
    def watching(self, inputs: Inputs) -> Iterator[list[torch.Tensor]]:
        """Collect states of the token that is read, by watched layer, float32, (rows, H) each."""
        self._states, self._inputs = [], inputs
        try:
            yield self._states
        finally:
            self._states = None

    @contextmanager
    def shared(self, kept: list[Any] | None) -> Iterator[None]:
        """Reuse the trunk's output in all forward passes within, which must be on the same inputs.

        Args:
            kept: an empty list, or the one that an earlier `shared` filled for the same inputs;
                None keeps nothing.
        """
        self._kept = kept
        try:
            yield
        finally:
            self._kept = None

    def output(self, run: Callable[[], object]) -> LayerInput:
        """Return the trunk's output in a pass that ends there."""
        self._stopping = True
        try:
            run()
        except _ReachedError as reached:
            return reached.entering
        finally:
            self._stopping = False
        raise RuntimeError("the pass did not come to the layer above the trunk")

    def read_positions(self, inputs: Inputs) -> torch.Tensor:
        """Return where the classifier reads, shape (rows,), in inputs without prompts."""
        mask = inputs["attention_mask"]
        if not self.reads_last:
            return torch.zeros_like(mask[:, 0])
        if self._pad_id is not None:
            # As transformers does. Where texts end in that token, the one before it is read.
            mask = mask * (inputs["input_ids"] != self._pad_id)
        return last_positions(mask)

    def read_mask(self, inputs: Inputs, read: torch.Tensor) -> torch.Tensor:
        """Return the mask of the tokens that those at `read` attend to, shape (rows, T)."""
        mask = inputs["attention_mask"]
        if not self.reads_last:
            return mask
        positions = torch.arange(mask.shape[1], device=mask.device)
        return mask * (positions <= read[:, None])

    def _run(self, forward: Callable[..., Any], number: int, is_top: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._kept:
                return self._kept[0]
            output = forward(*args, **kwargs)
            if self._windowed and is_tracing():  # type: ignore[no-untyped-call]
                # Padding far behind a text has nothing to attend to. In a graph that makes NaN,
                # which would spread from there.
                output = output.masked_fill(self._inputs["attention_mask"][..., None] == 0, 0)
            if self._states is not None and number in self.watched:
                self._states.append(self._watch(output))
            if self._kept is not None and is_top:
                self._kept.append(output)
            return output

        return run

    def _watch(self, output: Any) -> torch.Tensor:
        hidden: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
        # Prompts, which the mask does not cover, are on the left. Padding is on the right; some
        # models add more of it.
        tokens = self._inputs["attention_mask"].shape[1]
        prompts = hidden.shape[1] - tokens if self._prompted else 0
        if not self.reads_last:
            return hidden[:, 0].float()
        last = self.read_positions(self._inputs) + prompts
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last].float()

    def _stoppable(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._stopping:
                raise _ReachedError(LayerInput(hidden_states, args, kwargs))
            return forward(hidden_states, *args, **kwargs)

        return run


class _ReachedError(Exception):
    """Ends a pass at the end of the trunk and carries its output; not an error."""

    def __init__(self, entering: LayerInput) -> None:
        super().__init__()
        self.entering = entering
