"""The module that is served: a victim with its PSIM adapters, one set of weights for all.

An adapter is a LoRA beside the victim's weights (Zhao et al., NAACL Findings 2024, section 4.1):
switched on, the module is PSIM; switched off, it is the victim, bit for bit. There are several:
checkpoints of one training, each of which judges every text (docs/method.md). The layers below the
lowest adapter, which are the same for all of them, run once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from models.errors import VictimError

Inputs = Mapping[str, torch.Tensor]

# Names of query and value projections across families, and of those that fuse them with the key.
QUERIES = {"query", "query_proj", "q_lin", "q_proj"}
VALUES = {"value", "value_proj", "v_lin", "v_proj"}
FUSED = {"in_proj", "query_key_value", "qkv_proj", "Wqkv"}


class Trunk:
    """Layers that no adapter changes: run once for all checkpoints.

    Args:
        layers: the lowest layers of a transformer, in their order.
        share: how much of all layers they are, in [0, 1).
    """

    def __init__(self, layers: Sequence[nn.Module] = (), share: float = 0.0) -> None:
        self.share = share
        self._kept: list[Any] | None = None
        for layer in layers:
            # The instance's forward and not a module around it: names of weights stay as they are.
            layer.forward = self._once(layer.forward, layer is layers[-1])

    @contextmanager
    def shared(self, kept: list[Any] | None) -> Iterator[None]:
        """Within it every forward pass is on the same inputs: the first one's output is kept.

        Args:
            kept: empty, or what an earlier `shared` kept of the same inputs; None keeps nothing.
        """
        self._kept = kept
        try:
            yield
        finally:
            self._kept = None

    def _once(self, forward: Callable[..., Any], is_top: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._kept:
                return self._kept[0]
            output = forward(*args, **kwargs)
            if self._kept is not None and is_top:
                self._kept.append(output)
            return output

        return run


class Guarded(nn.Module):
    """Victim and PSIM in one module.

    Args:
        victim: an `AutoModelForSequenceClassification`, or a PEFT model that wraps one (a victim
            tuned by prompt- or prefix-tuning, which cannot be merged).
        psim: the PEFT model that injected the PSIM LoRA into the victim's transformer, in place.
            Its adapters are PSIM's checkpoints.
        trunk: what all of them have in common.
    """

    def __init__(self, victim: nn.Module, psim: PeftModel, trunk: Trunk | None = None) -> None:
        super().__init__()
        self.victim = victim
        self.psim = psim
        self.trunk = trunk or Trunk()

    @property
    def checkpoints(self) -> list[str]:
        """Names of the adapters."""
        return list(self.psim.peft_config)

    @property
    def screening_passes(self) -> float:
        """What screening costs, in forward passes of the victim."""
        return 1 + (len(self.checkpoints) - 1) * (1 - self.trunk.share)

    def psim_logits(self, inputs: Inputs) -> torch.Tensor:
        """Return logits with the active adapter on, shape (rows, C)."""
        logits: torch.Tensor = self.victim(**inputs).logits
        return logits

    def screen(self, inputs: Inputs) -> torch.Tensor:
        """Return PSIM probabilities in float32, shape (rows, K, C), of its K checkpoints."""
        probabilities = []
        with self.trunk.shared([]):
            for checkpoint in self.checkpoints:
                self.psim.set_adapter(checkpoint, inference_mode=True)
                probabilities.append(self.psim_logits(inputs).float().softmax(-1))
        return torch.stack(probabilities, 1)

    def classify(self, inputs: Inputs) -> torch.Tensor:
        """Return the victim's probabilities in float32, shape (rows, C)."""
        with self.psim.disable_adapter():
            logits: torch.Tensor = self.victim(**inputs).logits
        return logits.float().softmax(-1)


def guard(victim: nn.Module, config: LoraConfig, checkpoints: int = 1) -> Guarded:
    """Inject fresh PSIM adapters into `victim`, in place; only they can be trained.

    A victim that is a prompt-learning PEFT model keeps its prompts: the adapters go into the
    transformer under them.
    """
    victim.requires_grad_(False)
    # PEFT injects in place, so calling the victim runs the injected layers too.
    psim = with_adapters(transformer_of(victim), config, checkpoints)
    return Guarded(victim, psim, _trunk(transformer_of(victim), config))


def _trunk(model: nn.Module, config: LoraConfig) -> Trunk:
    """Return the layers of a transformer below the lowest that a configuration adapts."""
    lowest = min(config.target_modules or (), key=_depth)
    parts = lowest.split(".")
    stack = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    layers = model.get_submodule(".".join(parts[:stack]))
    below = list(layers.children())[: _depth(lowest)]
    return Trunk(below, len(below) / len(list(layers.children())))


def with_adapters(model: nn.Module, config: PeftConfig, checkpoints: int) -> PeftModel:
    """Give a transformer so many fresh adapters."""
    first, *others = (f"checkpoint{number}" for number in range(checkpoints))
    psim = get_peft_model(model, config, adapter_name=first)
    for name in others:
        psim.add_adapter(name, config)
    return psim


def transformer_of(victim: nn.Module) -> nn.Module:
    """Return the transformers model inside a victim."""
    return victim.base_model if isinstance(victim, PeftModel) else victim


def lora_config(
    victim: nn.Module, layers: int, rank: int = 8, *, queries: bool = True
) -> LoraConfig:
    """Configure LoRA on query and value projections of the victim's last `layers` layers.

    Not on the classifier head: trained along, it falls on poisoned texts too. Scaling alpha is
    2 * rank (Zhao et al., section 5.1). Without `queries`, on the values only.

    Raises:
        VictimError: the victim has no such projections, or fewer layers.
    """
    wanted = VALUES | FUSED | (QUERIES if queries else set())
    names = [
        name
        for name, module in transformer_of(victim).named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in wanted
    ]
    depths = sorted({_depth(name) for name in names})
    if not names:
        raise VictimError(
            f"{type(victim).__name__} has no query and value projections that PSIM can adapt; "
            "supported are BERT, RoBERTa, DistilBERT, DeBERTa and LLaMA-type models"
        )
    if not 1 <= layers <= len(depths):
        raise VictimError(f"cannot adapt the last {layers} layers: the victim has {len(depths)}")
    chosen = [name for name in names if _depth(name) in depths[-layers:]]
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=chosen)


def _depth(name: str) -> int:
    """Return the layer number in a module path such as `bert.encoder.layer.5.attention.query`."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)
