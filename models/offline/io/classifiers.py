"""Loading and saving untrusted classifiers: safetensors only, no foreign code."""

import copy
import logging
from pathlib import Path
from typing import Any

import peft
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from models.bundle.digests import hash_files, tree_digest
from models.bundle.layout import ADAPTER_WEIGHTS
from models.engines.pytorch import max_input_length
from models.errors import VictimError
from models.network.adapters import transformer_of
from models.network.last_token import fix_last_token
from models.network.outputs import is_multi_label

FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
"""Patterns of the files that are fetched from the hub, if a whole folder is."""
BASE = "base"
"""Subfolder of a prompt-type victim: the model that its prompts are for."""


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
        victim: nn.Module
        if find_adapter_config_file(source) is not None:
            victim, tokenizer = _load_adapted(
                folder if folder.is_dir() else Path(snapshot_download(source, allow_patterns=FILES))
            )
        else:
            victim, missing = _load_model(source, labels and _in_order_of(source, labels))
            if labels is None and missing:
                raise VictimError(f"{source} is no trained classifier: no weights for {missing}")
            tokenizer = _load_tokenizer(source)
        # A decoder skips this token when it looks for the last one of a text.
        model: Any = transformer_of(victim)
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        fix_last_token(model)
        return victim, tokenizer
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


def _load_model(source: str, labels: list[str] | None) -> tuple[PreTrainedModel, list[str]]:
    """Return the model, and the names of weights that it needs and does not have."""
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
    return model.eval(), sorted(report["missing_keys"])


def _in_order_of(source: str, labels: list[str]) -> list[str]:
    """Return `labels` in the model's own order where it has the same: its head is trained for it.

    Raises:
        VictimError: the model is a trained classifier for other labels.
    """
    own = _config_labels(source)
    if sorted(own) == sorted(labels):
        return own
    anonymous = own == [f"LABEL_{i}" for i in range(len(own))]
    if not anonymous:
        raise VictimError(f"{source} is a classifier for {own}, not for the labels {labels}")
    return labels


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
    if tokenizer.pad_token is None:
        raise VictimError(f"the tokenizer of {source} has no token to pad with; set its pad_token")
    return tokenizer


def _load_adapted(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise VictimError(f"{folder} has no {ADAPTER_WEIGHTS}; pickles are not loaded")
    config = peft.PeftConfig.from_pretrained(str(folder))
    if config.task_type != "SEQ_CLS":
        raise VictimError(f"{folder} is not an adapter for sequence classification (SEQ_CLS)")
    beside = (folder / BASE).is_dir()
    base = str(folder / BASE) if beside else str(config.base_model_name_or_path or "")
    # The adapter's own class names, if it has a config, else those of its base.
    labelled = str(folder) if (folder / "config.json").is_file() else base
    model, missing = _load_model(base, _config_labels(labelled))
    with safe_open(weights, "pt") as adapter:
        saved = list(adapter.keys())
    if absent := [name for name in missing if not any(k.endswith(f".{name}") for k in saved)]:
        raise VictimError(f"neither {folder} nor its base has weights for {absent}")
    adapted = peft.PeftModel.from_pretrained(model, str(folder))
    if not adapted.active_peft_config.is_prompt_learning:
        adapted = adapted.merge_and_unload()
    tokenizer = _load_tokenizer(str(folder) if (folder / "tokenizer.json").exists() else base)
    victim: nn.Module = adapted.eval()
    return victim, tokenizer


def _config_labels(source: str) -> list[str]:
    """Return the class names in a model's config."""
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def pretrained_model(victim: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a victim.

    Raises:
        VictimError: there is none.
    """
    model = transformer_of(victim)
    if not isinstance(model, PreTrainedModel):
        raise VictimError(f"the victim is a {type(model).__name__}, not a transformers classifier")
    return model


def labels_of(victim: nn.Module) -> list[str]:
    """Return the names of a victim's labels, in their order.

    Raises:
        VictimError: it is no classifier.
    """
    config: Any = pretrained_model(victim).config
    if config.num_labels < 2 and not is_multi_label(config):
        raise VictimError(
            "the victim has a single output, which transformers takes for regression, and PSIM "
            "guards classifiers. If it is a classifier with one label, on or off by a sigmoid, "
            'write "problem_type": "multi_label_classification" into its config.json'
        )
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def max_length_of(victim: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens of a text a victim reads; its prompts take positions too."""
    virtual = 0
    if isinstance(victim, peft.PeftModel):
        virtual = int(getattr(victim.active_peft_config, "num_virtual_tokens", 0) or 0)
    return max_input_length(pretrained_model(victim).config, tokenizer, virtual)


def model_digest(source: str) -> str:
    """Return a digest of a model's files, in a folder or on the hub.

    Raises:
        VictimError: no such model.
    """
    try:
        folder = (
            source if Path(source).is_dir() else snapshot_download(source, allow_patterns=FILES)
        )
    except (OSError, ValueError) as error:
        raise VictimError(f"{source}: {_why(Path(source), error)}") from error
    return tree_digest(hash_files(Path(folder)))


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
