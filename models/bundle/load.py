"""Bundles: a folder with victim, PSIM adapters, tokenizer, calibration, and a manifest of it all.

A bundle is untrusted input: nothing in it is opened before its hash agrees with the manifest, no
library reads what `models.bundle.verify` has not checked, and nothing is ever unpickled.

    manifest.json            see `models.bundle.manifest`
    manifest.sig             its signature, if it has one, see `models.bundle.signing`
    victim/                  config and safetensors, as transformers saves them
    prompt/                  PEFT adapter, only for victims tuned by prompt- or prefix-tuning
    psim/                    LoRA weights; their header names the victim they were trained for
    tokenizer/
    activations.safetensors  whitening and means of hidden states, see
                             `models.network.guarded.Activations`
    calibration.safetensors  readings of clean texts, shape (n, K + M, C): `ENGINE/DTYPE`
"""

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from models.bundle.manifest import ActivationsRecord, Calibration, Manifest
from models.bundle.signing import SIGNATURE, check_signature
from models.bundle.verify import Weights, check_contents, check_sizes, read
from models.detection.calibrate import calibrate, parity
from models.detection.screen import FloatArray, Screen
from models.engines.base import Engine
from models.engines.pytorch import max_input_length
from models.engines.registry import REFERENCE, Runtime, make_engine, runs_here
from models.errors import BundleError, CalibrationError, PsimError, ScreenError
from models.network.guarded import Activations, Guarded, guard, lora_config

MANIFEST = "manifest.json"
READINGS = "calibration.safetensors"
ACTIVATIONS = "activations.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
# All that a bundle may hold, and so all that a library could be led to by something in it: an
# adapter_config.json beside a victim, say, sends transformers to weights elsewhere.
ALLOWED = (
    READINGS,
    ACTIVATIONS,
    "victim/config.json",
    "victim/generation_config.json",
    "victim/model*.safetensors",
    "victim/model.safetensors.index.json",
    f"prompt/{ADAPTER_CONFIG}",
    f"prompt/{ADAPTER_WEIGHTS}",
    f"psim/{ADAPTER_WEIGHTS}",
    # Vocabularies and settings; .jinja are chat templates, which are never run.
    *(f"tokenizer/*{kind}" for kind in (".json", ".txt", ".model", ".codes", ".jinja")),
)
# A library that does not find what it looks for in a folder asks the Hub for it.
REQUIRED = (
    READINGS,
    "victim/config.json",
    f"psim/{ADAPTER_WEIGHTS}",
    "tokenizer/tokenizer_config.json",
)
PROMPT = (f"prompt/{ADAPTER_CONFIG}", f"prompt/{ADAPTER_WEIGHTS}")


@dataclass(frozen=True)
class Bundle:
    """A checked and loaded bundle, ready to screen and classify."""

    manifest: Manifest
    digest: str
    """SHA-256 of `manifest.json`, which in turn holds the hash of every other file."""
    engine: Engine
    screen: Screen


def load_bundle(
    path: Path, dtype: str | None = None, engine: str | None = None, key: Path | None = None
) -> Bundle:
    """Check every file of the bundle, load it, and try it on one text.

    Args:
        path: folder of the bundle.
        dtype: what to compute in, such as `float32`; None leaves it to the bundle.
        engine: what to compute by, such as `torch`; None leaves it to the bundle, see `choose`.
        key: file of the public key by whose owner the bundle must be signed; None takes any.

    Raises:
        BundleError: anything about the bundle is not as its manifest says, or it has no
            calibration for this dtype and engine.
    """
    manifest, digest = read_manifest(path, key)
    held = check_files(path, manifest)
    calibration = choose(manifest, engine, dtype)
    try:
        screen = _load_screen(path, manifest, calibration)
        _check_size(path, manifest, held)
        bundle = Bundle(manifest, digest, _load_engine(path, manifest, calibration.runtime), screen)
        _self_test(bundle)
    except PsimError as error:
        raise BundleError(f"{path}: {error}") from error
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever a library makes of a file that somebody forged
        # Those in Rust panic past `Exception`; and a message may quote the file.
        raise BundleError(f"{path}: the model does not load: {str(error)[:500]!r}") from error
    return bundle


def read_manifest(path: Path, key: Path | None = None) -> tuple[Manifest, str]:
    """Return the manifest of the bundle at `path` and its SHA-256; check nothing but its signature,
    if there is a key to check it with."""
    try:
        raw = read(path / MANIFEST)
    except OSError as error:
        raise BundleError(f"{path} is not a bundle: cannot read {MANIFEST}") from error
    if key is not None:
        check_signature(raw, path / SIGNATURE, key)
    try:
        return Manifest.model_validate_json(raw), hashlib.sha256(raw).hexdigest()
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        if where == "schema_version":
            raise BundleError(f"{path} is of another version; run `psim fit` again") from error
        raise BundleError(f"{path}/{MANIFEST} is not valid: {where!r}: {first['msg']}") from error


def check_files(path: Path, manifest: Manifest) -> Weights:
    """Return what the weights come to, once all files are those of the manifest.

    Raises:
        BundleError: the folder does not hold the manifest's files, unaltered, and no more; or one
            of them is not to be read, see `models.bundle.verify`.
    """
    try:
        inside = {str(PurePosixPath(f.relative_to(path))): f for f in path.rglob("*")}
    except RecursionError:
        raise BundleError(f"{path}: folders are nested too deeply") from None
    if any(file.is_symlink() for file in inside.values()):
        raise BundleError(f"{path}: a bundle may not contain symbolic links")
    found = {name for name, file in inside.items() if not file.is_dir()}
    found -= {MANIFEST, SIGNATURE}
    for name in sorted(found):
        if inside[name].suffix in PICKLES:
            raise BundleError(f"{path}: {name!r} is a pickle, which can run code; use safetensors")
        allowed = any(fnmatchcase(name, pattern) for pattern in ALLOWED) and name.count("/") < 2
        if not allowed or not inside[name].is_file() or name not in manifest.files:
            raise BundleError(f"{path}: {name!r} does not belong into a bundle; remove it")
    prompt = PROMPT if found & {*PROMPT} else ()
    for name in (*REQUIRED, *prompt, *manifest.files):
        if name not in found:
            raise BundleError(f"{path}: {name!r} is missing; copy or build the bundle again")
    files = {name: inside[name] for name in manifest.files}
    try:
        check_sizes(files)
        _check_hashes(files, manifest)
        return check_contents(files, len(manifest.labels))
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error


def _check_hashes(files: Mapping[str, Path], manifest: Manifest) -> None:
    for name, expected in manifest.files.items():
        try:
            actual = file_digest(files[name])
        except OSError as error:
            raise BundleError(f"{name} cannot be read: {error.strerror}") from error
        if actual != expected:
            raise BundleError(f"{name} was altered: its SHA-256 is not the manifest's")


def choose(manifest: Manifest, engine: str | None, dtype: str | None) -> Calibration:
    """Return the calibration of the runtime to take; thresholds of another are never used.

    That is the bundle's default, if it is what was asked for and runs here; else `REFERENCE`; else
    another one, by the default's engine first. What does not agree with the reference has to be
    asked for.

    Raises:
        BundleError: there is none.
    """
    default = manifest.default

    def rank(own: Calibration) -> tuple[bool, ...]:
        away = own.runtime != default.runtime, own.runtime != REFERENCE
        return (*away, own.engine != default.engine)

    wanted = [
        own
        for own in sorted(manifest.calibrations, key=rank)
        if engine in (None, own.engine)
        and dtype in (None, own.dtype)
        and (engine or dtype or own.parity.passes)
    ]
    if wanted:  # if nothing of it runs here, loading it says why
        return next((own for own in wanted if runs_here(own.runtime)), wanted[0])
    asked = f"{engine or REFERENCE.engine}/{dtype or REFERENCE.dtype}"
    known = ", ".join(str(own.runtime) for own in manifest.calibrations)
    raise BundleError(
        f"no calibration for {asked}; the bundle has {known}. Run `psim fit` where it is installed"
    )


def _load_screen(path: Path, manifest: Manifest, chosen: Calibration) -> Screen:
    """Calibrate all runtimes again; the manifest must say the same.

    A threshold that was altered, or that is beyond what any text can reach, would let everything
    pass. And the one that is chosen must agree with the reference as the manifest says it does.
    """
    checkpoints = len(manifest.psim.checkpoints)
    distances = Activations.FEATURES if manifest.activations else 0
    shape = checkpoints + distances, len(manifest.labels)
    screens: dict[Runtime, Screen] = {}
    try:
        readings = load_arrays(path / READINGS)
        reference = readings[str(REFERENCE)]
        for own in manifest.calibrations:
            given = readings[str(own.runtime)]
            if given.dtype != np.float32 or given.shape != (len(reference), *shape):
                raise ValueError
            screens[own.runtime] = calibrate(given, checkpoints, own.frr_budget)
        given = readings[str(chosen.runtime)]
        judge = screens.get(REFERENCE) or calibrate(reference, checkpoints, chosen.frr_budget)
        found = parity((judge, reference), (screens[chosen.runtime], given))
    except (KeyError, ValueError, SafetensorError, OSError, CalibrationError) as error:
        raise BundleError(f"{READINGS} does not hold the calibration") from error
    if not all(_agree(screens[own.runtime], own) for own in manifest.calibrations):
        raise BundleError("a threshold is not what its calibration texts give")
    # A text or two at a threshold may be rounded to the other side on other processors.
    if found.decisions_agree < chosen.parity.decisions_agree - 2.5 / len(reference):
        raise BundleError(f"{chosen.runtime} agrees less than the manifest says")
    return screens[chosen.runtime]


def _agree(screen: Screen, calibration: Calibration) -> bool:
    """Return whether thresholds are those of a manifest, but for rounding on other processors."""
    recorded = {tuple(group.classes): group.threshold for group in calibration.groups}
    found = {group.classes: group.threshold for group in screen.groups}
    return recorded.keys() == found.keys() and all(
        math.isclose(found[own], recorded[own], rel_tol=1e-4, abs_tol=1e-4) for own in found
    )


def _load_engine(path: Path, manifest: Manifest, runtime: Runtime) -> Engine:
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
    prompt = PROMPT[0] in manifest.files
    victim = PeftModel.from_pretrained(model, str(path / "prompt")) if prompt else model
    guarded = _guarded(manifest, victim)
    load_adapter(path / "psim" / ADAPTER_WEIGHTS, guarded, manifest.victim.digest)
    if manifest.activations:
        guarded.activations = load_activations(path / ACTIVATIONS, guarded, manifest)
    if not all(weights.isfinite().all() for weights in guarded.parameters()):
        raise BundleError("victim/, prompt/ or psim/ holds weights that are not finite")
    tokenizer = AutoTokenizer.from_pretrained(
        path / "tokenizer", trust_remote_code=False, local_files_only=True
    )
    virtual = 0
    if isinstance(victim, PeftModel):
        virtual = victim.active_peft_config.num_virtual_tokens
    if manifest.max_length > (most := max_input_length(guarded.config, tokenizer, virtual)):
        raise BundleError(f"max_length is {manifest.max_length}, but the model reads {most} tokens")
    return make_engine(runtime, guarded, tokenizer, manifest.max_length)


def _guarded(manifest: Manifest, victim: nn.Module) -> Guarded:
    """Return a victim with PSIM adapters that are still empty."""
    psim = manifest.psim
    return guard(victim, lora_config(victim, psim.layers, psim.rank), len(psim.checkpoints))


def _check_size(path: Path, manifest: Manifest, held: Weights) -> None:
    """Build all modules without memory; they must not need more of it than the weights take."""
    with held.building(), torch.device("meta"):
        config = AutoConfig.from_pretrained(
            path / "victim", trust_remote_code=False, local_files_only=True
        )
        from_config: Any = AutoModelForSequenceClassification.from_config
        victim: nn.Module = from_config(config)
        if PROMPT[0] in manifest.files:
            prompts = PeftConfig.from_pretrained(str(path / "prompt"))
            prompts.inference_mode = True
            victim = get_peft_model(victim, prompts)
        held.check(_guarded(manifest, victim))


def load_adapter(file: Path, guarded: Guarded, victim_digest: str) -> None:
    """Load PSIM weights into `guarded`; they must fit it exactly and be made for this victim."""
    with safe_open(file, "pt") as opened:
        made_for = (opened.metadata() or {}).get("victim_digest")
    if made_for != victim_digest:
        raise BundleError("psim/ was trained for another base model; run `psim fit` for this one")
    weights = load_tensors(file)
    if weights.keys() != adapter_weights(guarded).keys():
        raise BundleError("psim/ does not have the layers and checkpoints that the manifest names")
    for checkpoint in guarded.checkpoints:
        start = f"{checkpoint}/"
        own = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
        set_peft_model_state_dict(guarded.psim, own, adapter_name=checkpoint)


def load_activations(file: Path, guarded: Guarded, manifest: Manifest) -> Activations:
    """Load what the second screen compares hidden states with; it must fit victim and manifest."""
    layers, size = guarded.trunk.watched, guarded.config.hidden_size
    expected = {
        "whitening": (len(layers), size, size),
        "means": (len(layers), len(manifest.labels), size),
    }
    tensors = load_tensors(file)
    fits = {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    if manifest.activations != ActivationsRecord(layers=layers) or not fits:
        raise BundleError(f"{file.name} does not have the layers that the manifest names")
    if not all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values()):
        raise BundleError(f"{file.name} holds what is not finite float32")
    return Activations(**tensors)


def save_activations(path: Path, activations: Activations) -> None:
    """Write what the second screen compares hidden states with."""
    tensors = {"whitening": activations.whitening, "means": activations.means}
    save_tensors({name: t.contiguous().cpu() for name, t in tensors.items()}, path / ACTIVATIONS)


def adapter_weights(guarded: Guarded) -> dict[str, torch.Tensor]:
    """Return the weights of all checkpoints by `CHECKPOINT/NAME`."""
    return {
        f"{checkpoint}/{name}": tensor.detach().contiguous().cpu()
        for checkpoint in guarded.checkpoints
        for name, tensor in get_peft_model_state_dict(
            guarded.psim, adapter_name=checkpoint, save_embedding_layers=False
        ).items()
    }


def _self_test(bundle: Bundle) -> None:
    batch = bundle.engine.encode(["self-test"])
    try:
        bundle.screen.judge(bundle.engine.screen(batch).readings[0])
    except ScreenError as error:
        raise BundleError(f"self-test failed: {error}") from error
    if not np.isfinite(bundle.engine.classify(batch)).all():
        raise BundleError("self-test failed: the classifier gave no finite probabilities")


def save_weights(
    path: Path, victim: nn.Module, guarded: Guarded, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Write victim, prompt, adapter and tokenizer below `path`; return the victim's digest.

    Call it with the original, float32 weights; `victim` is the model that `guarded` was made of.
    """
    model = guarded.psim.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError("the victim is not a transformers model")
    _save_without_lora(model, path / "victim")
    if isinstance(victim, PeftModel):
        _save_prompt(victim, path / "prompt")
    digest = tree_digest(hash_files(path))
    (path / "psim").mkdir()
    metadata = {"victim_digest": digest}
    save_tensors(adapter_weights(guarded), path / "psim" / ADAPTER_WEIGHTS, metadata=metadata)
    tokenizer.save_pretrained(path / "tokenizer")
    return digest


def _save_without_lora(model: PreTrainedModel, folder: Path) -> None:
    """Save a transformer as it was before PEFT injected layers and wrapped the head."""
    weights = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
    # Of a model on the Hub that has code of its own too; ours is that of transformers.
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


def save_readings(path: Path, readings: Mapping[str, FloatArray]) -> None:
    """Write the readings of the calibration texts, by `ENGINE/DTYPE`."""
    save_arrays(dict(readings), path / READINGS)


def hash_files(path: Path) -> dict[str, str]:
    """Return SHA-256 by relative POSIX path of every file below `path`."""
    return {
        str(PurePosixPath(file.relative_to(path))): file_digest(file)
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def tree_digest(files: Mapping[str, str]) -> str:
    """Return one SHA-256 for a set of files and their names."""
    listing = "\n".join(f"{digest}  {name}" for name, digest in sorted(files.items()))
    return hashlib.sha256(listing.encode()).hexdigest()


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file, hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
