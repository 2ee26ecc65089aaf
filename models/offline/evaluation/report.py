"""Reports on evaluations and bundles: tables, JSON, and a histogram of scores."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from models.bundle.layout import CARRIERS
from models.bundle.manifest import Manifest, RecalibrationRecord
from models.detection.screen import FloatArray
from models.offline.evaluation.evaluate import Evaluation
from models.offline.evaluation.metrics import AttackOutcome, Rate
from models.offline.fitting.psim import UNLEARNT

ROWS = {
    "clean accuracy (CA)": "clean_accuracy",
    "attack success rate (ASR)": "attack_success_rate",
    "clean texts rejected (FRR)": "false_rejection_rate",
    "poisoned texts passed (FAR)": "false_acceptance_rate",
    "FAR, backdoor fires": "false_acceptance_rate_firing",
}
"""Field of `AttackOutcome` by the title of its row."""
MOST_NATURAL = 0.2
"""Share of clean texts that may keep their class beside carriers without a warning."""
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


def manifest_table(manifest: Manifest) -> Table:
    """Return a table of a bundle's victim, training, thresholds and warnings."""
    table = Table(show_header=False, title="PSIM bundle")
    for row in (*_training_rows(manifest), *_runtime_rows(manifest)):
        table.add_row(*row)
    table.add_row("cost", f"{manifest.fit.seconds} s, peak memory {manifest.fit.peak_memory_mb} MB")
    for warning in warnings_of(manifest):
        table.add_row("[bold red]warning[/]", warning)
    return table


def _training_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    fit, psim = manifest.fit, manifest.psim
    yield "victim", f"{manifest.victim.name} ({manifest.victim.architecture})"
    several = " (any number of them)" if manifest.multi_label else ""
    yield "labels", ", ".join(manifest.labels) + several
    yield "reads", f"{manifest.max_length} tokens of a text"
    yield "created", fit.created
    yield "adapter", f"LoRA rank {psim.rank}, top {psim.layers} layer(s), {psim.steps} steps"
    yield "checkpoints", f"steps {', '.join(map(str, psim.checkpoints))}"
    yield "training stopped", psim.stopped_because
    if manifest.activations:
        layers = ", ".join(map(str, manifest.activations.layers))
        yield "hidden states", f"watched after layers {layers}"
    read = "of the last layer is watched" if manifest.attention else "is not watched"
    yield "attention", read
    yield (
        "clean texts",
        f"{fit.texts_train} for training, {fit.texts_stop} for stopping, "
        f"{fit.texts_calibrate} for calibration",
    )
    if test := manifest.override:
        counts = (f"{n} {label}" for n, label in zip(test.carriers, manifest.classes, strict=True))
        yield (
            "override test",
            f"carriers: {', '.join(counts)}. They are clean texts of yours, and {CARRIERS} holds "
            "them; --carriers of psim fit names others",
        )
    if traffic := manifest.recalibration:
        yield (
            "recalibrated",
            f"{traffic.created}, from bundle {traffic.parent[:12]}… on {_counts(traffic)} of "
            f"{traffic.source}, {traffic.first} to {traffic.last}",
        )


def _runtime_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for calibration in manifest.calibrations:
        for group in calibration.groups:
            names = " + ".join(manifest.classes[c] for c in group.classes)
            pooled = " (shared: too few texts for each class)" if len(group.classes) > 1 else ""
            low, high = group.frr_interval
            yield (
                f"threshold {calibration.runtime}",
                f"{names}{pooled}: {group.threshold:.6f}, budget {calibration.frr_budget:.1%}, "
                f"expected FRR {low:.1%}-{high:.1%} ({group.texts} texts)",
            )
        for which, tests in (("", calibration.override), ("thorough ", calibration.thorough)):
            for tested in tests:
                names = " + ".join(manifest.classes[c] for c in tested.classes)
                yield (
                    f"override {which}{calibration.runtime}",
                    f"{names}: {tested.threshold:.6f}, kept from {tested.keeps:.0%}, "
                    f"{tested.natural:.1%} of clean texts are "
                    f"tested and keep their class beside carriers ({tested.texts} texts)",
                )
        parity = calibration.parity
        default = ", the default" if calibration.runtime == manifest.default.runtime else ""
        yield (
            f"parity {calibration.runtime}",
            f"{parity.decisions_agree:.2%} of decisions agree with torch/float32, "
            f"largest difference {parity.largest_difference:.1g}, "
            f"{parity.texts_per_s:.0f} texts/s{default}",
        )


def recalibration_table(record: RecalibrationRecord) -> Table:
    """Return a table of the changes that a recalibration makes."""
    table = Table(
        title="Before and after",
        caption=f"Calibrated on {_counts(record)}. Not used: {record.others} rows of other bundles "
        f"and {record.unmarked} flagged texts without a mark. If those are false alarms, the "
        "thresholds are too low.",
    )
    table.add_column("runtime, class", no_wrap=True)
    for column in (
        "threshold",
        "rise since psim fit",
        "clean texts flagged",
        "poisoned texts flagged",
    ):
        table.add_column(column, justify="right")
    for c in record.changes:
        table.add_row(
            f"{c.runtime}, {c.label}",
            f"{c.before:.3f} → {c.after:.3f}",
            f"{c.risen:+.2f}",
            f"{c.clean_flagged_before} → {c.clean_flagged_after} of {c.clean}",
            f"{c.poisoned_flagged_before} → {c.poisoned_flagged_after} of {c.poisoned}",
        )
    return table


def _counts(record: RecalibrationRecord) -> str:
    clean = f"{record.passed} texts that passed, {record.false_alarms} false alarms"
    return f"{clean} and {record.poisoned} marked poisoned"


def warnings_of(manifest: Manifest) -> list[str]:
    """Return the reasons why a bundle is a poor defence although its files are intact."""
    warnings = []
    if manifest.psim.stopped_because != UNLEARNT:
        warnings.append("PSIM has not unlearnt the task: its confidence barely separates texts")
    if manifest.activations is None:
        warnings.append("all layers are adapted, so no hidden states are watched")
    if manifest.override is None:
        warnings.append("there is no override test: whatever is extreme counts as triggered")
    kept = {
        manifest.classes[c]
        for calibration in manifest.calibrations
        for group in calibration.thorough
        if group.natural > MOST_NATURAL
        for c in group.classes
    }
    if kept:
        warnings.append(
            f"more than {MOST_NATURAL:.0%} of clean texts of {', '.join(sorted(kept))} keep their "
            "class beside carriers: the override test can tell little of them"
        )
    return warnings
