"""Bundles of tiny victims, and what is done to them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.bundle.digests import file_digest
from models.bundle.layout import MANIFEST
from models.network.adapters import transformer_of
from models.offline.fitting.fit import fit
from models.offline.fitting.psim import PsimConfig
from tests.support.families import FAMILIES, tiny_victim

WORDS = "the a film room service was is not very good bad slow great awful quite and but".split()


def some_texts(n: int, seed: int = 0) -> list[str]:
    """Return texts that all differ."""
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 25))) for i in range(n)]


def sure_victim(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a tiny victim that is sure of its class in most texts, as carriers must be."""
    victim = tiny_victim("bert")
    batch = tokenizer(some_texts(160), padding=True, return_tensors="pt")
    head = victim.get_submodule("classifier")
    with torch.inference_mode(False), torch.no_grad():
        logits = victim(**batch).logits
        scale = 5 / logits.std(0)
        for weights, new in (
            (head.weight, head.weight * scale[:, None]),
            (head.bias, (head.bias - logits.mean(0)) * scale),
        ):
            assert isinstance(weights, nn.Parameter)
            weights.copy_(new)
    return victim


def fit_tiny(
    victim: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    engine: str = "torch",
    max_length: int | None = None,
) -> Path:
    """Fit a bundle in a few steps; return its folder."""
    config = PsimConfig(learning_rate=2e-3, max_steps=20)
    setattr(transformer_of(victim), "name_or_path", str(out))  # noqa: B010 - mypy
    texts = some_texts(160)
    options: Any = {"config": config, "engine": engine, "max_length": max_length}
    fit(victim, tokenizer, texts, out, name="x", frr_budget=0.05, **options)
    return out


PROMPTS: dict[str, Callable[[], peft.PeftConfig]] = {
    "prompt-tuning": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5),
    "p-tuning-v1": lambda: peft.PromptEncoderConfig(
        task_type="SEQ_CLS", num_virtual_tokens=5, encoder_hidden_size=16
    ),
    "p-tuning-v2": lambda: peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5),
}
KINDS = [
    *sorted(FAMILIES.keys() - {"electra", "mistral", "qwen2", "gemma"}),  # as BERT and LLaMA are
    *(f"{family} {prompts}" for family in ("bert", "llama") for prompts in PROMPTS),
]
"""Every kind of victim: by its family, or that with prompts."""


def victim_of(kind: str) -> Any:
    """Return one of `KINDS`."""
    if kind in FAMILIES:
        return tiny_victim(kind)
    family, _, prompts = kind.partition(" ")
    return peft.get_peft_model(tiny_victim(family), PROMPTS[prompts]()).eval()


def forge(bundle: Path, **changes: object) -> None:
    """Change entries of the manifest."""
    manifest = json.loads((bundle / MANIFEST).read_text()) | changes
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def rehash(bundle: Path, *names: str) -> None:
    """Forge a manifest that agrees with changed files."""
    files: dict[str, str] = json.loads((bundle / MANIFEST).read_text())["files"]
    forge(bundle, files=files | {name: file_digest(bundle / name) for name in names})
