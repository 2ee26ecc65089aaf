"""The manifest's records of a victim, its training and its calibrations."""

import platform
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from torch import nn

from models.bundle.load import load_bundle
from models.bundle.manifest import (
    ActivationsRecord,
    Calibration,
    FitRecord,
    GroupRecord,
    Manifest,
    OverrideGroupRecord,
    OverrideRecord,
    ParityRecord,
    PsimRecord,
    VictimRecord,
)
from models.bundle.save import save_manifest
from models.detection.calibrate import parity
from models.detection.conformal import ThresholdGroup, allowed_rejections
from models.detection.override import OverrideGroup, OverrideTest
from models.engines.base import REFERENCE, RUNTIMES, Runtime
from models.engines.registry import is_installed
from models.network.guarded import Guarded
from models.offline.fitting.psim import PsimConfig, Training
from models.offline.fitting.runtimes import CalibratedRuntime, RuntimeMeasurement
from models.offline.fitting.split import Split
from models.offline.io.classifiers import pretrained_model
from models.offline.statistics import clopper_pearson

PACKAGES = ("psim-gateway", "torch", "transformers", "peft", "tokenizers")
"""Packages that readings depend on, besides the engines."""


def timestamp() -> str:
    """Return the time, ISO 8601, in UTC and whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def installed_versions() -> dict[str, str]:
    """Return the versions of all that readings depend on."""
    packages = [*PACKAGES, *(r.engine for r in RUNTIMES if is_installed(r.engine))]
    return {p: version(p) for p in packages} | {"python": platform.python_version()}


def victim_record(victim: nn.Module, name: str, digest: str) -> VictimRecord:
    """Return the record of a victim, given the digest of its files."""
    model = pretrained_model(victim)
    return VictimRecord(
        name=name,
        model_type=str(model.config.model_type),
        architecture=type(model).__name__,
        digest=digest,
    )


def psim_record(config: PsimConfig, training: Training) -> PsimRecord:
    """Return the record of a training."""
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


def activations_record(guarded: Guarded) -> ActivationsRecord | None:
    """Return the record of the activation detector; None without one."""
    return ActivationsRecord(layers=guarded.trunk.watched) if guarded.activations else None


def fit_record(split: Split, started: float) -> FitRecord:
    """Return the cost of a fit that started at `started`, a time of `time.perf_counter`."""
    # ru_maxrss is in KiB on Linux.
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return FitRecord(
        created=timestamp(),
        texts_train=len(split.train),
        texts_stop=len(split.held_out),
        texts_calibrate=len(split.calibrate),
        seconds=round(time.perf_counter() - started, 1),
        peak_memory_mb=peak_kib // 1024,
    )


def calibration_records(
    measured: Mapping[Runtime, RuntimeMeasurement],
    calibrated: Mapping[Runtime, CalibratedRuntime],
    frr_budget: float,
) -> list[Calibration]:
    """Return the records of calibrated runtimes; `REFERENCE` must be one of them."""
    calibrations = []
    for runtime, own in calibrated.items():
        compared = asdict(parity(calibrated[REFERENCE].screen, own.screen))
        calibrations.append(
            Calibration(
                engine=runtime.engine,
                dtype=runtime.dtype,
                frr_budget=frr_budget,
                parity=ParityRecord(**compared, texts_per_s=measured[runtime].texts_per_s),
                groups=[
                    _group_record(group, frr_budget / len(own.screen[0].views))
                    for group in own.screen[0].groups
                ],
                override=[_override_group_record(group) for group in own.override],
                thorough=[_override_group_record(group) for group in own.thorough],
            )
        )
    return calibrations


def _group_record(group: ThresholdGroup, frr_budget: float) -> GroupRecord:
    n = len(group.scores)
    return GroupRecord(
        classes=list(group.classes),
        texts=n,
        threshold=group.threshold,
        rejected=int((group.scores >= group.threshold).sum()),
        frr_interval=clopper_pearson(allowed_rejections(n, frr_budget), n),
    )


def _override_group_record(group: OverrideGroup) -> OverrideGroupRecord:
    return OverrideGroupRecord(
        classes=list(group.classes),
        texts=len(group.scores),
        threshold=group.threshold,
        keeps=group.keeps,
        natural=float((group.scores > 0).mean()),
    )


def override_record(test: OverrideTest | None) -> OverrideRecord | None:
    """Return the record of an override test; None without one."""
    if test is None:
        return None
    return OverrideRecord(
        window=test.geometry.window,
        carrier=test.geometry.carrier,
        carriers=[len(own) for own in test.carriers],
    )


def complete_bundle(path: Path, manifest: Manifest) -> Manifest:
    """Write the manifest, and load the bundle: it should fail here, and not in the service.

    Returns the manifest.

    Raises:
        BundleError: it does not load.
    """
    save_manifest(path, manifest)
    load_bundle(path)
    return manifest
