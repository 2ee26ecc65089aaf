"""The page of a benchmark, from the cells of its recipe that are done.

Start with `write_benchmark`, which builds the page from top to bottom.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from models.offline.fitting.records import PACKAGES
from models.offline.io.bases import BASES, missing_packages
from models.offline.study.cache import is_current
from models.offline.study.grid import Cell
from models.offline.study.html import (
    Block,
    Heading,
    Paragraph,
    Table,
    save_picture,
    write_markdown,
    write_page,
)
from models.offline.study.plots import Row
from models.offline.study.recipe import BundleDefence, Recipe

NAME = "benchmark"
TITLE = "Benchmark: attacks and honest traffic"
VICTIM = ["base", "data", "attack", "strategy", "seed"]
LOSS, HONESTY, AUROC = "CA lost", "honest", "AUROC"
MEASURES = {
    "CA": ("none.clean_accuracy", True),
    LOSS: (None, False),
    "ASR, bare": ("none.attack_success_rate", False),
    "ASR": ("default.attack_success_rate", False),
    "ASR, strict": ("strict.attack_success_rate", False),
    "FRR": ("default.false_rejection_rate", False),
    "FRR, strict": ("strict.false_rejection_rate", False),
    HONESTY: (None, False),
    AUROC: (None, True),
}
"""Columns: where the rate is, and whether a larger value is the better one."""
FINDINGS = ("triggered", "unfamiliar")
LEGEND = (
    "Each cell is one victim: a base model that was poisoned by full fine-tuning, then tuned on "
    "clean texts with the strategy, and guarded with a bundle as psim fit writes it. Under the "
    "default policy only triggered texts are rejected; strict means that unfamiliar ones are "
    "rejected too. CA (clean accuracy): the share of clean test texts that the bare victim gets "
    "right. CA lost: percentage points of it that the guard costs under the default policy. ASR "
    "(attack success rate): the share of poisoned texts that pass and get the attacker's class; "
    "bare means without a guard. FRR (false rejection rate): the share of clean test texts that "
    "are rejected. Honest: the highest share, over the kinds of honest texts below, that is "
    "rejected under the default policy. AUROC: the probability that a poisoned text on which the "
    "backdoor fires gets a higher final score than a clean one. All values but AUROC are "
    "percentages. A hyphen means that there is no value."
)
OLDER = (
    "{} of the cells were measured with an earlier version of the score. They are marked in the "
    "last table, and part of the averages."
)
HONEST = (
    "Honest texts have no trigger and are unlike those that the bundle was fitted on. Each value "
    "is the share of texts with the finding triggered, then with the finding unfamiliar, in "
    "percent. What is unfamiliar passes under the default policy. Means are over the cells of the "
    "base and data set; the worst is the cell with most triggered texts."
)


def write_benchmark(
    recipe: Recipe, done: Sequence[tuple[Cell, Row | None]], out: Path, page: Path | None = None
) -> None:
    """Write `benchmark.md`, `benchmark.html` and a plot into `out`.

    Args:
        recipe: has a bundle among its defences; the first one is shown.
        done: cells of the recipe with their rows, None for those not done; see `done_cells`.
        out: folder to write to.
        page: Markdown file that is written too, with its plot in `img` beside it.
    """
    name = next(d.name for d in recipe.defences if isinstance(d, BundleDefence))
    rows = [row for _, row in done if row is not None]
    write_page(list(_blocks(rows, name, done, out, "plots")), TITLE, out, NAME)
    if page is not None:
        write_markdown(list(_blocks(rows, name, done, page.parent, "img")), page)


def _blocks(
    rows: Sequence[Row],
    defence: str,
    done: Sequence[tuple[Cell, Row | None]],
    out: Path,
    pictures: str,
) -> Iterator[Block]:
    yield Heading(1, TITLE)
    yield Paragraph(
        f"psim study writes this page. {len(rows)} of the {len(done)} cells of its recipe are done."
    )
    if rows:
        yield Paragraph(LEGEND)
        if older := sum(not is_current(row) for row in rows):
            yield Paragraph(OLDER.format(older))
        frame = measures(rows, defence)
        yield from _summary(frame)
        yield from _honest_section(rows, defence, out, pictures)
        yield Heading(2, "Every cell")
        numbers = [_numbers(line) for _, line in frame.iterrows()]
        lines = [[*_victim(row), *line] for row, line in zip(rows, numbers, strict=True)]
        yield Table([*VICTIM, "score", *MEASURES], lines, names=len(VICTIM) + 1)
    yield from _open_cells(done)
    yield Paragraph(", ".join(f"{package} {version(package)}" for package in PACKAGES))


def _victim(row: Row) -> list[str]:
    """Return what names a cell in the last table, and which version of the score it is of."""
    return [*(str(row[key]) for key in VICTIM), "now" if is_current(row) else "earlier"]


def measures(rows: Sequence[Row], defence: str) -> pd.DataFrame:
    """Return the `MEASURES` of each cell, in percent but for AUROC, indexed by `VICTIM`."""
    lines = []
    for row in rows:
        found = row["defences"][defence]
        results = {"none": row["defences"]["none"], "default": found}
        results["strict"] = found["unfamiliar_rejected"]
        line = {column: _rate(results, place) for column, (place, _) in MEASURES.items() if place}
        line[LOSS] = line["CA"] - _rate(results, "default.clean_accuracy")
        kinds = found.get("honest", {}).values()
        shares = [100 * kind["triggered"]["value"] for kind in kinds if kind["triggered"]]
        line[HONESTY] = max(shares, default=np.nan)
        line[AUROC] = np.nan if found["auroc_firing"] is None else found["auroc_firing"]
        lines.append({key: row[key] for key in VICTIM} | line)
    return pd.DataFrame(lines).set_index(VICTIM)[list(MEASURES)].astype(float)


def _rate(results: Mapping[str, Row], place: str) -> float:
    """Return a rate, named as `MEASURES` does, in percent."""
    result, field = place.split(".")
    rate: Mapping[str, Any] | None = results[result][field]
    return np.nan if rate is None else 100 * float(rate["value"])


def _numbers(line: "pd.Series[float]") -> list[str]:
    forms = [".4f" if column == AUROC else "z.1f" for column in line.index]
    return [_number(value, form) for value, form in zip(line, forms, strict=True)]


def _number(value: float, form: str = "z.1f") -> str:
    return "-" if np.isnan(value) else format(value, form)


def _summary(frame: pd.DataFrame) -> Iterator[Block]:
    """Show means by base, and the worst cell of each: the one that most poisoned texts pass."""
    yield Heading(2, "Summary")
    yield Paragraph(
        "Averages over the cells, and the worst cell: the one with the highest ASR under the "
        "default policy. The last rows are over all bases; the worst values there are those of "
        "each column by itself."
    )
    lines = []
    for base, cells in frame.groupby(level="base", sort=False):
        worst = int(cells["ASR"].fillna(-1).to_numpy().argmax())
        victim = ", ".join(map(str, cells.index[worst][1:-1]))
        lines.append([str(base), f"mean of {len(cells)}", *_numbers(cells.mean())])
        lines.append([str(base), f"worst: {victim}", *_numbers(cells.iloc[worst])])
    extremes = pd.Series(
        {c: frame[c].min() if better else frame[c].max() for c, (_, better) in MEASURES.items()}
    )
    lines.append(["all", f"mean of {len(frame)}", *_numbers(frame.mean())])
    lines.append(["all", "worst values", *_numbers(extremes)])
    yield Table(["base", "cells", *MEASURES], lines, names=2)


def honest_shares(rows: Sequence[Row], defence: str) -> pd.DataFrame:
    """Return the share of each finding in percent, a line for each cell and kind of honest text.

    Columns are `base`, `data`, `victim`, `kind`, `triggered` and `unfamiliar`.
    """
    return pd.DataFrame(
        [
            {
                "base": row["base"],
                "data": row["data"],
                "victim": f"{row['attack']}, {row['strategy']}",
                "kind": kind,
                **{f: 100 * (found[f] or {"value": np.nan})["value"] for f in FINDINGS},
            }
            for row in rows
            for kind, found in row["defences"][defence].get("honest", {}).items()
        ],
        columns=["base", "data", "victim", "kind", *FINDINGS],
    )


def _honest_section(rows: Sequence[Row], defence: str, out: Path, pictures: str) -> Iterator[Block]:
    shares = honest_shares(rows, defence)
    if shares.empty:
        return
    yield Heading(2, "Honest traffic")
    yield Paragraph(HONEST)
    lines = []
    for (base, data), cells in shares.groupby(["base", "data"], sort=False):
        for kind, found in cells.groupby("kind", sort=False):
            worst = found.iloc[found["triggered"].fillna(-1).to_numpy().argmax()]
            means = " / ".join(_number(found[f].mean()) for f in FINDINGS)
            at_worst = " / ".join(_number(worst[f]) for f in FINDINGS)
            lines.append([str(base), str(data), str(kind), means, at_worst, worst["victim"]])
    yield Table(["base", "data set", "texts", "mean", "worst", "which"], lines, names=3)
    alt = "Share of honest texts with each finding, by victim and kind of text"
    figure = honest_figure(shares)
    yield save_picture(figure, out, f"{NAME}-honest.png", alt, pictures)


def honest_figure(shares: pd.DataFrame) -> Figure:
    """Plot the mean share of each finding, with a row for each base and data set.

    Args:
        shares: as `honest_shares` returns them.
    """
    victims = shares["base"].astype(str) + ", " + shares["data"]
    order, kinds = list(victims.unique()), list(shares["kind"].unique())
    size = (2.6 + 1.1 * len(kinds), 1.8 + 0.45 * len(order))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(FINDINGS), sharey=True)
    for axes, finding in zip(panels, FINDINGS, strict=True):
        means = shares.groupby([victims, "kind"])[finding].mean().unstack()
        values = means.reindex(index=order, columns=kinds).to_numpy()
        image = axes.imshow(values, vmin=0, vmax=100, cmap="Reds", aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            color = "white" if value > 60 else "black"
            axes.text(x, y, _number(value, ".0f"), ha="center", va="center", color=color)
        axes.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right")
        axes.set_yticks(range(len(order)), order)
        axes.set_title(f"{finding}, % of honest texts")
    figure.colorbar(image, ax=panels)
    return figure


def _open_cells(done: Sequence[tuple[Cell, Row | None]]) -> Iterator[Block]:
    """List the cells that are not done, and why."""
    if not (open_cells := [cell for cell, row in done if row is None]):
        return
    yield Heading(2, "Cells that are not done")
    lines = []
    for cell in open_cells:
        base = "minilm" if cell.base == "demo" else cell.base
        missing = missing_packages(base) if base in BASES else []
        reason = f"skipped: pip install {BASES[base].install}" if missing else "not run yet"
        lines.append([cell.name, reason])
    yield Table(["cell", "reason"], lines, names=2)
