"""Writing the parts of a bundle; `models.bundle.layout` shows where each of them goes."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file as save_tensors
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.bundle.digests import hash_files, tree_digest
from models.bundle.layout import (
    ACTIVATIONS,
    ADAPTER_WEIGHTS,
    CARRIERS,
    MANIFEST,
    PSIM,
    READINGS,
    outcome_names,
)
from models.bundle.manifest import CarrierTexts, Manifest
from models.detection.calibrate import OverrideOutcomes
from models.detection.screen import FloatArray
from models.engines.base import Runtime
from models.network.activations import Activations
from models.network.adapters import adapter_weights
from models.network.guarded import Guarded
from models.network.unrolled import rolled_name


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, the last file of a bundle."""
    (path / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")


def save_weights(
    path: Path, victim: nn.Module, guarded: Guarded, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Write victim, prompt, both detectors and tokenizer; return the victim's digest.

    Args:
        path: folder of the bundle.
        victim: the model that `guarded` was made of, with its original float32 weights.
        guarded: the victim with trained adapters and, if it has one, activation detector.
        tokenizer: the victim's tokenizer.
    """
    model = guarded.psim.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError("the victim is not a transformers model")
    _save_without_lora(model, path / "victim")
    if isinstance(victim, PeftModel):
        _save_prompt(victim, path / "prompt")
    digest = tree_digest(hash_files(path))
    (path / PSIM).parent.mkdir()
    save_tensors(adapter_weights(guarded.psim), path / PSIM, metadata={"victim_digest": digest})
    if guarded.activations is not None:
        _save_activations(guarded.activations, path / ACTIVATIONS)
    tokenizer.save_pretrained(path / "tokenizer")
    return digest


def _save_without_lora(model: PreTrainedModel, folder: Path) -> None:
    """Save a transformer as it was before PEFT injected layers and wrapped the head."""
    weights = {
        rolled_name(model, name.replace(".base_layer.", ".").replace(".original_module.", ".")): own
        for name, own in model.state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
    # Models with custom code on the Hub carry this setting; our code is that of transformers.
    if hasattr(model.config, "auto_map"):
        del model.config.auto_map
    model.save_pretrained(folder, state_dict=weights)


def _save_prompt(victim: PeftModel, folder: Path) -> None:
    """Save the prompts of a prompt-type victim, and the head that was trained with them."""
    folder.mkdir()
    config = copy.copy(victim.active_peft_config)
    config.base_model_name_or_path = None  # never a path of this machine
    config.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(victim, save_embedding_layers=False)
    save_tensors({k: v.detach().contiguous() for k, v in weights.items()}, folder / ADAPTER_WEIGHTS)


def _save_activations(activations: Activations, file: Path) -> None:
    tensors = {"whitening": activations.whitening, "means": activations.means}
    save_tensors({name: t.contiguous().cpu() for name, t in tensors.items()}, file)


def save_readings(path: Path, readings: Mapping[str, FloatArray]) -> None:
    """Write the readings of the calibration texts, by `ENGINE/DTYPE`."""
    save_arrays(dict(readings), path / READINGS)


def save_carriers(path: Path, carriers: Sequence[Sequence[str]]) -> None:
    """Write the texts of the override test, by class."""
    content = CarrierTexts(carriers=[[*own] for own in carriers])
    (path / CARRIERS).write_text(content.model_dump_json(indent=1), encoding="utf-8")


def outcome_arrays(
    runtime: Runtime, tested: str, outcomes: OverrideOutcomes
) -> dict[str, FloatArray]:
    """Return the arrays of `READINGS` that hold the outcomes of override tests."""
    clean, harmless = outcome_names(runtime, tested)
    return {clean: outcomes.clean, harmless: outcomes.harmless}
