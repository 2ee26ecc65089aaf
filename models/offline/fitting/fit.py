"""From a victim and clean texts to a calibrated bundle: `psim fit`, top to bottom."""

import platform
import random
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PromptEncoderConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.bundle.digests import hash_files
from models.bundle.layout import MANIFEST
from models.bundle.load import load_bundle
from models.bundle.manifest import (
    ActivationsRecord,
    Calibration,
    FitRecord,
    GroupRecord,
    Manifest,
    ParityRecord,
    PsimRecord,
    RuntimeRecord,
    VictimRecord,
)
from models.bundle.save import save_activations, save_readings, save_weights
from models.detection.calibrate import Calibrated, calibrate, parity
from models.detection.screen import FloatArray, Screen, allowed_rejections
from models.engines.base import REFERENCE, RUNTIMES, Encoding, Engine, Runtime
from models.engines.pytorch import TorchEngine, max_input_length
from models.engines.registry import is_installed, make_engine, runs_here
from models.errors import DataError, EngineError, VictimError
from models.network.adapters import QUERIES, lora_config, transformer_of, with_adapters
from models.network.guarded import Guarded, guard
from models.network.trunk import Inputs
from models.offline.evaluation.metrics import clopper_pearson
from models.offline.fitting.activations import fit_activations
from models.offline.fitting.psim import PsimConfig, Training, train_psim
from models.offline.io.atomic import replaced
from models.offline.io.inference import predict, texts_per_second

# Shares of the clean texts. Calibration gets most: the spread of the false rejection rate that is
# really achieved falls with its size, while PSIM learns all it needs from some hundred texts.
TRAIN_SHARE, HELD_OUT_SHARE = 0.4, 0.1
MAX_TRAIN, MAX_HELD_OUT, MAX_CALIBRATE = 3000, 300, 20_000
PROMPT_TOKENS = 5
AUTO = "auto"
"""Instead of an engine's name: any."""
VERSIONS_OF = ("psim-gateway", "torch", "transformers", "peft", "tokenizers")


@dataclass(frozen=True)
class Split:
    """Clean texts, each used for one purpose only."""

    train: list[str]
    held_out: list[str]
    calibrate: list[str]


def split_texts(texts: Sequence[str], seed: int) -> Split:
    """Shuffle the distinct texts and split them; duplicates would sit on both sides.

    Raises:
        DataError: fewer than 20 distinct texts.
    """
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < 20:
        raise DataError(f"{len(distinct)} distinct texts are too few to fit PSIM; give hundreds")
    random.Random(seed).shuffle(distinct)
    train = min(round(TRAIN_SHARE * len(distinct)), MAX_TRAIN)
    held_out = train + min(round(HELD_OUT_SHARE * len(distinct)), MAX_HELD_OUT)
    end = held_out + MAX_CALIBRATE
    return Split(distinct[:train], distinct[train:held_out], distinct[held_out:end])


def fit(
    victim: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    out: Path,
    *,
    name: str,
    frr_budget: float = 0.01,
    config: PsimConfig | None = None,
    engine: str = AUTO,
) -> Manifest:
    """Train PSIM on the victim, calibrate it, write the bundle `out`, and return its manifest.

    The bundle can be run by every engine that is installed, or by PyTorch and the one named. Its
    default is the fastest of those, or of the one named, that agrees with PyTorch in float32.

    `out` is replaced, and only when the new bundle is complete. The victim's weights are left as
    they were, but the module itself is used up: it carries the adapters afterwards.

    Raises:
        VictimError, DataError, CalibrationError, EngineError: as their messages say; nothing is
            written then.
    """
    started, config = time.perf_counter(), config or PsimConfig()
    if engine != AUTO and not is_installed(engine):
        raise EngineError(
            f"the engine {engine} is not installed: pip install 'psim-gateway[{engine}]'"
        )
    labels = labels_of(victim)
    split = split_texts(texts, config.seed)
    trained, training = train(victim, tokenizer, split, config)
    with replaced(out) as partial:
        digest = save_weights(partial, victim, trained.guarded, tokenizer)
        if trained.guarded.activations:
            save_activations(partial, trained.guarded.activations)
        runtimes = _runtimes(trained.guarded, engine)
        calibration_texts = trained.encode(split.calibrate)
        # In this order: the last runtime converts the module, whose weights are saved by now.
        measured = {
            runtime: measure(
                make_engine(runtime, trained.guarded, tokenizer, trained.max_length),
                calibration_texts,
            )
            for runtime in runtimes
        }
        found = calibrated(measured, len(trained.guarded.checkpoints), frr_budget)
        calibrations = calibrations_of(measured, found, frr_budget)
        save_readings(partial, {str(runtime): own.readings for runtime, own in measured.items()})
        manifest = Manifest(
            schema_version=4,
            victim=_victim_record(victim, name, digest),
            labels=labels,
            max_length=trained.max_length,
            psim=_psim_record(config, training),
            activations=_activations_record(trained.guarded),
            calibrations=calibrations,
            default=fastest(calibrations, engine),
            fit=_fit_record(split, started),
            files=hash_files(partial),
            versions=versions_here(),
        )
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        load_bundle(partial)  # nobody should learn from the service that it does not load
    return manifest


def train(
    victim: nn.Module, tokenizer: PreTrainedTokenizerBase, split: Split, config: PsimConfig
) -> tuple[TorchEngine, Training]:
    """Fit both screens on the victim, which carries them afterwards; not calibrated yet.

    Raises:
        VictimError: the victim cannot be guarded.
    """
    torch.manual_seed(config.seed)
    guarded = with_psim(victim, config)
    length = max_length_of(victim, tokenizer)
    if config.adapter == "prompt-encoder":
        length -= PROMPT_TOKENS
    engine = TorchEngine(guarded, tokenizer, length)
    texts, held_out = engine.encode(split.train), engine.encode(split.held_out)
    training = train_psim(guarded, texts, held_out, config, engine.pad_id)
    guarded.activations = fit_activations(engine, texts)
    return engine, training


def with_psim(victim: nn.Module, config: PsimConfig) -> Guarded:
    """Give a victim the fresh adapters that a configuration asks for.

    Raises:
        VictimError: the victim cannot carry them.
    """
    checkpoints = len(config.keep_at)
    if config.adapter == "prompt-encoder":
        if isinstance(victim, PeftModel):
            raise VictimError("the victim has prompts of its own: no prompt encoder goes before it")
        victim.requires_grad_(False)
        prompts = PromptEncoderConfig(  # sizes of Zhao et al., section 5.1
            task_type="SEQ_CLS", num_virtual_tokens=PROMPT_TOKENS, encoder_hidden_size=128
        )
        return Prompted(victim, with_adapters(victim, prompts, checkpoints))
    lora = lora_config(victim, config.layers, config.rank)
    if config.adapter == "value":
        names = set(lora.target_modules or ())
        lora.target_modules = {n for n in names if n.rsplit(".", 1)[-1] not in QUERIES}
    if config.head == "trained":
        lora.modules_to_save = _heads(victim)
    return guard(victim, lora, checkpoints)


class Prompted(Guarded):
    """A victim with prompts as its PSIM adapter, for comparison: it can screen, and that is all."""

    def psim_logits(self, inputs: Inputs) -> torch.Tensor:
        """Return logits with the active prompts before the text, shape (rows, C)."""
        logits: torch.Tensor = self.psim(**inputs).logits
        return logits


def _heads(victim: nn.Module) -> list[str]:
    """Return the names of what comes behind the transformer proper."""
    model = _model(victim)
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and next(module.parameters(), None) is not None
    ]


def _runtimes(guarded: Guarded, engine: str) -> list[Runtime]:
    """Return the runtimes to calibrate."""
    wanted = [r for r in RUNTIMES if engine in (AUTO, r.engine) or r.engine == REFERENCE.engine]
    if guarded.last_layer is None:
        if engine not in (AUTO, REFERENCE.engine):
            raise EngineError(f"{engine} cannot run this victim, or these adapters; use torch")
        wanted = [r for r in wanted if r.engine == REFERENCE.engine]
    # PyTorch computes in any dtype, if slowly.
    return [r for r in wanted if r.engine == REFERENCE.engine or runs_here(r)]


@dataclass(frozen=True)
class Measured:
    """What a runtime makes of some texts."""

    readings: FloatArray
    """Shape (n, V, C)."""
    texts_per_s: float


def measure(engine: Engine, texts: Sequence[Encoding]) -> Measured:
    """Screen texts, and take the time of some of them."""
    return Measured(predict(engine, texts), texts_per_second(engine, texts))


def calibrated(
    measured: Mapping[Runtime, Measured], checkpoints: int, frr_budget: float
) -> dict[Runtime, Calibrated]:
    """Calibrate every runtime by what it makes of the same clean texts.

    Raises:
        CalibrationError: too few texts, or readings that are not finite.
    """
    return {
        runtime: (calibrate(own.readings, checkpoints, frr_budget), own.readings)
        for runtime, own in measured.items()
    }


def calibrations_of(
    measured: Mapping[Runtime, Measured],
    found: Mapping[Runtime, Calibrated],
    frr_budget: float,
) -> list[Calibration]:
    """Return what the manifest says of calibrated runtimes, of which `REFERENCE` is one."""
    calibrations = []
    for runtime, own in found.items():
        compared = asdict(parity(found[REFERENCE], own))
        record = ParityRecord(**compared, texts_per_s=measured[runtime].texts_per_s)
        calibrations.append(_calibration_record(runtime, own[0], frr_budget, record))
    return calibrations


def fastest(calibrations: Sequence[Calibration], engine: str) -> RuntimeRecord:
    """Return the fastest runtime of an engine, or of all, that is as good as the reference."""
    chosen = max(
        (c for c in calibrations if c.parity.agrees and engine in (AUTO, c.engine)),
        key=lambda c: c.parity.texts_per_s,
        default=calibrations[0],
    )
    return RuntimeRecord(engine=chosen.engine, dtype=chosen.dtype)


def versions_here() -> dict[str, str]:
    """Return the versions of what readings depend on."""
    packages = [*VERSIONS_OF, *(r.engine for r in RUNTIMES if is_installed(r.engine))]
    return {p: version(p) for p in packages} | {"python": platform.python_version()}


def labels_of(victim: nn.Module) -> list[str]:
    """Return the names of a victim's classes, in their order.

    Raises:
        VictimError: it is no classifier with one label per text.
    """
    config: Any = _model(victim).config
    if config.num_labels < 2:
        raise VictimError("the victim has a single output: PSIM guards classifiers, not regression")
    if config.problem_type == "multi_label_classification":
        raise VictimError("the victim gives several labels at once: PSIM needs one per text")
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def _model(victim: nn.Module) -> PreTrainedModel:
    model = transformer_of(victim)
    if not isinstance(model, PreTrainedModel):
        raise VictimError(f"the victim is a {type(model).__name__}, not a transformers classifier")
    return model


def max_length_of(victim: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens of a text a victim reads; its prompts take positions too."""
    virtual = 0
    if isinstance(victim, PeftModel):
        virtual = int(getattr(victim.active_peft_config, "num_virtual_tokens", 0) or 0)
    return max_input_length(_model(victim).config, tokenizer, virtual)


def _victim_record(victim: nn.Module, name: str, digest: str) -> VictimRecord:
    model = _model(victim)
    return VictimRecord(
        name=name,
        model_type=str(model.config.model_type),
        architecture=type(model).__name__,
        digest=digest,
    )


def _calibration_record(
    runtime: Runtime, screen: Screen, frr_budget: float, compared: ParityRecord
) -> Calibration:
    return Calibration(
        engine=runtime.engine,
        dtype=runtime.dtype,
        frr_budget=frr_budget,
        parity=compared,
        groups=[
            GroupRecord(
                classes=list(group.classes),
                texts=len(group.scores),
                threshold=group.threshold,
                rejected=int((group.scores >= group.threshold).sum()),
                frr_interval=clopper_pearson(
                    allowed_rejections(len(group.scores), frr_budget), len(group.scores)
                ),
            )
            for group in screen.groups
        ],
    )


def _psim_record(config: PsimConfig, training: Training) -> PsimRecord:
    return PsimRecord(
        layers=config.layers,
        rank=config.rank,
        learning_rate=config.learning_rate,
        seed=config.seed,
        steps=training.steps,
        stopped_because=training.stopped_because,
        checkpoints=training.checkpoints,
        curve=training.curve,
    )


def _activations_record(guarded: Guarded) -> ActivationsRecord | None:
    return ActivationsRecord(layers=guarded.trunk.watched) if guarded.activations else None


def _fit_record(split: Split, started: float) -> FitRecord:
    # ru_maxrss is in KiB on Linux.
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return FitRecord(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        texts_train=len(split.train),
        texts_stop=len(split.held_out),
        texts_calibrate=len(split.calibrate),
        seconds=round(time.perf_counter() - started, 1),
        peak_memory_mb=peak_kib // 1024,
    )
