"""The report of a study, as `report.md` and as one self-contained file, `report.html`.

Start with `write_study_report`, which builds the page from top to bottom.
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
    "Clean accuracy (CA) lost compared with no defence, percentage points": ("lost", "z.1f"),
    "AUROC where the backdoor fires": ("auroc_firing", ".4f"),
}
LEGEND = (
    "CA (clean accuracy): the share of clean texts that get their true class; a rejected text "
    "counts as wrong. ASR (attack success rate): the share of poisoned texts that pass the defence "
    "and get the attacker's target class, among those whose true class is another one. FRR (false "
    "rejection rate): the share of clean texts that are rejected. FAR (false acceptance rate): the "
    "share of poisoned texts that pass. Where the backdoor fires: counts only the poisoned texts "
    "that get the target class when there is no defence. AUROC: the probability that a poisoned "
    "text looks more suspicious to the defence than a clean one. Extra passes: forward passes per "
    "text, in addition to the victim's own. Time: seconds per text, relative to the victim without "
    "a defence. A hyphen means that a value does not apply or is unknown."
)


def write_study_report(rows: Sequence[Row], out: Path, steps: Path, recipe: str) -> None:
    """Write `report.md`, `report.html` and `plots/*.png` into `out`.

    Args:
        rows: what `run_study` returned; at least one.
        out: folder to write to.
        steps: folder of the study's steps, which hold the scores for the plots.
        recipe: the study's recipe, shown at the end of the report.
    """
    for old in (out / "plots").glob("psim-*.png"):
        old.unlink()  # left over from another recipe
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
    """Return one line per cell and defence, with rates in percent; NaN stands for no value."""
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
    """Return one row per published model, since several victims may share one."""
    return {(row["data"], row["attack"], row["seed"]): row for row in rows}.values()


def _what_attacks_leave(frame: pd.DataFrame, out: Path) -> Iterator[Block]:
    bare = frame[frame["defence"].isin([BEFORE, "none"])]
    yield heading(2, "What tuning leaves of the backdoor")
    yield paragraph(
        f"The published weights and the victims tuned from them, all without a defence. "
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
        kinds.append("with one seed, they are Clopper-Pearson over its texts")
    if seeds.max() > 1:
        kinds.append(
            "with several seeds, they are Student's t around the mean, limited to 0 to 100, and "
            "have no width if all seeds agree"
        )
    names = ", ".join(map(str, bare["seed"].unique()))
    return f"Seeds: {names}. Brackets show 95 % intervals: {'; '.join(kinds)}."


def _intervals(bare: pd.DataFrame, field: str) -> pd.DataFrame:
    """Return the mean over seeds and its interval, by data set, attack and strategy."""
    rates = bare.rename(columns={f"{field}.{part}": part for part in PARTS})
    return pd.DataFrame(rates.groupby(VICTIM, observed=True)[PARTS].apply(mean_interval))


def mean_interval(rates: pd.DataFrame) -> "pd.Series[float]":
    """Return the mean of rates in percent and its 95 % interval, indexed by `PARTS`.

    The interval of several rates is Student's t, limited to 0 to 100. A single rate keeps its own.
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
        "Each value is a mean over strategies and seeds, and covers only the victims on which the "
        "defence was tried."
    )
    for title, (column, form) in SUMMARIES.items():
        yield heading(3, title)
        means = frame.groupby(["data", "attack", "defence"], observed=True)[column].mean()
        yield _wide(means.map(lambda value, form=form: _number(value, form)))


def _how_psim_sees_it(rows: Sequence[Row], out: Path, steps: Path) -> Iterator[Block]:
    for number, (data, cells) in enumerate(shown_cells(rows).items(), 1):
        if number == 1:
            yield heading(2, "How PSIM separates clean and poisoned texts")
            yield paragraph(
                "Left: the scores of clean and poisoned texts, with the thresholds for a budget of "
                "1 % (or the smallest budget that the calibration texts allow). Middle: the ROC "
                "curve of the distance from the threshold. Right: clean accuracy and attack "
                "success rate at other budgets. There is one victim for each attack."
            )
        yield heading(3, data)
        attacks = ", ".join(row["attack"] for row in cells)
        alt = f"PSIM on {data} ({attacks}): scores, ROC curve, CA and ASR by budget"
        name = f"psim-{number}-{re.sub(r'[^A-Za-z0-9]+', '-', data)}.png"
        yield picture(out, name, psim_figure(cells, steps), alt)


def _how_training_went(rows: Sequence[Row]) -> Iterator[Block]:
    lines: dict[str, list[str]] = {}
    for row in rows:
        for name, found in row["defences"].items():
            if "checkpoints" in found:  # rules for thresholds share one training, shown once
                steps = ", ".join(map(str, found["checkpoints"]))
                how = [steps, found["stopped_because"], f"{found['fit_seconds']:.0f}"]
                lines.setdefault(found["scores"], [*(str(row[k]) for k in CELL), name, *how])
    if lines:
        yield heading(2, "How PSIM's training went")
        header = ["data set", *CELL[1:], "defence"]
        header += ["checkpoints at steps", "stopped because", "seconds"]
        yield table(header, list(lines.values()), names=len(header) - 1)


def _details(frame: pd.DataFrame) -> Iterator[Block]:
    yield heading(2, "Details")
    yield paragraph("Each value is a mean over seeds.")
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
    """Return a table with a row per data set and attack, and a column per last index level."""
    wide = texts.unstack(fill_value="-")
    lines = [[*names, *cells] for names, cells in zip(wide.index, wide.to_numpy(), strict=True)]
    return table(["data set", "attack", *wide.columns], lines, names=2)
