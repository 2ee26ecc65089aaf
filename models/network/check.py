"""Check of a victim that was just guarded: whether everything holds that screening relies on.

Families differ in ways that their module names do not show. A victim that breaks a rule is refused
with a reason, instead of being served with wrong labels or a screen that sees nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig
from torch import nn

from models.errors import VictimError
from models.network.adapters import transformer_of
from models.network.guarded import Guarded, guard
from models.network.last_token import fix_last_token
from models.network.trunk import Inputs

TOLERANCE = 1e-3
"""Difference that rounding may make, relative to the largest logit."""


def guard_checked(
    victim: nn.Module, config: LoraConfig, checkpoints: int, inputs: Inputs
) -> Guarded:
    """Inject fresh PSIM adapters into `victim`, in place, and check it with some inputs.

    Args:
        victim: the classifier, still as it was.
        config: of the adapters.
        checkpoints: how many of them.
        inputs: texts of different lengths, two at least.

    Raises:
        VictimError: the victim does not give scores that can be relied on, or its adapters change
            nothing, or cannot be trained.
    """
    model = transformer_of(victim)
    fix_last_token(model)
    name = type(model).__name__
    bare = _scores(name, victim, inputs)
    if not bare.isfinite().all():
        return guard(victim, config, checkpoints)  # training says what is wrong
    if not _same(bare, _scores(name, victim, inputs)):
        raise VictimError(f"{name} gives the same text other scores each time")
    guarded = guard(victim, config, checkpoints)
    with guarded.psim.disable_adapter():
        if not _same(_scores(name, victim, inputs), bare):
            raise VictimError(f"{name} gives other scores once it carries adapters")
    with _moved(guarded):
        _check_adapters(name, guarded, inputs, bare)
    return guarded


def _scores(name: str, victim: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Return the victim's logits, shape (rows, C)."""
    try:
        with torch.no_grad():
            logits: torch.Tensor = victim.eval()(**inputs).logits
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise VictimError(f"{name} cannot read plain texts: {reason}") from error
    if logits.dim() != 2:
        raise VictimError(f"{name} gives scores of shape {tuple(logits.shape)}, not one per class")
    return logits


def _check_adapters(name: str, guarded: Guarded, inputs: Inputs, bare: torch.Tensor) -> None:
    with torch.no_grad():
        screened = guarded.run(inputs).logits
        passes = []
        for checkpoint in guarded.checkpoints:
            guarded.psim.set_adapter(checkpoint)
            passes.append(guarded.psim_logits(inputs))
    if not _same(screened, torch.stack(passes, 1)):
        raise VictimError(f"{name} cannot share its lower layers between passes")
    if torch.equal(passes[-1], bare):
        first, *_, last = inputs["input_ids"]
        if not torch.equal(first, last) and torch.equal(bare[0], bare[-1]):
            raise VictimError("the victim's scores are the same for all texts")
        raise VictimError(f"{name} cannot be guarded: adapters on its last layers change no score")
    trained = [weights for weights in guarded.parameters() if weights.requires_grad]
    try:
        total = guarded.training_logits(inputs).sum()
        gradients = torch.autograd.grad(total, trained, allow_unused=True)
    except RuntimeError as error:
        raise VictimError(f"{name} cannot be guarded: its adapters cannot be trained") from error
    if not any(gradient is not None and gradient.any() for gradient in gradients):
        raise VictimError(f"{name} cannot be guarded: its adapters get no gradients")


@contextmanager
def _moved(guarded: Guarded) -> Iterator[None]:
    """Within it, the fresh adapters change something; random generators stay as they are."""
    generator = torch.Generator().manual_seed(0)
    fresh = [p for name, p in guarded.psim.named_parameters() if ".lora_B." in name]
    with torch.no_grad():
        for weights in fresh:
            weights.copy_(torch.randn(weights.shape, generator=generator) / 2)
    try:
        yield
    finally:
        with torch.no_grad():
            for weights in fresh:
                weights.zero_()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether logits agree but for rounding."""
    return bool(((a - b).abs() <= TOLERANCE * b.abs().max().clamp(min=1e-3)).all())
