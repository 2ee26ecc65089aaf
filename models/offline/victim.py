"""Loading and saving classifiers that nobody vouches for: safetensors only, no foreign code."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import peft
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from models.errors import VictimError

ADAPTER_CONFIG = "adapter_config.json"
BASE = "base"
"""Folder, inside that of a prompt-type victim, of the model that its prompts are for."""


def load_classifier(
    source: str, labels: list[str] | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a sequence classifier, or base + PEFT adapter, and its tokenizer.

    LoRA adapters are merged; a victim with prompts stays a PEFT model.

    Args:
        source: folder or hub id.
        labels: names of the classes, for a model whose head is to be trained; None keeps the
            model's own, and then its head must be there.

    Raises:
        VictimError: no model there, pickled weights only, foreign code, missing weights, or an
            adapter that does not fit its base.
    """
    folder = Path(source)
    try:
        if (folder / ADAPTER_CONFIG).is_file():
            return _load_adapted(folder)
        return _load_model(source, labels), _load_tokenizer(source)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise VictimError(f"{source}: {_why(folder, error)}") from error


def _why(folder: Path, error: Exception) -> str:
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            return "has pickled weights only, which can run code; convert them to safetensors"
        return "holds no model: there is no *.safetensors file"
    if not folder.exists() and ("/" not in str(folder).strip("/") or folder.is_absolute()):
        return "no such folder"
    return f"the model cannot be loaded: {error}"


def _load_model(source: str, labels: list[str] | None) -> PreTrainedModel:
    names = {} if labels is None else _label_maps(labels)
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)  # a fresh head is reported at length
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source,
            use_safetensors=True,
            trust_remote_code=False,
            dtype="float32",
            output_loading_info=True,
            **names,
        )
    finally:
        transformers.logging.set_verbosity(before)
    if labels is None and report["missing_keys"]:
        missing = sorted(report["missing_keys"])[:3]
        raise VictimError(f"{source} is not a trained classifier: no weights for {missing}")
    loaded: PreTrainedModel = model.eval()
    return loaded


def _label_maps(labels: list[str]) -> dict[str, object]:
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        source, trust_remote_code=False
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_adapted(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = str(config.get("base_model_name_or_path") or "")
    if (folder / BASE).is_dir():
        base = str(folder / BASE)
    if not (folder / "adapter_model.safetensors").is_file():
        raise VictimError(f"{folder} has no adapter_model.safetensors; pickles are not loaded")
    model = _load_model(base, _labels_of(folder, base))
    adapted = peft.PeftModel.from_pretrained(model, str(folder))
    if not adapted.active_peft_config.is_prompt_learning:
        adapted = adapted.merge_and_unload()
    tokenizer = _load_tokenizer(str(folder) if (folder / "tokenizer.json").exists() else base)
    victim: nn.Module = adapted.eval()
    return victim, tokenizer


def _labels_of(folder: Path, base: str) -> list[str]:
    """Return the class names: of the adapter's own config.json, if it has one, else the base's."""
    source = folder if (folder / "config.json").is_file() else Path(base)
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def save_classifier(model: Any, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write a classifier to `out` so that `load_classifier(out)` gives the same scores.

    LoRA is merged first; a prompt-type victim is saved as a PEFT adapter with its base beside it.
    """
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(model, peft.PeftModel) and model.active_peft_config.is_prompt_learning:
        model.active_peft_config.base_model_name_or_path = BASE
        model.save_pretrained(str(out), save_embedding_layers=False)
        base: Any = model.get_base_model()
        weights = {
            name.replace(".original_module.", "."): tensor
            for name, tensor in base.state_dict().items()
            if ".modules_to_save." not in name
        }
        base.save_pretrained(out / BASE, state_dict=weights)
        tokenizer.save_pretrained(out / BASE)
    else:
        # Merging a copy: the model that was given stays usable.
        lora = isinstance(model, peft.PeftModel)
        merged: Any = copy.deepcopy(model).merge_and_unload() if lora else model
        merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
