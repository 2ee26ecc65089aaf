"""How far apart drift finds texts from those that a bundle was calibrated with, class by class.

The statistic of all texts that pass, and the least and largest of every 500 of them in turn, the
fewest that the alert takes; and by how much thresholds would rise if the bundle were recalibrated
by these texts, false alarms marked. Nothing is written.

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
from models.offline.recalibrate import rise_of
from models.screen import Screen, Verdict
from service.drift import Comparison, Drift
from service.metrics import Metrics
from service.settings import Mode

LEAST = 500


def compared(bundle: Bundle, verdicts: Sequence[Verdict]) -> Comparison:
    """Compare verdicts of one class."""
    drift = Drift(bundle, Metrics(bundle, Mode.SHADOW))
    drift.add(verdicts)
    return max(drift.measure(), key=lambda one: one.inputs)


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle that screens.")],
    files: Annotated[list[Path], typer.Argument(help="Texts, JSONL; each file is a traffic.")],
) -> None:
    """Print a table of what drift measures."""
    loaded = load_bundle(bundle)
    budget = loaded.manifest.calibrations[0].frr_budget
    table = Table(title="Drift from the calibration texts")
    for column in (
        "texts", "class", "n", "flagged %", "statistic", f"of every {LEAST}", "p-value", "scores",
        "rise",
    ):  # fmt: skip
        table.add_column(column)
    for file in files:
        texts = list(dict.fromkeys(sample.text for sample in load_samples(str(file))))
        readings = predict(loaded.engine, loaded.engine.encode(texts))
        verdicts = [loaded.screen.judge(row) for row in readings]
        try:
            after: Screen | None = calibrate(readings, loaded.screen.norm.checkpoints, budget)
        except CalibrationError:
            after = None
        for number, label in enumerate(loaded.manifest.labels):
            own = [v for v in verdicts if v.predicted == number]
            passed = [v for v in own if not v.poisoned]
            if not passed:
                continue
            found = compared(loaded, passed)
            parts = [
                compared(loaded, passed[start : start + LEAST]).statistic
                for start in range(0, len(passed) - LEAST + 1, LEAST)
            ]
            table.add_row(
                str(file.relative_to(file.parent.parent)),
                label,
                str(found.inputs),
                f"{100 * np.mean([v.poisoned for v in own]):.1f}",
                f"{found.statistic:.3f}",
                f"{min(parts):.3f}-{max(parts):.3f}" if parts else "-",
                f"{found.p_value:.1g}",
                "higher" if found.higher else "lower",
                "-" if after is None else f"{rise_of(loaded.screen, after, number):+.2f}",
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
