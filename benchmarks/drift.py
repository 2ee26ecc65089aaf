"""How far apart drift finds texts from those that a bundle was calibrated with, class by class.

The statistic of all texts that pass, and the least and largest of every 500 of them in turn, the
fewest that the alert takes. By how much thresholds would rise if the bundle were recalibrated by
these texts, false alarms marked; and by the passing ones alone, some of which an attacker has sent:
those that pass by least, by the score or one part of it. Nothing is written.

    python benchmarks/drift.py BUNDLE TEXTS.jsonl ...
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from models.bundle import Bundle, load_bundle
from models.calibrate import calibrate
from models.errors import CalibrationError
from models.offline.data import load_samples
from models.offline.predict import predict
from models.offline.recalibrate import limits_of, risen
from models.screen import FloatArray, Verdict, strongest, voices
from service.drift import Comparison, Drift
from service.metrics import Metrics
from service.settings import Mode

LEAST = 500
SHARES = (0.0, 0.05, 0.2, 0.5)
"""Of the texts, the attacker's."""
EXTREME = 0.05
"""Of the passing texts, those that the attacker's are like."""


def compared(bundle: Bundle, verdicts: Sequence[Verdict]) -> Comparison:
    """Compare verdicts of one class."""
    drift = Drift(bundle, Metrics(bundle, Mode.SHADOW))
    drift.add(verdicts)
    return max(drift.measure(), key=lambda one: one.inputs)


def rises(bundle: Bundle, readings: FloatArray) -> list[str]:
    """Return by how much the threshold of each class rises if recalibrated by these texts."""
    manifest, screen = bundle.manifest, bundle.screen
    budget = manifest.calibrations[0].frr_budget
    try:
        after = calibrate(readings, screen.norm.checkpoints, budget)
    except CalibrationError:
        return ["-"] * len(manifest.labels)
    return [
        f"{risen(limits_of(screen, c), limits_of(after, c)):+.2f}"
        for c in range(len(manifest.labels))
    ]


def drifted(bundle: Bundle, files: Sequence[Path], readings: Sequence[FloatArray]) -> Table:
    """Return what drift measures of each file and class."""
    table = Table(title="Drift from the calibration texts")
    for column in (
        "texts", "class", "n", "flagged %", "statistic", f"of every {LEAST}", "p-value", "scores",
        "rise",
    ):  # fmt: skip
        table.add_column(column)
    for file, rows in zip(files, readings, strict=True):
        verdicts = [bundle.screen.judge(row) for row in rows]
        for number, (label, rise) in enumerate(
            zip(bundle.manifest.labels, rises(bundle, rows), strict=True)
        ):
            own = [v for v in verdicts if v.predicted == number]
            passed = [v for v in own if not v.poisoned]
            if not passed:
                continue
            found = compared(bundle, passed)
            parts = [
                compared(bundle, passed[start : start + LEAST]).statistic
                for start in range(0, len(passed) - LEAST + 1, LEAST)
            ]
            table.add_row(
                f"{file.parent.name}/{file.name}",
                label,
                str(found.inputs),
                f"{100 * np.mean([v.poisoned for v in own]):.1f}",
                f"{found.statistic:.3f}",
                f"{min(parts):.3f}-{max(parts):.3f}" if parts else "-",
                f"{found.p_value:.1g}",
                "higher" if found.higher else "lower",
                rise,
            )
    return table


def attacked(bundle: Bundle, file: Path, rows: FloatArray) -> Table:
    """Return by how much thresholds rise if an attacker sends some of the texts."""
    table = Table(title=f"Recalibrated by what passes of {file.parent.name}/{file.name}")
    for column in ("attacker's share", "extreme by", *bundle.manifest.labels):
        table.add_column(column)
    screen, rng = bundle.screen, np.random.default_rng(0)
    verdicts = [screen.judge(row) for row in rows]
    passed = rows[[not v.poisoned for v in verdicts]]
    norm = screen.norm
    predicted, raw = voices(passed, norm.checkpoints)
    parts = norm.parts(predicted, strongest(norm.voices(predicted, raw), norm.checkpoints))
    by = {"score": np.array([v.margin for v in verdicts if not v.poisoned])}
    by |= {name: parts[:, i] for i, name in enumerate(("PSIM", "distance 1", "distance 2"))}
    for share in SHARES:
        for name, extreme in by.items() if share else [("-", by["score"])]:
            likest = np.argsort(extreme)[-round(EXTREME * len(passed)) :]
            sent = rng.choice(likest, round(share / (1 - share) * len(passed)))
            found = rises(bundle, np.concatenate([passed, passed[sent]]))
            table.add_row(f"{share:.0%}", name, *found)
    return table


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle that screens.")],
    files: Annotated[list[Path], typer.Argument(help="Texts, JSONL; each file is a traffic.")],
) -> None:
    """Print a table of what drift measures, and one of what attackers can do to thresholds."""
    loaded = load_bundle(bundle)
    readings = []
    for file in files:
        texts = list(dict.fromkeys(sample.text for sample in load_samples(str(file))))
        readings.append(predict(loaded.engine, loaded.engine.encode(texts)))
    console = Console(width=140)
    console.print(drifted(loaded, files, readings))
    console.print(attacked(loaded, files[0], readings[0]))


if __name__ == "__main__":
    typer.run(main)
