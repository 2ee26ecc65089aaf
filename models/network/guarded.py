"""The module that is served: a victim with its PSIM adapters, one set of weights for both.

An adapter is a LoRA beside the victim's weights (Zhao et al., NAACL Findings 2024, section 4.1).
With an adapter on, the module is PSIM; with all of them off it is the victim, bit for bit. The
adapters are checkpoints of one training, each of which judges every text (docs/method.md). The
layers below the lowest adapter are the same for all of them and run once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from models.detection.screen import Layout
from models.detection.views import Views, views_of
from models.network.activations import Activations, Run, to_readings
from models.network.adapters import (
    layer_number,
    layer_stack,
    transformer_of,
    with_adapters,
)
from models.network.families import last_layer_of
from models.network.last_layer import LastLayer, LayerOutput, attention_peak
from models.network.last_token import fix_last_token, reads_last_token
from models.network.outputs import is_multi_label, label_probabilities
from models.network.trunk import Inputs, Trunk


class Guarded(nn.Module):
    """Victim and PSIM in one module.

    Args:
        victim: an `AutoModelForSequenceClassification`, or a PEFT model that wraps one (a victim
            tuned by prompt- or prefix-tuning, which cannot be merged).
        psim: the PEFT model that injected the PSIM LoRA into the victim's transformer, in place.
            Its adapters are PSIM's checkpoints.
        trunk: the layers that all of them share.
        last_layer: the last layer for the token that is read, where only that layer is adapted and
            its family is known; else every checkpoint runs whole layers.
    """

    def __init__(
        self,
        victim: nn.Module,
        psim: PeftModel,
        trunk: Trunk | None = None,
        last_layer: LastLayer | None = None,
    ) -> None:
        super().__init__()
        self.victim = victim
        self.psim = psim
        self.trunk = trunk or Trunk()
        self.last_layer = last_layer
        self.activations: Activations | None = None
        """The activation detector, once it is fitted."""
        self._untrained: frozenset[str] = frozenset()

    @property
    def config(self) -> Any:
        """The victim's transformers configuration."""
        return self.psim.get_base_model().config

    @property
    def hidden_size(self) -> int:
        """Size of the hidden states."""
        return int(self.config.get_text_config().hidden_size)

    @property
    def multi_label(self) -> bool:
        """Whether the victim gives any number of labels, each by a sigmoid."""
        return is_multi_label(self.config)

    @property
    def views(self) -> Views:
        """The victim's classes, see `models.detection.views`."""
        return views_of(self.config.num_labels, multi_label=self.multi_label)

    @property
    def checkpoints(self) -> list[str]:
        """Names of the adapters."""
        return list(self.psim.peft_config)

    @property
    def forward_passes(self) -> float:
        """Cost of screening and classifying a text, in forward passes of the victim.

        Distances cost next to nothing, and so does `LastLayer`: less than the layer it replaces.
        """
        if self.last_layer is not None:
            return 1.0
        screening = 1 + (len(self.checkpoints) - 1) * (1 - self.trunk.share)
        return screening if self._untrained else 1 + screening

    @property
    def layout(self) -> Layout:
        """Which of the V readings are whose."""
        return Layout(len(self.checkpoints), attention=self.last_layer is not None)

    @property
    def is_traceable(self) -> bool:
        """Whether a graph of `run` can replace it."""
        return self.last_layer is not None

    def reuse_untrained(self) -> None:
        """Take what an adapter whose B are zero says for what the victim says, which it is.

        PSIM's first checkpoint is from before its training. Call this when training is over.
        """
        adapted = [(name, w) for name, w in self.psim.named_parameters() if ".lora_B." in name]
        zero = {name: not weights.any() for name, weights in adapted}
        self._untrained = frozenset(
            adapter
            for adapter in self.checkpoints
            if {zero[name] for name in zero if f".lora_B.{adapter}." in name} == {True}
        )

    def screen(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return readings, shape (rows, V, C), and what `classify` would, both in float32.

        The V readings are features of the detectors: first PSIM's probabilities by checkpoint
        (K), then the distances of hidden states to the classes by watched layer (none while they
        are not fitted), and last the peak of attention (none without a `last_layer`). The second
        value is None if the victim's own answer would take another pass.
        """
        run, multi_label = self.run(inputs), self.multi_label
        own = None if run.own is None else label_probabilities(run.own, multi_label=multi_label)
        return to_readings(run, self.activations, multi_label=multi_label), own

    def run(self, inputs: Inputs) -> Run:
        """Run the part of `screen` that is in the victim's dtype, and that other engines trace."""
        with self.trunk.watching(inputs) as states:
            if self.last_layer is not None:
                return self._run_last_layer(self.last_layer, inputs, states)
            return Run(*self._run_whole_passes(inputs), None, states)

    def _run_last_layer(
        self, last_layer: LastLayer, inputs: Inputs, states: Sequence[torch.Tensor]
    ) -> Run:
        trained = [name for name in self.checkpoints if name not in self._untrained]
        mask, (rows, attention) = self._read_token(last_layer, inputs, trained)
        logits = last_layer.head(rows.flatten(0, 1)).view(*rows.shape[:2], -1)
        *by_adapter, own = logits.unbind(1)
        found = dict(zip(trained, by_adapter, strict=True))
        by_checkpoint = torch.stack([found.get(name, own) for name in self.checkpoints], 1)
        return Run(by_checkpoint, own, attention_peak(attention, mask), states)

    def _read_token(
        self, last_layer: LastLayer, inputs: Inputs, checkpoints: Sequence[str]
    ) -> tuple[torch.Tensor, LayerOutput]:
        """Return which tokens the read one attends to, shape (rows, T), and what it becomes."""
        entering = self.trunk.output(lambda: self.victim(**inputs))
        read = self.trunk.read_positions(inputs)
        mask = self.trunk.read_mask(inputs, read)
        return mask, last_layer(entering, mask, read, checkpoints)

    def _run_whole_passes(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits by checkpoint, and the victim's own if one of them is the victim."""
        logits, own = [], None
        with self.trunk.shared([]):
            for checkpoint in self.checkpoints:
                self.psim.set_adapter(checkpoint, inference_mode=True)
                logits.append(self.psim_logits(inputs))
                if checkpoint in self._untrained:
                    own = logits[-1]
        return torch.stack(logits, 1), own

    def psim_logits(self, inputs: Inputs) -> torch.Tensor:
        """Return logits with the active adapter on, shape (rows, L), from whole layers."""
        logits: torch.Tensor = self.victim(**inputs).logits
        return logits

    def training_logits(self, inputs: Inputs) -> torch.Tensor:
        """Return what `psim_logits` does but for rounding; by the `last_layer`, if there is one."""
        if self.last_layer is None:
            return self.psim_logits(inputs)
        _, (rows, _) = self._read_token(self.last_layer, inputs, [self.psim.active_adapter])
        return self.last_layer.head(rows[:, 0])

    def classify(self, inputs: Inputs) -> torch.Tensor:
        """Return the victim's probability of each label in float32, shape (rows, L)."""
        with self.psim.disable_adapter():
            logits: torch.Tensor = self.victim(**inputs).logits
        return label_probabilities(logits, multi_label=self.multi_label)

    def states(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return watched hidden states, shape (rows, N, D), and the victim's logits, (rows, L)."""
        with self.trunk.watching(inputs) as states, self.psim.disable_adapter():
            logits: torch.Tensor = self.victim(**inputs).logits
        return torch.stack(states, 1), logits


def guard(victim: nn.Module, config: LoraConfig, checkpoints: int = 1) -> Guarded:
    """Inject fresh PSIM adapters into `victim`, in place; only they can be trained.

    A victim that is a prompt-learning PEFT model keeps its prompts: the adapters go into the
    transformer under them.
    """
    victim.requires_grad_(False)
    model = transformer_of(victim)
    fix_last_token(model)
    # PEFT injects in place, so calling the victim runs the injected layers too.
    psim = with_adapters(model, config, checkpoints)
    stack, trunk = _trunk(victim, config)
    only_top = trunk.length == len(stack) - 1 and not config.modules_to_save
    # Prompts are embeddings, or keys and values, which `LastLayer` does not handle.
    last_layer = last_layer_of(model) if only_top and not isinstance(victim, PeftModel) else None
    guarded = Guarded(victim, psim, trunk, last_layer)
    if last_layer is not None:
        guarded.config.use_cache = False  # a decoder would fill it in vain
    return guarded


def _trunk(victim: nn.Module, config: LoraConfig) -> tuple[list[nn.Module], Trunk]:
    """Return all layers of a transformer, and those below the lowest adapted one as a trunk."""
    model = transformer_of(victim)
    layers = layer_stack(model)
    (lowest, *_) = min(map(layer_number, config.target_modules or ())) if layers else (0,)
    prompted, own = isinstance(victim, PeftModel), getattr(model, "config", None)
    trunk = Trunk(
        layers,
        lowest,
        reads_last=reads_last_token(model),
        prompted=prompted,
        # Behind prompts, it sees no tokens: see `fix_last_token`.
        pad_id=None if prompted or own is None else own.get_text_config().pad_token_id,
        windowed=getattr(own, "sliding_window", None) is not None,
    )
    return layers, trunk
