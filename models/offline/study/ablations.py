"""Variants of PSIM's training that a study compares; a bundle is never made by them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel, PromptEncoderConfig
from pydantic import ConfigDict
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from models.engines.pytorch import TorchEngine
from models.errors import VictimError
from models.network.adapters import QUERIES, lora_config, with_adapters
from models.network.guarded import Guarded, guard
from models.network.trunk import Inputs
from models.offline.fitting.fit import train_detectors
from models.offline.fitting.psim import PsimConfig, Training, reset_loss
from models.offline.fitting.split import Split
from models.offline.io.classifiers import pretrained_model, short_length_of

PROMPT_TOKENS = 5


@dataclass(frozen=True)
class PsimVariant(PsimConfig):
    """PSIM's hyperparameters, and switches whose defaults are what `psim fit` does."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # a misspelt name in a recipe is an error

    labels: Literal["uniform", "drawn"] = "uniform"
    """Label reset: the average of random labels, or one drawn for each text of each batch."""
    adapter: Literal["query-value", "value", "prompt-encoder"] = "query-value"
    """LoRA on these projections, or the prompt encoder of the authors' code."""
    head: Literal["frozen", "trained"] = "frozen"
    """Whether the classifier head is trained along; a prompt encoder always trains it."""


def train_variant(
    victim: nn.Module, tokenizer: PreTrainedTokenizerBase, split: Split, variant: PsimVariant
) -> tuple[TorchEngine, Training]:
    """Fit both detectors on the victim, as `fit.train` does, but in the way of a variant.

    Raises:
        VictimError: the victim cannot be guarded.
    """
    torch.manual_seed(variant.seed)
    guarded = with_variant(victim, variant)
    length = short_length_of(victim, tokenizer)
    if variant.adapter == "prompt-encoder":
        length -= PROMPT_TOKENS
    engine = TorchEngine(guarded, tokenizer, length)
    return engine, train_detectors(engine, split, variant, LOSSES[variant.labels])


def with_variant(victim: nn.Module, variant: PsimVariant) -> Guarded:
    """Give a victim the fresh adapters of a variant.

    Raises:
        VictimError: the victim cannot carry them.
    """
    if variant.adapter == "prompt-encoder":
        return _with_prompts(victim, len(variant.keep_at))
    lora = lora_config(victim, variant.layers, variant.rank)
    if variant.adapter == "value":
        names = lora.target_modules or ()
        lora.target_modules = [n for n in names if n.rsplit(".", 1)[-1] not in QUERIES]
    if variant.head == "trained":
        lora.modules_to_save = _heads(victim)
    return guard(victim, lora, len(variant.keep_at))


def _with_prompts(victim: nn.Module, checkpoints: int) -> Guarded:
    if isinstance(victim, PeftModel):
        raise VictimError("the victim has prompts of its own: no prompt encoder goes before it")
    victim.requires_grad_(False)
    prompts = PromptEncoderConfig(  # sizes of Zhao et al., section 5.1
        task_type="SEQ_CLS", num_virtual_tokens=PROMPT_TOKENS, encoder_hidden_size=128
    )
    return Prompted(victim, with_adapters(victim, prompts, checkpoints))


class Prompted(Guarded):
    """A victim with prompts as its PSIM adapter; it can only screen, not classify."""

    def psim_logits(self, inputs: Inputs) -> torch.Tensor:
        """Return logits with the active prompts before the text, shape (rows, C)."""
        logits: torch.Tensor = self.psim(**inputs).logits
        return logits


def _heads(victim: nn.Module) -> list[str]:
    """Return the names of the modules on top of the transformer proper."""
    model = pretrained_model(victim)
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and next(module.parameters(), None) is not None
    ]


def drawn_loss(logits: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of logits, shape (rows, C), against labels drawn at random."""
    return cross_entropy(logits, torch.randint_like(logits[:, 0], logits.shape[1]).long())


LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "uniform": reset_loss,
    "drawn": drawn_loss,
}
