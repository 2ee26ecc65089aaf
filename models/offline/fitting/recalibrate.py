"""From a bundle and the audit of its traffic to a bundle with new thresholds: `psim recalibrate`.

Attackers write traffic too, and want the thresholds to rise. So a text counts as clean only if it
passed or somebody has marked it; texts marked poisoned must not pass; and the rise of the
thresholds, in standard deviations of `psim fit`, is bounded.
"""

import random
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.bundle.digests import file_digest
from models.bundle.layout import MANIFEST, READINGS
from models.bundle.load import load_bundle
from models.bundle.manifest import (
    Calibration,
    ChangeRecord,
    LimitRecord,
    Manifest,
    RecalibrationRecord,
    RuntimeRecord,
)
from models.bundle.save import save_readings
from models.bundle.verify import read_manifest
from models.detection.conformal import min_calibration_size
from models.detection.screen import FloatArray, Screen, features
from models.engines.base import REFERENCE, Runtime
from models.engines.registry import runs_here
from models.errors import CalibrationError
from models.offline.fitting.records import (
    calibration_records,
    complete_bundle,
    installed_versions,
    timestamp,
)
from models.offline.fitting.runtimes import (
    AUTO,
    RuntimeMeasurement,
    calibrate_runtimes,
    fastest,
    measure,
    measured_arrays,
    quickest,
    with_shared_outcomes,
)
from models.offline.fitting.split import MAX_CALIBRATE
from models.offline.fitting.traffic import AuditedTraffic, Kind
from models.offline.io.atomic import replaced


@dataclass(frozen=True)
class Recalibration:
    """A recalibrated bundle that is not written yet."""

    parent: Path
    manifest: Manifest
    """Manifest of the new bundle, except for the digest of the readings."""
    record: RecalibrationRecord
    readings: Mapping[str, FloatArray]
    """Readings of the clean texts, and outcomes of override tests, as the bundle names them."""


def recalibrate(bundle: Path, traffic: AuditedTraffic) -> Recalibration:
    """Calibrate a bundle anew on the clean texts of its traffic; writes nothing.

    Raises:
        BundleError: the bundle cannot be loaded.
        CalibrationError: there are too few clean texts.
    """
    parent, digest = read_manifest(bundle)
    budget = parent.calibrations[0].frr_budget
    kinds = _sampled(traffic)
    clean = np.array([kind is not Kind.POISONED for kind in kinds.values()], np.bool_)
    _check_enough(int(clean.sum()), budget, len(parent.views))
    before, measured = _measure_all(bundle, parent, list(kinds), int(clean.sum()))
    on_clean = {r: replace(own, readings=own.readings[clean]) for r, own in measured.items()}
    after = calibrate_runtimes(on_clean, parent.layout, budget, parent.views, parent.tested_views)
    calibrations = calibration_records(on_clean, after, budget)
    changes: list[ChangeRecord] = []
    for runtime, own in measured.items():
        screens = before[runtime], after[runtime].screen[0]
        changes += _changes(parent, runtime, screens, own.readings, clean)
    record = _record(traffic, digest, kinds, changes)
    manifest = parent.model_copy(
        update={
            "calibrations": calibrations,
            "default": _default(parent, calibrations),
            "recalibration": record,
            "versions": installed_versions(),
        }
    )
    return Recalibration(bundle, manifest, record, measured_arrays(on_clean))


def _sampled(traffic: AuditedTraffic) -> dict[str, Kind]:
    """Return the texts to screen: all poisoned ones, and at most `MAX_CALIBRATE` clean ones.

    Where the audit sampled what passed, false alarms are thinned to the same rate: with all of
    them among few others, the thresholds would come out too high.
    """
    kinds, chance = traffic.kinds, random.Random(0)
    clean = [text for text, kind in kinds.items() if kind in (Kind.PASSED, Kind.FALSE_ALARM)]
    lowest = min((traffic.rates[text] for text in clean), default=1.0)
    clean = [text for text in clean if chance.random() < lowest / traffic.rates[text]]
    if len(clean) > MAX_CALIBRATE:
        clean = random.Random(0).sample(clean, MAX_CALIBRATE)
    poisoned = [text for text, kind in kinds.items() if kind is Kind.POISONED]
    return {text: kinds[text] for text in [*clean, *poisoned]}


def _check_enough(clean: int, budget: float, views: int) -> None:
    if clean < (needed := min_calibration_size(budget / views)):
        raise CalibrationError(
            f"{clean} clean texts are too few for the bundle's false-rejection budget of {budget}: "
            f"it needs {needed}; export more traffic"
        )


def _measure_all(
    bundle: Path, parent: Manifest, texts: Sequence[str], clean: int
) -> tuple[dict[Runtime, Screen], dict[Runtime, RuntimeMeasurement]]:
    """Return the screen of each runtime that works here, and its measurement on texts.

    The first `clean` texts are the clean ones.
    """
    screens: dict[Runtime, Screen] = {}
    measured: dict[Runtime, RuntimeMeasurement] = {}
    able = [
        own
        for own in parent.calibrations
        if own.engine == REFERENCE.engine or runs_here(own.runtime)
    ]
    tester = quickest([own.runtime for own in able])
    for own in able:
        loaded = load_bundle(bundle, own.dtype, own.engine)
        screens[own.runtime] = loaded.screen
        tests = loaded.override if own.runtime == tester else None
        test = tests.uncalibrated() if tests else None
        measured[own.runtime] = measure(loaded.engine, texts, test, own.frr_budget, texts[:clean])
    return screens, with_shared_outcomes(measured)


def _changes(
    parent: Manifest,
    runtime: Runtime,
    screens: tuple[Screen, Screen],
    readings: FloatArray,
    clean: NDArray[np.bool_],
) -> list[ChangeRecord]:
    """Return the changes by class; `clean`, shape (n,), tells clean texts from poisoned ones."""
    before, after = screens
    by_view = [features(readings, parent.layout.checkpoints, view)[0] for view in parent.views]
    was, now = before.flags(readings), after.flags(readings)
    earlier = parent.recalibration.changes if parent.recalibration else []
    fitted = {(c.runtime, c.label): c.fitted for c in earlier}
    changes = []
    for number, label in enumerate(parent.classes):
        own = np.any([predicted == number for predicted in by_view], axis=0)
        good, bad = own & clean, own & ~clean
        limits = fitted.get((runtime, label)) or limits_of(before, number)
        changes.append(
            ChangeRecord(
                engine=runtime.engine,
                dtype=runtime.dtype,
                label=label,
                before=before.threshold_of(number),
                after=after.threshold_of(number),
                fitted=limits,
                risen=risen(limits, limits_of(after, number)),
                clean=int(good.sum()),
                clean_flagged_before=int((good & was).sum()),
                clean_flagged_after=int((good & now).sum()),
                poisoned=int(bad.sum()),
                poisoned_flagged_before=int((bad & was).sum()),
                poisoned_flagged_after=int((bad & now).sum()),
            )
        )
    return changes


def _record(
    traffic: AuditedTraffic, parent: str, kinds: Mapping[str, Kind], changes: list[ChangeRecord]
) -> RecalibrationRecord:
    used = Counter(kinds.values())
    return RecalibrationRecord(
        created=timestamp(),
        parent=parent,
        source=traffic.source,
        source_digest=traffic.digest,
        first=traffic.first.isoformat(timespec="seconds"),
        last=traffic.last.isoformat(timespec="seconds"),
        passed=used[Kind.PASSED],
        false_alarms=used[Kind.FALSE_ALARM],
        poisoned=used[Kind.POISONED],
        unmarked=sum(kind is Kind.UNMARKED for kind in traffic.kinds.values()),
        others=traffic.others,
        changes=changes,
    )


def _default(parent: Manifest, calibrations: Sequence[Calibration]) -> RuntimeRecord:
    """Return the parent's default runtime if it still agrees with the reference."""
    default = parent.default
    if any(c.runtime == default.runtime and c.parity.agrees for c in calibrations):
        return default
    return fastest(calibrations, AUTO)


def limits_of(screen: Screen, predicted: int) -> list[LimitRecord]:
    """Return the limit of each feature in texts of a class, when all other features are silent.

    Thresholds of two screens do not compare, since each is in standard deviations of its own
    texts. The values of a feature from which a text is called poisoned do.
    """
    own, components = screen.normalizer.features, screen.normalizer.components
    centres, scales = own.centre[predicted], own.scale[predicted]
    by_detector = screen.normalizer.layout.by_detector(len(centres))
    limits = []
    # A detector's features share one component of the score.
    for component, theirs in enumerate(by_detector.values()):
        for centre, scale in zip(centres[theirs], scales[theirs], strict=True):
            unit = scale * components.scale[predicted, component]
            mean = centre + scale * components.centre[predicted, component]
            least = mean + unit * screen.threshold_of(predicted)
            limits.append(LimitRecord(least=float(least), unit=float(unit)))
    return limits


def risen(before: Sequence[LimitRecord], after: Sequence[LimitRecord]) -> float:
    """Return the largest rise of a feature's limit, in standard deviations of `before`."""
    return max((b.least - a.least) / a.unit for a, b in zip(before, after, strict=True))


def check(record: RecalibrationRecord, max_rise: float, accept_misses: bool) -> None:
    """Refuse changes that an attacker may have brought about.

    Raises:
        CalibrationError: texts that were marked poisoned would pass, or a threshold has risen by
            more than `max_rise`.
    """
    missed: Counter[Runtime] = Counter()
    marked: Counter[Runtime] = Counter()
    for change in record.changes:
        missed[change.runtime] += change.poisoned - change.poisoned_flagged_after
        marked[change.runtime] += change.poisoned
    # A text of a multi-label victim has a class for each label, and is counted with each.
    misses = max(missed[own] * record.poisoned // max(marked[own], 1) for own in missed)
    if misses and not accept_misses:
        raise CalibrationError(
            f"{misses} of {record.poisoned} texts that were marked poisoned would pass; look at "
            "them again, or add --accept-misses"
        )
    worst = max(record.changes, key=lambda change: change.risen)
    if worst.risen > max_rise:
        raise CalibrationError(
            f"{worst.label} ({worst.runtime}): the threshold would rise by {worst.risen:.2f} "
            f"standard deviations since `psim fit`, {max_rise:g} are allowed; if you trust this "
            "traffic, say so with --max-rise"
        )


def write(new: Recalibration, out: Path) -> None:
    """Write the bundle; all other files are its parent's.

    Raises:
        BundleError: the parent has changed meanwhile.
    """
    with replaced(out) as partial:
        others = shutil.ignore_patterns(MANIFEST, READINGS)
        shutil.copytree(new.parent, partial, ignore=others, dirs_exist_ok=True)
        save_readings(partial, new.readings)
        files = new.manifest.files | {READINGS: file_digest(partial / READINGS)}
        manifest = new.manifest.model_copy(update={"files": files})
        complete_bundle(partial, manifest)
