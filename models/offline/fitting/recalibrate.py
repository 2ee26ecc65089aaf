"""From a bundle and the audit of its traffic to a bundle with other thresholds: `psim recalibrate`.

Traffic is written by others, also by those who would have the thresholds rise. So a text is clean
if it passed, or if somebody has looked at it; what was marked poisoned must not pass; and how far
thresholds rise is measured in the standard deviations of `psim fit`, and bounded.
"""

import random
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from models.bundle.load import (
    MANIFEST,
    READINGS,
    file_digest,
    load_bundle,
    read_manifest,
    save_readings,
)
from models.bundle.manifest import ChangeRecord, LimitRecord, Manifest, RecalibrationRecord
from models.detection.screen import FloatArray, Screen, features, min_calibration_size
from models.engines.registry import REFERENCE, Runtime, runs_here
from models.errors import CalibrationError, DataError
from models.offline.fitting.fit import (
    AUTO,
    MAX_CALIBRATE,
    Measured,
    calibrated,
    calibrations_of,
    fastest,
    measure,
    versions_here,
)
from models.offline.io.atomic import replaced
from models.offline.io.samples import check_text


class Kind(IntEnum):
    """What is known of a text; of several rows with it, the least counts."""

    POISONED = 0
    """Marked so."""
    FALSE_ALARM = 1
    """Marked so."""
    UNMARKED = 2
    """Found poisoned, or not screened, and nobody has looked at it."""
    PASSED = 3


class _Row(BaseModel):
    """What is read of a line of the audit's export."""

    time: datetime
    digest: str
    text: str | None
    poisoned: bool | None
    mark: Literal["poisoned", "false_alarm"] | None = None

    @property
    def kind(self) -> Kind:
        match self.mark:
            case "poisoned":
                return Kind.POISONED
            case "false_alarm":
                return Kind.FALSE_ALARM
        return Kind.PASSED if self.poisoned is False else Kind.UNMARKED


@dataclass(frozen=True)
class AuditedTraffic:
    """What an audit's export holds of one bundle's traffic."""

    kinds: Mapping[str, Kind]
    """By text."""
    others: int
    """Rows of other bundles, which may guard other models."""
    source: str
    digest: str
    """Of the export, SHA-256."""
    first: datetime
    last: datetime


@dataclass(frozen=True)
class Recalibration:
    """A bundle that is not written yet."""

    parent: Path
    manifest: Manifest
    """Complete but for the digest of the readings."""
    record: RecalibrationRecord
    readings: Mapping[str, FloatArray]
    """Of the clean texts, by `ENGINE/DTYPE`."""


def read_traffic(file: Path, judge: str) -> AuditedTraffic:
    """Read what `psim audit` has written as JSON Lines of inputs that a bundle judged.

    Args:
        file: the export.
        judge: digest of the bundle.

    Raises:
        DataError: it is no such export, or has no such texts; never says what a text was.
    """
    kinds: dict[str, Kind] = {}
    times: list[datetime] = []
    others = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = _Row.model_validate_json(line)
                if row.digest != judge:
                    others += 1
                    continue
                if row.text and row.text.strip():
                    text = check_text(row.text)
                    kinds[text] = min(kinds.get(text, row.kind), row.kind)
            except (ValidationError, DataError) as error:
                raise DataError(f"{file}, line {number}: {_reason(error)}") from None
            times.append(row.time)
    if not times:
        raise DataError(
            f"{file} has no row by the bundle {judge[:12]}…, and {others} rows of others: "
            "name the bundle that was served"
        )
    if not kinds:
        raise DataError(
            f"{file} has no texts, which have to be scored again: set PSIM_AUDIT_TEXT=true for the "
            "service, and export the audit when it has seen enough traffic"
        )
    return AuditedTraffic(kinds, others, file.name, file_digest(file), min(times), max(times))


def _reason(error: ValidationError | DataError) -> str:
    """Say what is wrong without the line, which holds a text."""
    if isinstance(error, DataError):
        return str(error)
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"])) or "the line"
    return f"not what `psim audit` writes as JSON Lines: {where}: {first['type']}"


def recalibrate(bundle: Path, traffic: AuditedTraffic) -> Recalibration:
    """Calibrate a bundle anew, by the clean texts of its traffic; nothing is written.

    Raises:
        BundleError: it cannot be loaded.
        CalibrationError: there are too few clean texts.
    """
    parent, digest = read_manifest(bundle)
    checkpoints, budget = len(parent.psim.checkpoints), parent.calibrations[0].frr_budget
    chosen = _chosen(traffic.kinds)
    kinds = np.array(list(chosen.values()))
    needed, given = min_calibration_size(budget), int((kinds != Kind.POISONED).sum())
    if given < needed:
        raise CalibrationError(
            f"{given} clean texts are too few for the bundle's false-rejection budget of {budget}: "
            f"it needs {needed}; export more traffic"
        )
    before, measured = _screened(bundle, parent, list(chosen))
    clean, poisoned = kinds != Kind.POISONED, kinds == Kind.POISONED
    of_clean = {r: replace(own, readings=own.readings[clean]) for r, own in measured.items()}
    found = calibrated(of_clean, checkpoints, budget)
    calibrations = calibrations_of(of_clean, found, budget)
    changes: list[ChangeRecord] = []
    for runtime, all_of in measured.items():
        screens = before[runtime], found[runtime][0]
        changes += _changes(parent, runtime, screens, all_of.readings, clean, poisoned)
    record = RecalibrationRecord(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        parent=digest,
        source=traffic.source,
        source_digest=traffic.digest,
        first=traffic.first.isoformat(timespec="seconds"),
        last=traffic.last.isoformat(timespec="seconds"),
        passed=int((kinds == Kind.PASSED).sum()),
        false_alarms=int((kinds == Kind.FALSE_ALARM).sum()),
        poisoned=int(poisoned.sum()),
        unmarked=sum(kind is Kind.UNMARKED for kind in traffic.kinds.values()),
        others=traffic.others,
        changes=changes,
    )
    kept = any(c.runtime == parent.default.runtime and c.parity.passes for c in calibrations)
    update = {
        "calibrations": calibrations,
        "default": parent.default if kept else fastest(calibrations, AUTO),
        "recalibration": record,
        "versions": versions_here(),
    }
    readings = {str(runtime): own.readings for runtime, own in of_clean.items()}
    return Recalibration(bundle, parent.model_copy(update=update), record, readings)


def _screened(
    bundle: Path, parent: Manifest, texts: Sequence[str]
) -> tuple[dict[Runtime, Screen], dict[Runtime, Measured]]:
    """Return screens of a bundle, and what each of its runtimes that runs here makes of texts."""
    screens: dict[Runtime, Screen] = {}
    measured: dict[Runtime, Measured] = {}
    for own in parent.calibrations:
        if own.engine == REFERENCE.engine or runs_here(own.runtime):
            loaded = load_bundle(bundle, own.dtype, own.engine)
            screens[own.runtime] = loaded.screen
            measured[own.runtime] = measure(loaded.engine, loaded.engine.encode(texts))
    return screens, measured


def _chosen(kinds: Mapping[str, Kind]) -> dict[str, Kind]:
    """Return the texts to screen: of clean ones no more than a calibration takes, at random."""
    clean = [text for text, kind in kinds.items() if kind in (Kind.PASSED, Kind.FALSE_ALARM)]
    if len(clean) > MAX_CALIBRATE:
        clean = random.Random(0).sample(clean, MAX_CALIBRATE)
    poisoned = [text for text, kind in kinds.items() if kind is Kind.POISONED]
    return {text: kinds[text] for text in [*clean, *poisoned]}


def _changes(
    parent: Manifest,
    runtime: Runtime,
    screens: tuple[Screen, Screen],
    readings: FloatArray,
    clean: NDArray[np.bool_],
    poisoned: NDArray[np.bool_],
) -> list[ChangeRecord]:
    """Return what another screen changes for each class; the masks are of texts, shape (n,)."""
    predicted, _ = features(readings, len(parent.psim.checkpoints))
    was, now = (screen.flags(readings) for screen in screens)
    before, after = screens
    earlier = parent.recalibration.changes if parent.recalibration else []
    fitted = {(c.runtime, c.label): c.fitted for c in earlier}
    changes = []
    for number, label in enumerate(parent.labels):
        own = predicted == number
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
                clean=int((own & clean).sum()),
                clean_flagged_before=int((own & clean & was).sum()),
                clean_flagged_after=int((own & clean & now).sum()),
                poisoned=int((own & poisoned).sum()),
                poisoned_flagged_before=int((own & poisoned & was).sum()),
                poisoned_flagged_after=int((own & poisoned & now).sum()),
            )
        )
    return changes


def limits_of(screen: Screen, predicted: int) -> list[LimitRecord]:
    """Return how far each feature may go alone in texts of a class, when all others are silent.

    Thresholds of two screens do not compare, since each is in standard deviations of its own
    texts. What a detector may say before a text is called poisoned does.
    """
    features_of, components, own = (
        screen.normalizer.features,
        screen.normalizer.components,
        predicted,
    )
    limits = []
    for detector, (centre, scale) in enumerate(
        zip(features_of.centre[own], features_of.scale[own], strict=True)
    ):
        part = max(
            detector - screen.normalizer.checkpoints + 1, 0
        )  # checkpoints have one in the score
        unit = scale * components.scale[own, part]
        least = centre + scale * components.centre[own, part] + unit * screen.threshold_of(own)
        limits.append(LimitRecord(least=float(least), unit=float(unit)))
    return limits


def risen(before: Sequence[LimitRecord], after: Sequence[LimitRecord]) -> float:
    """Return by how many standard deviations of `before` a detector may say more, at most."""
    return max((b.least - a.least) / a.unit for a, b in zip(before, after, strict=True))


def check(record: RecalibrationRecord, max_rise: float, accept_misses: bool) -> None:
    """Refuse what an attacker may have brought about.

    Raises:
        CalibrationError: texts that were marked poisoned would pass by some runtime, or a
            threshold has risen by more than may be.
    """
    missed: Counter[Runtime] = Counter()
    for change in record.changes:
        missed[change.runtime] += change.poisoned - change.poisoned_flagged_after
    misses = max(missed.values())
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
    """Write the bundle; nothing else of it differs from its parent's files.

    Raises:
        BundleError: the parent has changed meanwhile.
    """
    with replaced(out) as partial:
        others = shutil.ignore_patterns(MANIFEST, READINGS)
        shutil.copytree(new.parent, partial, ignore=others, dirs_exist_ok=True)
        save_readings(partial, new.readings)
        files = new.manifest.files | {READINGS: file_digest(partial / READINGS)}
        manifest = new.manifest.model_copy(update={"files": files})
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        load_bundle(partial)
