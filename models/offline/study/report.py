"""A study as people read it: `report.md`, and the same as one file, `report.html`.

Read `write_study_report`: the page from top to bottom.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import sem, t

from models.offline.evaluation.report import ROWS
from models.offline.fitting.records import PACKAGES
from models.offline.study.html import Block, code, heading, paragraph, picture, table, write_page
from models.offline.study.plots import Row, attack_figure, psim_figure, shown_cells

VICTIM = ["data", "attack", "strategy"]
CELL = [*VICTIM, "seed"]
BEFORE = "before tuning"
PARTS = ["value", "low", "high"]
RATES = [f"{field}.{part}" for field in ROWS.values() for part in PARTS]
NUMBERS = ["auroc_firing", "passes", "time"]
DETAILS = {
    "CA, %": ("clean_accuracy.value", "z.1f"),
    "ASR, %": ("attack_success_rate.value", "z.1f"),
    "FRR, %": ("false_rejection_rate.value", "z.1f"),
    "FAR, %": ("false_acceptance_rate.value", "z.1f"),
    "FAR where the backdoor fires, %": ("false_acceptance_rate_firing.value", "z.1f"),
    "AUROC where the backdoor fires": ("auroc_firing", ".4f"),
    "extra passes": ("passes", ".1f"),
    "time": ("time", ".2f"),
}
SUMMARIES = {
    "Attack success rate (ASR), %": ("attack_success_rate.value", "z.1f"),
    "Clean accuracy (CA) lost against no defence, percentage points": ("lost", "z.1f"),
    "AUROC where the backdoor fires": ("auroc_firing", ".4f"),
}
LEGEND = (
    "CA, clean accuracy: share of the clean texts that get their true class; a rejected text "
    "counts as wrong. ASR, attack success rate: share of the poisoned texts, none of whose true "
    "class is the attacker's target, that pass the defence and get the target. FRR, false "
    "rejection rate: share of the clean texts that are rejected. FAR, false acceptance rate: "
    "share of the poisoned texts that pass. Where the backdoor fires: only poisoned texts that "
    "get the target when there is no defence. AUROC: probability that a poisoned text looks more "
    "suspicious to the defence than a clean one. Extra passes: forward passes per text beside "
    "that of the victim. Time: seconds per text over those of the bare victim. A hyphen: does not "
    "apply, or not known."
)


def write_study_report(rows: Sequence[Row], out: Path, steps: Path, recipe: str) -> None:
    """Write `report.md`, `report.html` and `plots/*.png` into `out`.

    Args:
        rows: what `run_study` returned, one at least.
        out: folder to write to.
        steps: folder of the study's steps: what the plots show.
        recipe: the study's recipe, which is shown at the end.
    """
    for old in (out / "plots").glob("psim-*.png"):
        old.unlink()  # of another recipe
    everything = _long(rows)
    frame = everything[everything["defence"] != BEFORE]
    title = f"Backdoors and defences: {', '.join(frame['data'].unique())}"
    blocks = [
        heading(1, title),
        paragraph(LEGEND),
        *_what_attacks_leave(everything, out),
        *_what_defences_stop(frame),
        *_how_psim_sees_it(rows, out, steps),
        *_how_training_went(rows),
        *_details(frame),
        heading(2, "Recipe"),
        code(recipe),
        paragraph(", ".join(f"{package} {version(package)}" for package in PACKAGES)),
    ]
    write_page(blocks, title, out)


def _long(rows: Sequence[Row]) -> pd.DataFrame:
    """Return a line per cell and defence; rates in percent, NaN where there is none."""
    before = {"defence": BEFORE, "strategy": BEFORE}
    lines = [
        *({key: row[key] for key in CELL} | before | row["published"] for row in _one_each(rows)),
        *(
            {key: row[key] for key in CELL} | {"defence": name} | found
            for row in rows
            for name, found in row["defences"].items()
        ),
    ]
    frame = pd.json_normalize(lines).reindex(columns=[*CELL, "defence", *RATES, *NUMBERS])
    frame[RATES + NUMBERS] = frame[RATES + NUMBERS].astype(float)
    frame[RATES] *= 100
    for name in (*VICTIM, "defence"):  # tables keep the order of the recipe
        frame[name] = pd.Categorical(frame[name], frame[name].unique())
    accuracy = "clean_accuracy.value"
    bare = frame[frame["defence"] == "none"].set_index(CELL)[accuracy].rename("bare")
    frame["lost"] = frame.join(bare, on=CELL)["bare"] - frame[accuracy]
    return frame


def _one_each(rows: Sequence[Row]) -> Iterable[Row]:
    """Return a row for each published model, which several victims may share."""
    return {(row["data"], row["attack"], row["seed"]): row for row in rows}.values()


def _what_attacks_leave(frame: pd.DataFrame, out: Path) -> Iterator[Block]:
    bare = frame[frame["defence"].isin([BEFORE, "none"])]
    yield heading(2, "What the attack leaves")
    yield paragraph(
        f"The published weights, and victims tuned from them, without a defence. "
        f"{_kind_of_interval(bare)}"
    )
    success = _intervals(bare, "attack_success_rate")
    for title, rates in (
        ("Attack success rate (ASR), %", success),
        ("Clean accuracy (CA), %", _intervals(bare, "clean_accuracy")),
    ):
        yield heading(3, title)
        yield _wide(rates.apply(_with_interval, axis=1))
    alt = "Attack success rate by data set, attack and strategy, with the intervals of the table"
    yield picture(out, "attack.png", attack_figure(success), alt)


def _kind_of_interval(bare: pd.DataFrame) -> str:
    seeds = bare.groupby(VICTIM, observed=True)["seed"].nunique()
    kinds = []
    if seeds.min() == 1:
        kinds.append("with one seed, Clopper-Pearson over its texts")
    if seeds.max() > 1:
        kinds.append(
            "with several seeds, Student's t around their mean, cut off at 0 and 100; it is empty "
            "where all seeds agree"
        )
    names = ", ".join(map(str, bare["seed"].unique()))
    return f"Seeds: {names}. In brackets 95 % intervals: {'; '.join(kinds)}."


def _intervals(bare: pd.DataFrame, field: str) -> pd.DataFrame:
    """Return mean over seeds and interval, by data set, attack and strategy."""
    rates = bare.rename(columns={f"{field}.{part}": part for part in PARTS})
    return pd.DataFrame(rates.groupby(VICTIM, observed=True)[PARTS].apply(mean_interval))


def mean_interval(rates: pd.DataFrame) -> "pd.Series[float]":
    """Return the mean of rates in percent, and its 95 % interval, by `PARTS`.

    Of several rates it is Student's t, cut off at 0 and 100; of a single one its own.
    """
    known = rates[PARTS].dropna()
    if len(known) < 2:
        return known.mean()
    values = known["value"].to_numpy(float)
    mean, half = float(values.mean()), float(t.ppf(0.975, len(values) - 1) * sem(values))
    return pd.Series([mean, max(0.0, mean - half), min(100.0, mean + half)], PARTS)


def _with_interval(rate: "pd.Series[float]") -> str:
    if np.isnan(rate["value"]):
        return "-"
    return f"{rate['value']:.1f} ({rate['low']:.1f}-{rate['high']:.1f})"


def _what_defences_stop(frame: pd.DataFrame) -> Iterator[Block]:
    yield heading(2, "What defences stop")
    yield paragraph(
        "Means over strategies and seeds, of the victims on which the defence was tried."
    )
    for title, (column, form) in SUMMARIES.items():
        yield heading(3, title)
        means = frame.groupby(["data", "attack", "defence"], observed=True)[column].mean()
        yield _wide(means.map(lambda value, form=form: _number(value, form)))


def _how_psim_sees_it(rows: Sequence[Row], out: Path, steps: Path) -> Iterator[Block]:
    for number, (data, cells) in enumerate(shown_cells(rows).items(), 1):
        if number == 1:
            yield heading(2, "How PSIM tells texts apart")
            yield paragraph(
                "Confidence of clean and poisoned texts, with the thresholds for a budget of 1 % "
                "(or the least that the calibration texts allow); ROC of the distance from the "
                "threshold; what another budget would do. One victim for each attack."
            )
        yield heading(3, data)
        attacks = ", ".join(row["attack"] for row in cells)
        alt = f"PSIM on {data} ({attacks}): confidences, ROC, CA and ASR by budget"
        name = f"psim-{number}-{re.sub(r'[^A-Za-z0-9]+', '-', data)}.png"
        yield picture(out, name, psim_figure(cells, steps), alt)


def _how_training_went(rows: Sequence[Row]) -> Iterator[Block]:
    lines: dict[str, list[str]] = {}
    for row in rows:
        for name, found in row["defences"].items():
            if "checkpoints" in found:  # rules for thresholds share a training: shown once
                steps = ", ".join(map(str, found["checkpoints"]))
                how = [steps, found["stopped_because"], f"{found['fit_seconds']:.0f}"]
                lines.setdefault(found["scores"], [*(str(row[k]) for k in CELL), name, *how])
    if lines:
        yield heading(2, "How PSIM's training went")
        header = ["data set", *CELL[1:], "defence", "checkpoints at steps", "stopped", "seconds"]
        yield table(header, list(lines.values()), names=len(header) - 1)


def _details(frame: pd.DataFrame) -> Iterator[Block]:
    yield heading(2, "Details")
    yield paragraph("Means over seeds.")
    columns = [column for column, _ in DETAILS.values()]
    for names, cell in frame.groupby(VICTIM, observed=True):
        yield heading(3, ", ".join(map(str, names)))
        means = cell.groupby("defence", observed=True)[columns].mean()
        lines = [
            [str(name), *(_number(line[column], form) for column, form in DETAILS.values())]
            for name, line in means.iterrows()
        ]
        yield table(["defence", *DETAILS], lines)


def _number(value: float, form: str) -> str:
    return "-" if np.isnan(value) else format(value, form)


def _wide(texts: "pd.Series[str]") -> Block:
    """Return a table: data set and attack by what the last level of the index names."""
    wide = texts.unstack(fill_value="-")
    lines = [[*names, *cells] for names, cells in zip(wide.index, wide.to_numpy(), strict=True)]
    return table(["data set", "attack", *wide.columns], lines, names=2)
