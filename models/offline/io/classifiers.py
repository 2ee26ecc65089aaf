"""Loading and saving untrusted classifiers: safetensors only, no foreign code."""

import copy
import hashlib
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
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
from models.engines.pytorch import SHORT_INPUT, max_input_length
from models.errors import VictimError
from models.network.adapters import transformer_of
from models.network.last_token import fix_last_token
from models.network.outputs import is_multi_label
from models.offline.io.samples import class_name

FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
"""Patterns of the files that are fetched from the hub, if a whole folder is."""
BASE = "base"
"""Subfolder of a prompt-type victim: the model that its prompts are for."""
LOADING_ERRORS = (
    *(OSError, ValueError, TypeError, RuntimeError, LookupError, AttributeError, ImportError),
    *(AssertionError, SafetensorError),
)
"""What libraries raise on files that are not what they expect."""


def load_classifier(
    source: str, labels: list[str] | None = None, base: str | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a sequence classifier, or base + PEFT adapter, and its tokenizer.

    LoRA adapters are merged; a victim with prompts stays a PEFT model.

    Args:
        source: folder or hub id.
        labels: names or numbers of the classes, for a model that is to be trained; names are new
            to a model without names of its own. None keeps the model's own, and then its head must
            be there.
        base: folder or hub id of the model that an adapter is for, instead of the one it names.

    Raises:
        VictimError: no model there, pickled weights only, foreign code, quantised or missing
            weights, an adapter that does not fit its base, or a multi-label classifier that is to
            be trained.
    """
    folder = Path(source)
    try:
        victim: nn.Module
        if find_adapter_config_file(source) is not None:
            local = folder if folder.is_dir() else snapshot_download(source, allow_patterns=FILES)
            victim, tokenizer = _load_adapted(Path(local), base)
            if labels is not None:
                _refuse_multi_label(source, transformer_of(victim).config)
        elif base is not None:
            raise VictimError(f"{source} is no adapter, so --base does not apply to it")
        else:
            victim = _load_whole(source, labels and _in_order_of(source, labels))
            tokenizer = _load_tokenizer(source)
        # A decoder skips this token when it looks for the last one of a text.
        model: Any = transformer_of(victim)
        _check_vocabulary(model, tokenizer)
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        fix_last_token(model)
        return victim, tokenizer
    except LOADING_ERRORS as error:
        raise VictimError(f"{source}: {_why(folder, error)}") from error


def _why(folder: Path, error: Exception) -> str:
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            return "has pickled weights only, which can run code; convert them to safetensors"
        return "holds no model: there is no *.safetensors file"
    if not folder.exists() and ("/" not in str(folder).strip("/") or folder.is_absolute()):
        return "no such folder"
    return f"the model cannot be loaded: {' '.join(str(error).split())}"


def _load_whole(source: str, labels: list[str] | None) -> PreTrainedModel:
    """Load a model that is no adapter; see `load_classifier`."""
    if quantised := _quantisation(source):
        raise VictimError(
            f"{source} is quantised ({quantised}): PSIM needs the full-precision model"
        )
    model, missing, mismatched = _load_model(source, labels)
    if mismatched:
        raise VictimError(_mismatch(source, model, mismatched))
    if labels is None and missing:
        raise VictimError(f"{source} is no trained classifier: no weights for {missing}")
    return model


def _quantisation(source: str) -> str | None:
    """Return how a model's weights are quantised, if they are."""
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return str(method or "quantization_config")


def _mismatch(source: str, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return a message about weights of other shapes than the config asks for."""
    name, shape = min(shapes.items())
    if not name.startswith(f"{model.base_model_prefix}."):
        return (
            f"{source}: its head is for {shape[0]} classes, its config.json names "
            f"{model.config.num_labels}; complete id2label there"
        )
    return f"{source}: its weights {name} have shape {shape}, which is not what its config asks for"


def _load_model(
    source: str, labels: list[str] | None
) -> tuple[PreTrainedModel, list[str], dict[str, tuple[int, ...]]]:
    """Return the model, what weights it lacks, and shapes of those that do not fit it."""
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
            ignore_mismatched_sizes=True,  # reported with a reason
            **names,
        )
    finally:
        transformers.logging.set_verbosity(before)
    mismatched = {name: tuple(found) for name, found, _ in report["mismatched_keys"]}
    return model.eval(), sorted(report["missing_keys"]), mismatched


def _in_order_of(source: str, labels: list[str]) -> list[str]:
    """Return `labels` in the model's own order where it has the same: its head is trained for it.

    Raises:
        VictimError: the model is a trained classifier for other labels, or multi-label.
    """
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    _refuse_multi_label(source, config)
    own = _label_names(config)
    if sorted(own) == sorted(labels):
        return own
    anonymous = own == [f"LABEL_{i}" for i in range(len(own))]
    if anonymous:
        return labels
    if {class_name(label, own) for label in labels} != {*own}:
        raise VictimError(f"{source} is a classifier for {own}, not for the labels {labels}")
    return own


def _refuse_multi_label(source: str, config: Any) -> None:
    if is_multi_label(config):
        raise VictimError(
            f"{source} is a multi-label classifier, and psim trains only those that give a text "
            "one label; tune it with transformers"
        )


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


def _load_adapted(folder: Path, base: str | None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise VictimError(f"{folder} has no {ADAPTER_WEIGHTS}; pickles are not loaded")
    config = peft.PeftConfig.from_pretrained(str(folder))
    if config.task_type not in ("SEQ_CLS", None):
        raise VictimError(f"{folder} is not an adapter for sequence classification (SEQ_CLS)")
    if config.is_prompt_learning:
        config.task_type = "SEQ_CLS"  # by which PEFT knows where prompts go
    if base is None and (folder / BASE).is_dir():
        base = str(folder / BASE)
    model = _load_base(folder, weights, base or str(config.base_model_name_or_path or ""))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # `_check_fit` refuses them
        adapted = peft.PeftModel.from_pretrained(model, str(folder), config=config)
    if not config.is_prompt_learning:
        _check_fit(adapted, folder)
        adapted = adapted.merge_and_unload()
    own = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    victim: nn.Module = adapted.eval()
    return victim, _load_tokenizer(str(folder) if own else str(model.name_or_path))


def _check_fit(adapted: peft.PeftModel, folder: Path) -> None:
    """Raise `VictimError` if an adapter does not have exactly the weights that it needs.

    It is loaded again, for PEFT's report: weights without a place are dropped in silence.
    """
    report = adapted.load_adapter(str(folder), "default")
    lacking = [name for name in report.missing_keys if "modules_to_save" not in name]
    if strange := [*report.unexpected_keys, *lacking]:
        raise VictimError(
            f"{folder} does not fit its base: {strange[0]} has no counterpart; name the model that "
            "it was trained on with --base"
        )


def _load_base(folder: Path, weights: Path, base: str) -> PreTrainedModel:
    """Load the model that an adapter is for, with the classes and tokens that it brings along.

    Raises:
        VictimError: the base is quantised, or neither it nor the adapter has a head.
    """
    try:
        quantised = _quantisation(base)
    except LOADING_ERRORS as error:
        raise VictimError(
            f"{folder} is an adapter for {base!r}, which cannot be loaded; name it with --base"
        ) from error
    if quantised:
        raise VictimError(
            f"{folder} is an adapter for {base}, which is quantised ({quantised}); name the "
            "full-precision model with --base"
        )
    saved = _adapter_shapes(weights)
    # The adapter's own class names, if it has a config, else those of its base.
    labels = _config_labels(str(folder) if (folder / "config.json").is_file() else base)
    model, missing, mismatched = _load_model(base, labels)
    classes = _classes(model, saved)
    if classes not in (None, len(labels)):
        if (folder / "config.json").is_file():
            raise VictimError(_mismatch(str(folder), model, {"head": (classes,)}))
        labels = [f"LABEL_{i}" for i in range(classes)]
        model, missing, mismatched = _load_model(base, labels)
    if absent := [name for name in (*missing, *mismatched) if name not in saved]:
        raise VictimError(f"neither {folder} nor its base has weights for {absent}")
    _resize(model, saved)
    return model


def _adapter_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's tensors, by their names in the model."""
    with safe_open(weights, "pt") as opened:
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    return {
        key.removeprefix("base_model.").removeprefix("model."): shape
        for key, shape in shapes.items()
    } | {key.removeprefix("base_model."): shape for key, shape in shapes.items()}


def _classes(model: PreTrainedModel, saved: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return how many classes the head has that was saved with an adapter; None if none was."""
    outputs = [
        saved[name][0]
        for name, weights in model.named_parameters()
        if not name.startswith(f"{model.base_model_prefix}.")
        and name in saved
        and len(weights) == model.config.num_labels
    ]
    return outputs[-1] if outputs else None


def _resize(model: PreTrainedModel, saved: Mapping[str, tuple[int, ...]]) -> None:
    """Make room for the tokens that were added when an adapter was trained."""
    words = model.get_input_embeddings()
    for name, module in model.named_modules():
        rows = saved.get(f"{name}.weight", (0,))[0]
        if module is words and rows not in (0, len(words.weight)):
            model.resize_token_embeddings(rows, mean_resizing=False)


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `VictimError` if a tokenizer gives tokens that a model has no embeddings for."""
    try:
        words = model.get_input_embeddings()
    except NotImplementedError:  # it reads characters
        return
    if isinstance(words, nn.Embedding) and len(tokenizer) > words.num_embeddings:
        raise VictimError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeddings for "
            f"{words.num_embeddings}: tokens were added, and their embeddings were not saved"
        )


def _config_labels(source: str) -> list[str]:
    """Return the class names in a model's config.

    Raises:
        VictimError: they are incomplete, or ambiguous.
    """
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    return _label_names(config)


def _label_names(config: Any) -> list[str]:
    names: dict[int, Any] = config.id2label
    if sorted(names) != list(range(len(names))):
        raise VictimError(
            f"id2label in the victim's config.json names classes {sorted(names)}: complete it, "
            f"with a name for each class from 0"
        )
    labels = [str(names[i]) for i in range(len(names))]
    if twice := {label for label in labels if labels.count(label) > 1 or not label.strip()}:
        raise VictimError(
            f"id2label in the victim's config.json gives several classes the name "
            f"{min(twice)!r}, or none: answers would not tell them apart; rename them there"
        )
    return labels


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
    if config.problem_type == "regression":
        raise VictimError("the victim is for regression: PSIM guards classifiers")
    if config.num_labels < 2 and not is_multi_label(config):
        raise VictimError(
            "the victim has a single output, which transformers takes for regression, and PSIM "
            "guards classifiers. If it is a classifier with one label, on or off by a sigmoid, "
            'write "problem_type": "multi_label_classification" into its config.json'
        )
    return _label_names(config)


def max_length_of(victim: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens of a text a victim can read; its prompts take positions too."""
    virtual = 0
    if isinstance(victim, peft.PeftModel):
        virtual = int(getattr(victim.active_peft_config, "num_virtual_tokens", 0) or 0)
    return max_input_length(pretrained_model(victim).config, tokenizer, virtual)


def short_length_of(victim: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the same, at most `SHORT_INPUT`: studies are about short texts."""
    return min(max_length_of(victim, tokenizer), SHORT_INPUT)


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


def run_digest(model: nn.Module, *settings: object) -> str:
    """Return a digest of a model's weights and of everything else that a run depends on."""
    digest = hashlib.sha256(repr(settings).encode("utf-8", "surrogatepass"))
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)  # NumPy has no bfloat16
        digest.update(name.encode() + raw.numpy().tobytes())
    return digest.hexdigest()[:16]
