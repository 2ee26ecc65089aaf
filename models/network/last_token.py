"""Decoders classify by a text's last token."""

from typing import Any

import torch
from torch import nn

OTHER_DECODERS = ("ctrl", "modernbert-decoder")
"""Model types whose head reads the last token and is called `classifier`."""


def last_positions(mask: torch.Tensor) -> torch.Tensor:
    """Return the position of each row's last token, shape (rows,), given a mask (rows, T)."""
    return mask.long().cumsum(1).argmax(1)


def reads_last_token(model: nn.Module) -> bool:
    """Return whether a classifier reads the last token and not the first."""
    return _head(model) is not None


def _head(model: nn.Module) -> str | None:
    """Return the name of the head that reads the last token; None if another one is read."""
    if hasattr(model, "score"):  # transformers calls it so, but for a few
        return "score"
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    return "classifier" if model_type in OTHER_DECODERS else None


def fix_last_token(model: nn.Module) -> None:
    """Make a decoder classify by a text's last token behind prompts too.

    Given embeddings instead of token ids, as PEFT gives them behind prompts, transformers takes the
    last position of the batch, which is padding in all but the longest text.
    """
    head = _head(model)
    if head is None:
        return
    seen: dict[str, torch.Tensor] = {}

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.clear()
        if kwargs.get("inputs_embeds") is not None and kwargs.get("attention_mask") is not None:
            seen["mask"] = kwargs["attention_mask"]

    def pick(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        (hidden,) = args
        if "mask" not in seen or hidden.shape[1] == 1:
            return None
        last = last_positions(seen["mask"])
        return (hidden[torch.arange(hidden.shape[0], device=hidden.device), last][:, None],)

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.get_submodule(head).register_forward_pre_hook(pick)
