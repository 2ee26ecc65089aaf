"""Reports on evaluations: a table, JSON, and a histogram of scores."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from models.detection.screen import FloatArray
from models.offline.evaluation.evaluate import Evaluation
from models.offline.evaluation.metrics import AttackOutcome, Rate

ROWS = {
    "clean accuracy (CA)": "clean_accuracy",
    "attack success rate (ASR)": "attack_success_rate",
    "clean texts rejected (FRR)": "false_rejection_rate",
    "poisoned texts passed (FAR)": "false_acceptance_rate",
    "FAR, backdoor fires": "false_acceptance_rate_firing",
}
"""Field of `AttackOutcome` by the title of its row."""
SHOWN_SCORES = (0.0, 15.0)
"""Range of the histogram; scores beyond it fall into the outermost bars."""


def evaluation_table(evaluation: Evaluation) -> Table:
    """Return a table of all outcomes, in percent with 95 % intervals."""
    counts = f"{len(evaluation.clean_scores)} clean, {len(evaluation.poisoned_scores)}"
    table = Table(
        title="What the attack achieves, and what PSIM stops (%)",
        caption=f"{counts} poisoned texts; brackets show 95 % intervals",
    )
    table.add_column("")
    outcomes = {
        "no defence": evaluation.none,
        "PSIM": evaluation.calibrated,
        "PSIM, unfamiliar rejected too": evaluation.strict,
        "PSIM, 0.7 as in the paper": evaluation.paper,
    }
    for column in outcomes:
        table.add_column(column, justify="right")
    for title, field in ROWS.items():
        table.add_row(title, *(percent(_rate(o, field)) for o in outcomes.values()))
    table.add_row("AUROC", *(_number(o.auroc) for o in outcomes.values()))
    table.add_row("AUROC, backdoor fires", *(_number(o.auroc_firing) for o in outcomes.values()))
    return table


def _rate(outcome: AttackOutcome, field: str) -> Rate | None:
    rate: Rate | None = getattr(outcome, field)
    return rate


def percent(rate: Rate | None) -> str:
    """Return a rate in percent with its interval, or a hyphen if there is none."""
    if rate is None:
        return "-"
    return f"{100 * rate.value:.1f} ({100 * rate.low:.1f}-{100 * rate.high:.1f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Write `evaluation.json`, without the scores of single texts, and `scores.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = dataclasses.asdict(evaluation)
    del content["clean_scores"], content["poisoned_scores"]
    (folder / "evaluation.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    histogram(evaluation).savefig(folder / "scores.png", dpi=120)


def histogram(evaluation: Evaluation) -> Figure:
    """Plot histograms of the scores of clean and poisoned texts, with the thresholds."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    draw_histogram(axes, evaluation.clean_scores, evaluation.poisoned_scores, evaluation.thresholds)
    axes.legend()
    return figure


def draw_histogram(
    axes: Axes, clean: FloatArray, poisoned: FloatArray, thresholds: Mapping[str, float]
) -> None:
    """Draw histograms of scores, shape (n,), and a line for each named threshold."""
    ends = SHOWN_SCORES
    bins = np.linspace(*ends, 61).tolist()
    for name, values, color in (("clean", clean, "tab:blue"), ("poisoned", poisoned, "tab:red")):
        weights = np.full(len(values), 100 / len(values))
        shown = np.clip(values, *ends)
        axes.hist(shown, bins, weights=weights, alpha=0.6, label=name, color=color)
    for (label, threshold), style in zip(
        thresholds.items(), ["--", ":", "-.", "-"] * 99, strict=False
    ):
        axes.axvline(threshold, color="black", linestyle=style, label=f"threshold: {label}")
    axes.set(xlabel="score (standard deviations)", ylabel="% of texts")
    axes.set(yscale="symlog", ylim=(0, 100))
    axes.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
