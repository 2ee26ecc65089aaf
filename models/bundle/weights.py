"""The model of a bundle: victim, PSIM adapters and activation detector, all of them checked.

Apart from `models.bundle.load`, since importing PEFT and transformers' models takes more memory
than many a model.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file as load_tensors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from models.bundle.layout import ACTIVATIONS, PROMPT, PSIM
from models.bundle.manifest import ActivationsRecord, Manifest
from models.bundle.verify import WeightTotals
from models.engines.pytorch import load_tokenizer, max_input_length
from models.errors import BundleError
from models.network.activations import Activations
from models.network.adapters import adapter_weights, load_adapter_weights, lora_config
from models.network.guarded import Guarded, guard
from models.network.outputs import is_multi_label


class LoadedModel(NamedTuple):
    """What a bundle's files make."""

    guarded: Guarded
    tokenizer: PreTrainedTokenizerBase


def load_model(path: Path, manifest: Manifest, totals: WeightTotals) -> LoadedModel:
    """Load the model of a checked copy of a bundle.

    Raises:
        BundleError: it is not as the manifest says.
    """
    _check_memory(path, manifest, totals)
    victim = _load_victim(path, manifest)
    guarded = _with_adapters(manifest, victim)
    _load_adapters(path / PSIM, guarded, manifest.victim.digest)
    if guarded.layout != manifest.layout:
        raise BundleError("the model and the manifest differ in whether attention is read")
    if manifest.activations:
        guarded.activations = _load_activations(path / ACTIVATIONS, guarded, manifest)
    if not all(weights.isfinite().all() for weights in guarded.parameters()):
        raise BundleError("victim/, prompt/ or psim/ holds weights that are not finite")
    tokenizer = load_tokenizer(path / "tokenizer")
    virtual = 0
    if isinstance(victim, PeftModel):
        virtual = victim.active_peft_config.num_virtual_tokens
    limit = max_input_length(guarded.config, tokenizer, virtual)
    if manifest.max_length > limit:
        raise BundleError(
            f"max_length is {manifest.max_length}, but the model reads {limit} tokens"
        )
    return LoadedModel(guarded, tokenizer)


def _check_memory(path: Path, manifest: Manifest, totals: WeightTotals) -> None:
    """Build all modules on the meta device; they must not need more memory than the weights."""
    with totals.limit_modules(), torch.device("meta"):
        config = AutoConfig.from_pretrained(
            path / "victim", trust_remote_code=False, local_files_only=True
        )
        from_config: Any = AutoModelForSequenceClassification.from_config
        victim: nn.Module = from_config(config)
        if PROMPT[0] in manifest.files:
            prompts = PeftConfig.from_pretrained(str(path / "prompt"))
            prompts.inference_mode = True
            victim = get_peft_model(victim, prompts)
        totals.check(_with_adapters(manifest, victim))


def _with_adapters(manifest: Manifest, victim: nn.Module) -> Guarded:
    """Return the victim with the manifest's PSIM adapters, still empty."""
    psim = manifest.psim
    return guard(victim, lora_config(victim, psim.layers, psim.rank), len(psim.checkpoints))


def _load_victim(path: Path, manifest: Manifest) -> nn.Module:
    model, report = AutoModelForSequenceClassification.from_pretrained(
        path / "victim",
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    if any(report.get(kind) for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")):
        raise BundleError("victim/ does not hold the weights that its config asks for")
    if [model.config.id2label[i] for i in range(model.config.num_labels)] != manifest.labels:
        raise BundleError("the labels of manifest and victim/config.json differ")
    if is_multi_label(model.config) != manifest.multi_label:
        raise BundleError("manifest and victim/config.json differ in how many labels a text has")
    if PROMPT[0] in manifest.files:
        return PeftModel.from_pretrained(model, str(path / "prompt"))
    victim: nn.Module = model
    return victim


def _load_adapters(file: Path, guarded: Guarded, victim_digest: str) -> None:
    """Load PSIM weights into `guarded`; they must fit it exactly and be made for this victim."""
    with safe_open(file, "pt") as opened:
        made_for = (opened.metadata() or {}).get("victim_digest")
    if made_for != victim_digest:
        raise BundleError("psim/ was trained for another base model; run `psim fit` for this one")
    weights = load_tensors(file)
    if weights.keys() != adapter_weights(guarded.psim).keys():
        raise BundleError("psim/ does not have the layers and checkpoints that the manifest names")
    load_adapter_weights(guarded.psim, weights)


def _load_activations(file: Path, guarded: Guarded, manifest: Manifest) -> Activations:
    """Load whitening and class means of the activation detector; they must fit the victim."""
    layers, size = guarded.trunk.watched, guarded.hidden_size
    expected = {
        "whitening": (len(layers), size, size),
        "means": (len(layers), len(manifest.classes), size),
    }
    tensors = load_tensors(file)
    fits = {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    if manifest.activations != ActivationsRecord(layers=layers) or not fits:
        raise BundleError(f"{file.name} does not have the layers that the manifest names")
    if not all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values()):
        raise BundleError(f"{file.name} has tensors that are not finite float32")
    return Activations(**tensors)
