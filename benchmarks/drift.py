"""How far apart drift finds texts from those that a bundle was calibrated with, class by class.

The statistic of all texts that pass, and the least and largest of every 500 of them in turn, the
fewest that the alert takes; by how much thresholds rise if the bundle is recalibrated by these
texts, false alarms marked. With poisoned texts, also what becomes of the thresholds for the first
file if an attacker sends, again and again, what just passes of the others, or has poisoned texts
marked as false alarms. Nothing is written.

    python benchmarks/drift.py BUNDLE TEXTS.jsonl ... [--poisoned POISONED.jsonl]
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from models.bundle.load import Bundle, load_bundle
from models.detection.calibrate import calibrate
from models.detection.screen import FloatArray, Screen, Verdict
from models.offline.fitting.recalibrate import limits_of, risen
from models.offline.io.inference import predict
from models.offline.io.samples import load_samples
from service.observability.drift import Comparison, Drift

LEAST = 500
SHARES, ROUNDS, EXTREME = (0.0, 0.05, 0.2, 0.5), 6, 60
"""The attacker's share of the traffic, how often it is recalibrated, and how many texts he has."""
MARKED = (0, 5, 10, 20, 40)
"""Poisoned texts that are marked as false alarms."""


def compared(bundle: Bundle, verdicts: Sequence[Verdict]) -> Comparison:
    """Compare verdicts of one class."""
    drift = Drift(bundle)
    drift.add(verdicts)
    return max(drift.measure(), key=lambda one: one.inputs)


def rises(bundle: Bundle, after: Screen) -> list[str]:
    """Return by how much the threshold of each class has risen."""
    return [
        f"{risen(limits_of(bundle.screen, c), limits_of(after, c)):+.2f}"
        for c in range(len(bundle.manifest.labels))
    ]


def recalibrated(bundle: Bundle, readings: FloatArray) -> Screen:
    budget = bundle.manifest.calibrations[0].frr_budget
    return calibrate(readings, bundle.manifest.layout, budget)


def passes(screen: Screen, readings: FloatArray) -> NDArray[np.bool_]:
    return ~screen.flags(readings)


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
        after = rises(bundle, recalibrated(bundle, rows))
        for number, (label, rise) in enumerate(zip(bundle.manifest.labels, after, strict=True)):
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


def attacked(
    bundle: Bundle, traffic: FloatArray, others: FloatArray, poisoned: FloatArray
) -> Table:
    """Return what becomes of the thresholds for some traffic under attack."""
    table = Table(title="Recalibrated under attack")
    for column in ("attacker", *bundle.manifest.labels, "poisoned that pass, %", "flagged, %"):
        table.add_column(column)

    def add(name: str, after: Screen) -> None:
        shares = passes(after, poisoned).mean(), 1 - passes(after, traffic).mean()
        table.add_row(name, *rises(bundle, after), *(f"{100 * share:.1f}" for share in shares))

    for share in SHARES:
        screen = bundle.screen
        for _ in range(ROUNDS):
            passed = traffic[passes(screen, traffic)]
            candidates = others[passes(screen, others)]
            margins = [screen.judge(row).margin for row in candidates]
            sent = np.resize(
                np.argsort(margins)[-EXTREME:], round(share / (1 - share) * len(passed))
            )
            screen = recalibrated(bundle, np.concatenate([passed, candidates[sent]]))
        add(f"sends {share:.0%} of what is used, {ROUNDS} times", screen)
    for marked in MARKED:
        after = recalibrated(bundle, np.concatenate([traffic, poisoned[:marked]]))
        add(f"{marked} poisoned texts are marked as false alarms", after)
    return table


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle that screens.")],
    files: Annotated[list[Path], typer.Argument(help="Texts, JSONL; each file is a traffic.")],
    poisoned: Annotated[Path | None, typer.Option(help="Poisoned texts.")] = None,
) -> None:
    """Print a table of what drift measures, and one of what attackers can do to thresholds."""
    loaded = load_bundle(bundle)
    console = Console(width=140)

    def read(file: Path) -> FloatArray:
        texts = list(dict.fromkeys(sample.text for sample in load_samples(str(file))))
        return predict(loaded.engine, loaded.engine.encode(texts))

    readings = [read(file) for file in files]
    console.print(drifted(loaded, files, readings))
    if poisoned:
        others = np.concatenate(readings[1:] or readings)
        console.print(attacked(loaded, readings[0], others, read(poisoned)))


if __name__ == "__main__":
    typer.run(main)
