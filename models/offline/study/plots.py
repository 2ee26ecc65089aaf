"""Plots of a study: backdoors in tuned victims, and PSIM's separation of texts."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from models.detection.calibrate import calibrate
from models.detection.screen import FloatArray, Layout, Screen
from models.offline.attacks.strategy import Strategy
from models.offline.evaluation.evaluate import ScreenedTexts
from models.offline.evaluation.metrics import Classes, auroc, measure_outcome, within_class_scores
from models.offline.evaluation.report import draw_histogram
from models.offline.study.experiment import load_scores

Row = Mapping[str, Any]
BUDGET = 0.01
"""False-rejection budget for which plots mark thresholds and rates."""


def attack_figure(rates: pd.DataFrame) -> Figure:
    """Plot attack success without a defence as bars, with one panel per data set.

    Args:
        rates: `value`, `low` and `high` in percent, indexed by data set, attack and strategy.
    """
    panels = list(rates.groupby(level="data", observed=True))
    strategies = list(rates.index.unique("strategy").sort_values())
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns + 1.6, 3.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for axes, (data, panel) in zip(grid, panels, strict=False):
        _bars(axes, panel.droplevel("data"), strategies)
        axes.set(title=str(data), ylim=(0, 105))
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.supylabel("ASR without a defence, %", fontsize="medium")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def _bars(axes: Axes, rates: pd.DataFrame, strategies: list[str]) -> None:
    attacks = list(rates.index.unique("attack").sort_values())
    width = 0.8 / len(strategies)
    for number, strategy in enumerate(strategies):
        bars = rates.reindex([(attack, strategy) for attack in attacks])
        errors = bars["value"] - bars["low"], bars["high"] - bars["value"]
        places = np.arange(len(attacks)) + (number + 0.5) * width - 0.4
        # Rounding may put a limit on the wrong side of the value, which matplotlib rejects.
        yerr = np.clip(errors, 0, None)
        axes.bar(places, bars["value"], width, yerr=yerr, capsize=2, label=str(strategy))
    axes.set_xticks(range(len(attacks)), [textwrap.fill(str(name), 14) for name in attacks])


def shown_cells(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the cells to plot by data set: the first of each attack, preferably with LoRA."""
    chosen: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["data"], row["attack"]
        better = key not in chosen or (_tuned_with_lora(row) > _tuned_with_lora(chosen[key]))
        if _psim_name(row) is not None and better:
            chosen[key] = row
    names = dict.fromkeys(data for data, _ in chosen)
    return {name: [row for (data, _), row in chosen.items() if data == name] for name in names}


def _tuned_with_lora(row: Row) -> bool:
    return bool(row["strategy"] == Strategy.LORA)


def _psim_name(row: Row) -> str | None:
    """Return the name of the first PSIM variant, if there is one."""
    return next((name for name, found in row["defences"].items() if found.get("scores")), None)


def has_scores(row: Row, steps: Path) -> bool:
    """Return whether the scores of a cell's texts are there; a row is kept without them."""
    psim = row["defences"].get(_psim_name(row) or "")
    return psim is not None and all((steps / f).exists() for f in (row["bare"], psim["scores"]))


def psim_figure(cells: Sequence[Row], steps: Path) -> Figure:
    """Plot scores, ROC curve and trade-off of the first PSIM variant, with one row per cell.

    Args:
        cells: rows of one data set, chosen by `shown_cells`.
        steps: folder that the files named in the rows are relative to.
    """
    figure = Figure(figsize=(13, 3.9 * len(cells)), layout="constrained")
    for part, row in zip(figure.subfigures(len(cells), squeeze=False).flat, cells, strict=True):
        scores = _Scores.load(row, steps)
        for axes, draw in zip(part.subplots(1, 3), (_histogram, _roc, _trade_off), strict=True):
            draw(axes, scores)
            # Above the panel, the legend covers nothing.
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
        title = f"{row['attack']}: {_psim_name(row)}, {row['strategy']}, seed {row['seed']}"
        part.suptitle(title, fontweight="bold")
    return figure


@dataclass(frozen=True)
class _Scores:
    """Outputs of victim and screens on one cell; `known` are the calibration texts.

    The readings contain only the features that the first rule of the recipe uses.
    """

    truth: Classes
    targets: Classes
    predicted_clean: Classes
    predicted_poisoned: Classes
    known: FloatArray
    clean: FloatArray
    poisoned: FloatArray
    labels: list[str]
    layout: Layout

    @staticmethod
    def load(row: Row, steps: Path) -> "_Scores":
        psim = row["defences"][_psim_name(row)]
        arrays = {**load_scores(steps / row["bare"]), **load_scores(steps / psim["scores"])}
        del arrays["dev"]
        for kind in ("known", "clean", "poisoned"):
            arrays[kind] = arrays[kind][:, : psim["features"]]
        checkpoints = len(psim["checkpoints"])
        layout = Layout(checkpoints, psim["features"] > checkpoints and psim["attention"])
        return _Scores(**arrays, labels=row["labels"], layout=layout)

    @property
    def least_budget(self) -> float:
        """The smallest budget that the number of calibration texts allows."""
        return 1 / (len(self.known) + 1)

    @property
    def marked_budget(self) -> float:
        return max(BUDGET, self.least_budget)

    def screen_at(self, budget: float) -> Screen:
        """Return a screen with thresholds for a budget."""
        return calibrate(self.known, self.layout, budget)

    def screened_at(self, budget: float) -> tuple[ScreenedTexts, ScreenedTexts]:
        """Return the clean and the poisoned texts, screened with thresholds for a budget."""
        screen = self.screen_at(budget)
        return (
            ScreenedTexts.of_first_stage(screen, self.clean, self.predicted_clean),
            ScreenedTexts.of_first_stage(screen, self.poisoned, self.predicted_poisoned),
        )


def _histogram(axes: Axes, scores: _Scores) -> None:
    clean, poisoned = scores.screened_at(scores.marked_budget)
    thresholds = {
        ", ".join(scores.labels[index] for index in group.classes): group.threshold
        for group in scores.screen_at(scores.marked_budget).groups
    }
    draw_histogram(axes, clean.scores, poisoned.scores, thresholds)


def _roc(axes: Axes, scores: _Scores) -> None:
    screened = scores.screened_at(scores.marked_budget)
    clean, poisoned = (within_class_scores(texts.verdicts) for texts in screened)
    left = 50 / len(clean)  # half a text, in place of zero on the log axis
    fires = scores.predicted_poisoned == scores.targets
    for name, subset, style in (
        ("all", poisoned, "k-"),
        ("backdoor fires", poisoned[fires], "r--"),
    ):
        area = auroc(clean, subset)
        if area is not None:
            truth = np.repeat([0, 1], [len(clean), len(subset)])
            false, true, _ = roc_curve(truth, np.r_[clean, subset], drop_intermediate=False)
            axes.step(
                np.maximum(100 * false, left), 100 * true, style, where="post",
                label=f"{name}: AUROC {area:.4f}",
            )  # fmt: skip
    chance = np.geomspace(left, 100)
    axes.plot(chance, chance, ":", color="grey", label="chance")
    axes.set(xlabel="clean texts rejected, %", ylabel="poisoned texts rejected, %", xscale="log")
    axes.set(xlim=(left, 100), ylim=(-2, 102))
    axes.xaxis.set_major_formatter("{x:g}")


def _trade_off(axes: Axes, scores: _Scores) -> None:
    budgets = np.geomspace(scores.least_budget, 0.5, 25)
    marked = scores.marked_budget
    outcomes = [
        measure_outcome(clean.calibrated, scores.truth, poisoned.calibrated, scores.targets)
        for clean, poisoned in map(scores.screened_at, (marked, *budgets))
    ]
    for name, rates, color in (
        ("CA", [o.clean_accuracy for o in outcomes], "tab:blue"),
        ("ASR", [o.attack_success_rate for o in outcomes], "tab:red"),
    ):
        if known := [100 * rate.value for rate in rates if rate]:  # no CA without true classes
            at_marked, *swept = known
            label = f"{name}: {at_marked:.1f} % at {100 * marked:.2g} %"
            axes.plot(100 * budgets, swept, color=color, label=label)
            axes.plot([100 * marked], [at_marked], "o", color=color)
    axes.set(xlabel="false-rejection budget, %", ylabel="CA and ASR, %", xscale="log")
    axes.set_ylim(-2, 102)
    axes.xaxis.set_major_formatter("{x:g}")
