"""From a victim and clean texts to a calibrated bundle: `psim fit`, top to bottom.

A bundle can be run by every engine that was installed here, or by PyTorch and one that was named.
Its default is the fastest of those, or of the one named, that agrees with PyTorch in float32. The
folder is replaced only when the new bundle is complete. The victim's module carries the adapters
afterwards.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from models.bundle.digests import hash_files
from models.bundle.manifest import Calibration, Manifest, OverrideRecord
from models.bundle.save import save_carriers, save_readings, save_weights
from models.detection.override import LEAST_READABLE, OverrideGeometry, OverrideTest
from models.engines.base import Encoding
from models.engines.pytorch import TorchEngine, best_device, collate
from models.network.adapters import lora_config
from models.network.check import guard_checked
from models.network.trunk import Inputs
from models.offline.fitting.activations import fit_activations
from models.offline.fitting.carriers import choose_carriers
from models.offline.fitting.psim import Loss, PsimConfig, Training, train_psim
from models.offline.fitting.records import (
    activations_record,
    calibration_records,
    complete_bundle,
    fit_record,
    installed_versions,
    override_record,
    psim_record,
    victim_record,
)
from models.offline.fitting.runtimes import (
    AUTO,
    calibrate_runtimes,
    fastest,
    installed,
    measure_runtimes,
    measured_arrays,
)
from models.offline.fitting.split import Split, split_texts
from models.offline.io.atomic import replaced
from models.offline.io.classifiers import labels_of, max_length_of
from models.offline.io.input_length import check_length, choose_length

CHECKED, CHECKED_TOKENS = 32, 64
"""Texts of which two are tried on a victim before it is trained, and where they are cut."""


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
    carriers: Sequence[str] = (),
    max_length: int | None = None,
) -> Manifest:
    """Train PSIM on the victim, calibrate both stages, write the bundle; return its manifest.

    Without `max_length`, it chooses one. Raises `PsimError`, which says why; nothing is written.
    """
    started, config, engine = time.perf_counter(), config or PsimConfig(), installed(engine)
    labels, split = labels_of(victim), split_texts(texts, config.seed)
    trained, training = train(victim, tokenizer, split, config, max_length)
    with replaced(out) as partial:
        digest = save_weights(partial, victim, trained.guarded, tokenizer)
        override, calibrations = _calibrate(partial, trained, split, engine, frr_budget, carriers)
        manifest = Manifest(
            schema_version=9,
            victim=victim_record(victim, name, digest),
            labels=labels,
            multi_label=trained.guarded.multi_label,
            max_length=trained.max_length,
            psim=psim_record(config, training),
            activations=activations_record(trained.guarded),
            attention=trained.guarded.layout.attention,
            override=override,
            calibrations=calibrations,
            default=fastest(calibrations, engine),
            fit=fit_record(split, started),
            files=hash_files(partial),
            versions=installed_versions(),
        )
        return complete_bundle(partial, manifest)


def train(
    victim: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    config: PsimConfig,
    max_length: int | None = None,
) -> tuple[TorchEngine, Training]:
    """Fit both detectors on the victim, which carries them afterwards; not calibrated yet.

    Raises:
        VictimError: the victim cannot be guarded, or does not read `max_length` tokens.
    """
    if max_length is not None:
        check_length(max_length, victim, tokenizer)
    torch.manual_seed(config.seed)
    made_for = max_length_of(victim, tokenizer)
    lora = lora_config(victim, config.layers, config.rank)
    inputs = _some_inputs(tokenizer, split, made_for)
    guarded = guard_checked(victim, lora, len(config.keep_at), inputs)
    guarded.to(best_device())
    length = max_length or choose_length(guarded, tokenizer, split.train, made_for)
    engine = TorchEngine(guarded, tokenizer, length)
    return engine, train_detectors(engine, split, config)


def _some_inputs(tokenizer: PreTrainedTokenizerBase, split: Split, max_length: int) -> Inputs:
    """Return a short text and a long one, of a few that a victim is trained on."""
    few = sorted(split.train[:CHECKED], key=len)
    cut = min(max_length, CHECKED_TOKENS)
    texts = tokenizer([few[0], few[-1]], truncation=True, max_length=cut)["input_ids"]
    encodings = [Encoding(tuple(ids), False) for ids in texts]
    return collate(encodings, int(tokenizer.pad_token_id or 0), torch.device("cpu"))


def _override_test(
    path: Path, engine: TorchEngine, split: Split, given: Sequence[str]
) -> OverrideTest | None:
    """Return an override test without thresholds, sized by clean texts, and write its carriers.

    There is none without carriers, or if the victim reads too little for it.

    Raises:
        DataError: as `choose_carriers` does.
    """
    views = engine.guarded.views
    carriers = choose_carriers(engine, split, views, given)
    if not carriers or engine.window_length < LEAST_READABLE:
        return None
    save_carriers(path, carriers)
    lengths = [len(engine.content(text)) for text in engine.encode(split.held_out)]
    geometry = OverrideGeometry.of(lengths, engine.window_length)
    tokens = [[engine.token_ids(text) for text in own] for own in carriers]
    return OverrideTest(tokens, geometry, engine.guarded.layout, views=views)


def _calibrate(
    path: Path,
    trained: TorchEngine,
    split: Split,
    engine: str,
    frr_budget: float,
    carriers: Sequence[str],
) -> tuple[OverrideRecord | None, list[Calibration]]:
    """Calibrate all runtimes; write carriers and readings into the bundle."""
    test = _override_test(path, trained, split, carriers)
    measured = measure_runtimes(trained, engine, split.calibrate, test, frr_budget)
    layout, views = trained.guarded.layout, trained.guarded.views
    tested = test.tested if test else ()
    calibrated = calibrate_runtimes(measured, layout, frr_budget, views, tested)
    save_readings(path, measured_arrays(measured))
    return override_record(test), calibration_records(measured, calibrated, frr_budget)


def train_detectors(
    engine: TorchEngine,
    split: Split,
    config: PsimConfig,
    loss: Loss | None = None,
) -> Training:
    """Train the adapters of an engine's module, and fit its activation detector."""
    texts, held_out = engine.encode(split.train), engine.encode(split.held_out)
    training = train_psim(engine.guarded, texts, held_out, config, engine.pad_id, loss=loss)
    engine.guarded.activations = fit_activations(engine, texts)
    return training
