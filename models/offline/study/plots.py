"""Plots of a study: backdoors in tuned victims, and how PSIM separates texts."""

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
from models.detection.screen import FloatArray
from models.offline.attacks.strategy import Strategy
from models.offline.evaluation.evaluate import View
from models.offline.evaluation.metrics import Classes, auroc, outcome, within_class_scores
from models.offline.evaluation.report import draw_histogram
from models.offline.study.experiment import load_scores

Row = Mapping[str, Any]
BUDGET = 0.01
"""False-rejection budget at which plots mark thresholds and rates."""


def attack_figure(rates: pd.DataFrame) -> Figure:
    """Plot attack success without a defence as bars, with one panel per data set.

    Args:
        rates: `value`, `low` and `high` in percent, indexed by data set, attack and strategy.
    """
    panels = list(rates.groupby(level="data", observed=True))
    strategies = list(rates.index.unique("strategy").sort_values())
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns + 1.6, 3.2 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axes, (data, own) in zip(grid, panels, strict=False):
        _bars(axes, own.droplevel("data"), strategies)
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
        own = rates.reindex([(attack, strategy) for attack in attacks])
        errors = own["value"] - own["low"], own["high"] - own["value"]
        places = np.arange(len(attacks)) + (number + 0.5) * width - 0.4
        # Rounding may put a limit on the wrong side of the value, which matplotlib refuses.
        yerr = np.clip(errors, 0, None)
        axes.bar(places, own["value"], width, yerr=yerr, capsize=2, label=str(strategy))
    axes.set_xticks(range(len(attacks)), [textwrap.fill(str(name), 14) for name in attacks])


def shown_cells(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Choose the cells to plot, by data set: the first of each attack, LoRA preferred."""
    chosen: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["data"], row["attack"]
        better = key not in chosen or (_tuned_with_lora(row) > _tuned_with_lora(chosen[key]))
        if _psim(row) is not None and better:
            chosen[key] = row
    names = dict.fromkeys(data for data, _ in chosen)
    return {name: [row for (data, _), row in chosen.items() if data == name] for name in names}


def _tuned_with_lora(row: Row) -> bool:
    return bool(row["strategy"] == Strategy.LORA)


def _psim(row: Row) -> str | None:
    """Return the name of the first PSIM variant."""
    return next((name for name, found in row["defences"].items() if found.get("scores")), None)


def psim_figure(cells: Sequence[Row], steps: Path) -> Figure:
    """Plot scores, ROC curve and trade-off of the first PSIM variant, one row per cell.

    Args:
        cells: rows of one data set, as `shown_cells` chooses them.
        steps: folder that the files named in the rows are relative to.
    """
    figure = Figure(figsize=(13, 3.9 * len(cells)), layout="constrained")
    for part, row in zip(figure.subfigures(len(cells), squeeze=False).flat, cells, strict=True):
        scores = _Scores.load(row, steps)
        for axes, draw in zip(part.subplots(1, 3), (_histogram, _roc, _trade_off), strict=True):
            draw(axes, scores)
            # Above the panel, the legend hides nothing.
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
        title = f"{row['attack']}: {_psim(row)}, {row['strategy']}, seed {row['seed']}"
        part.suptitle(title, fontweight="bold")
    return figure


@dataclass(frozen=True)
class _Scores:
    """The outputs of victim and screens on one cell; `known` are the calibration texts.

    The readings hold only the features that the first rule of the recipe uses.
    """

    truth: Classes
    targets: Classes
    predicted_clean: Classes
    predicted_poisoned: Classes
    known: FloatArray
    clean: FloatArray
    poisoned: FloatArray
    labels: list[str]
    checkpoints: int

    @staticmethod
    def load(row: Row, steps: Path) -> "_Scores":
        psim = row["defences"][_psim(row)]["scores"]
        arrays = {**load_scores(steps / row["bare"]), **load_scores(steps / psim)}
        del arrays["dev"]
        features = row["defences"][_psim(row)]["features"]
        for kind in ("known", "clean", "poisoned"):
            arrays[kind] = arrays[kind][:, :features]
        checkpoints = len(row["defences"][_psim(row)]["checkpoints"])
        return _Scores(**arrays, labels=row["labels"], checkpoints=checkpoints)

    @property
    def least_budget(self) -> float:
        """The smallest budget that a threshold can keep."""
        return 1 / (len(self.known) + 1)

    @property
    def marked_budget(self) -> float:
        return max(BUDGET, self.least_budget)

    def behind(self, budget: float) -> tuple[View, View]:
        """Return the clean and the poisoned texts, judged by calibrated thresholds."""
        screen = calibrate(self.known, self.checkpoints, budget)
        return (
            View(screen, self.clean, self.predicted_clean),
            View(screen, self.poisoned, self.predicted_poisoned),
        )


def _histogram(axes: Axes, scores: _Scores) -> None:
    clean, poisoned = scores.behind(scores.marked_budget)
    thresholds = {
        ", ".join(scores.labels[index] for index in group.classes): group.threshold
        for group in clean.screen.groups
    }
    draw_histogram(axes, clean.scores, poisoned.scores, thresholds)


def _roc(axes: Axes, scores: _Scores) -> None:
    views = scores.behind(scores.marked_budget)
    clean, poisoned = (within_class_scores(view.verdicts) for view in views)
    left = 50 / len(clean)  # half a text stands for zero, which a log axis lacks
    fires = scores.predicted_poisoned == scores.targets
    for name, own, style in (("all", poisoned, "k-"), ("backdoor fires", poisoned[fires], "r--")):
        area = auroc(clean, own)
        if area is not None:
            truth = np.repeat([0, 1], [len(clean), len(own)])
            false, true, _ = roc_curve(truth, np.r_[clean, own], drop_intermediate=False)
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
        outcome(clean.calibrated, scores.truth, poisoned.calibrated, scores.targets)
        for clean, poisoned in map(scores.behind, (marked, *budgets))
    ]
    for name, rates, color in (
        ("CA", [o.clean_accuracy for o in outcomes], "tab:blue"),
        ("ASR", [o.attack_success_rate for o in outcomes], "tab:red"),
    ):
        if known := [100 * rate.value for rate in rates if rate]:  # without true classes, no CA
            at_marked, *swept = known
            label = f"{name}: {at_marked:.1f} % at {100 * marked:.2g} %"
            axes.plot(100 * budgets, swept, color=color, label=label)
            axes.plot([100 * marked], [at_marked], "o", color=color)
    axes.set(xlabel="false-rejection budget, %", ylabel="CA and ASR, %", xscale="log")
    axes.set_ylim(-2, 102)
    axes.xaxis.set_major_formatter("{x:g}")
