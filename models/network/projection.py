"""What makes queries, keys or values, as it is and with each of several adapters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Projection:
    """A linear layer, or the part of one that makes queries, keys or values among others."""

    module: nn.Module
    part: int = 0
    parts: int = 1
    """How many equal parts its outputs have; this is number `part`, from 0."""

    @property
    def weight(self) -> torch.Tensor:
        """Weight without adapters, shape (out, in)."""
        base = self._base
        weight: torch.Tensor = base.weight.T if isinstance(base, Conv1D) else base.weight
        return weight.chunk(self.parts)[self.part]

    @property
    def bias(self) -> torch.Tensor | None:
        """Bias, shape (out,)."""
        bias: torch.Tensor | None = self._base.bias
        return None if bias is None else bias.chunk(self.parts)[self.part]

    @property
    def is_adapted(self) -> bool:
        """Whether there are adapters on it."""
        return isinstance(self.module, LoraLayer)

    @property
    def _base(self) -> Any:
        module: Any = self.module
        return module.get_base_layer() if self.is_adapted else module

    def adapters(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A, shape (len(names), r, in), and scaled B, (len(names), out, r)."""
        module: Any = self.module
        # Not kept from call to call: they may be trained, converted or loaded in between.
        a = torch.stack([module.lora_A[name].weight for name in names])
        b = torch.stack([module.lora_B[name].weight.chunk(self.parts)[self.part] for name in names])
        return a, b * b.new_tensor([module.scaling[name] for name in names])[:, None, None]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the projection of x, (..., in), without adapters, shape (..., out)."""
        return nn.functional.linear(x, self.weight, self.bias)

    def by_branch(self, x: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """Return the projection of x, (..., in), with each adapter and last without any.

        The shape is (..., len(names) + 1, out), or (..., 1, out) where all branches are the same.
        """
        bare = self(x)[..., None, :]
        if not (names and self.is_adapted):
            return bare
        a, b = self.adapters(names)
        low = torch.unflatten(x @ a.flatten(0, 1).T, -1, a.shape[:2])
        return bare + and_none(torch.einsum("...nj,noj->...no", low, b), -2)


def and_none(added: torch.Tensor, branches: int) -> torch.Tensor:
    """Append zeros for the branch without an adapter, along a negative dimension."""
    return nn.functional.pad(added, (0, 0) * (-branches - 1) + (0, 1))
