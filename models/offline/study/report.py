"""The report of a study, as `report.md` and as one self-contained `report.html`.

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
from models.offline.study.html import (
    Block,
    Code,
    Heading,
    Paragraph,
    Table,
    save_picture,
    write_page,
)
from models.offline.study.plots import Row, attack_figure, has_scores, psim_figure, shown_cells

VICTIM = ["data", "attack", "strategy"]
CELL = [*VICTIM, "seed"]
BEFORE_TUNING = "before tuning"
RATE_FIELDS = ["value", "low", "high"]
RATE_COLUMNS = [f"{field}.{part}" for field in ROWS.values() for part in RATE_FIELDS]
NUMBER_COLUMNS = ["auroc", "auroc_firing", "passes", "time"]
DETAILS = {
    "CA, %": ("clean_accuracy.value", "z.1f"),
    "ASR, %": ("attack_success_rate.value", "z.1f"),
    "FRR, %": ("false_rejection_rate.value", "z.1f"),
    "FAR, %": ("false_acceptance_rate.value", "z.1f"),
    "FAR where the backdoor fires, %": ("false_acceptance_rate_firing.value", "z.1f"),
    "AUROC": ("auroc", ".4f"),
    "AUROC where the backdoor fires": ("auroc_firing", ".4f"),
    "extra passes": ("passes", ".1f"),
    "time": ("time", ".2f"),
}
SUMMARIES = {
    "Attack success rate (ASR), %": ("attack_success_rate.value", "z.1f"),
    "Clean accuracy (CA) lost compared with no defence, percentage points": ("lost", "z.1f"),
    "AUROC over all poisoned texts": ("auroc", ".4f"),
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
        rows: rows of `run_study`; at least one.
        out: folder to write to.
        steps: folder of the study's steps, which contain the scores for the plots.
        recipe: the study's recipe, shown at the end of the report.
    """
    for old in (out / "plots").glob("psim-*.png"):
        old.unlink()  # may be of another recipe
    if len({row.get("base") for row in rows}) > 1:
        rows = [{**row, "data": f"{row['base']}, {row['data']}"} for row in rows]
    results = _to_frame(rows)
    frame = results[results["defence"] != BEFORE_TUNING]
    title = f"Backdoors and defences: {', '.join(frame['data'].unique())}"
    blocks = [
        Heading(1, title),
        Paragraph(LEGEND),
        *_attack_section(results, out),
        *_defence_section(frame),
        *_honest_section(rows),
        *_separation_section(rows, out, steps),
        *_training_section(rows),
        *_details_section(frame),
        Heading(2, "Recipe"),
        Code(recipe),
        Paragraph(", ".join(f"{package} {version(package)}" for package in PACKAGES)),
    ]
    write_page(blocks, title, out)


def _to_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Return a line per cell and defence, with rates in percent and NaN for missing values."""
    before = {"defence": BEFORE_TUNING, "strategy": BEFORE_TUNING}
    lines = [
        *(
            {key: row[key] for key in CELL} | before | row["published"]
            for row in _one_per_published_model(rows)
        ),
        *(
            {key: row[key] for key in CELL} | {"defence": name} | found
            for row in rows
            for name, found in row["defences"].items()
        ),
    ]
    frame = pd.json_normalize(lines).reindex(
        columns=[*CELL, "defence", *RATE_COLUMNS, *NUMBER_COLUMNS]
    )
    frame[RATE_COLUMNS + NUMBER_COLUMNS] = frame[RATE_COLUMNS + NUMBER_COLUMNS].astype(float)
    frame[RATE_COLUMNS] *= 100
    for name in (*VICTIM, "defence"):  # so that tables keep the order of the recipe
        frame[name] = pd.Categorical(frame[name], frame[name].unique())
    accuracy = "clean_accuracy.value"
    bare = frame[frame["defence"] == "none"].set_index(CELL)[accuracy].rename("bare")
    frame["lost"] = frame.join(bare, on=CELL)["bare"] - frame[accuracy]
    return frame


def _one_per_published_model(rows: Sequence[Row]) -> Iterable[Row]:
    """Return one row per published model, which several victims may share."""
    return {(row["data"], row["attack"], row["seed"]): row for row in rows}.values()


def _attack_section(frame: pd.DataFrame, out: Path) -> Iterator[Block]:
    bare = frame[frame["defence"].isin([BEFORE_TUNING, "none"])]
    yield Heading(2, "What tuning leaves of the backdoor")
    yield Paragraph(
        f"The published weights and the victims tuned from them, all without a defence. "
        f"{_kind_of_interval(bare)}"
    )
    success = _intervals(bare, "attack_success_rate")
    for title, rates in (
        ("Attack success rate (ASR), %", success),
        ("Clean accuracy (CA), %", _intervals(bare, "clean_accuracy")),
    ):
        yield Heading(3, title)
        yield _pivot(rates.apply(_with_interval, axis=1))
    alt = "Attack success rate by data set, attack and strategy, with the intervals of the table"
    yield save_picture(attack_figure(success), out, "attack.png", alt)


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
    rates = bare.rename(columns={f"{field}.{part}": part for part in RATE_FIELDS})
    return pd.DataFrame(rates.groupby(VICTIM, observed=True)[RATE_FIELDS].apply(mean_interval))


def mean_interval(rates: pd.DataFrame) -> "pd.Series[float]":
    """Return the mean of rates in percent and its 95 % interval, indexed by `RATE_FIELDS`.

    The interval of several rates is Student's t, limited to 0 to 100. A single rate keeps its own
    interval.
    """
    known = rates[RATE_FIELDS].dropna()
    if len(known) < 2:
        return known.mean()
    values = known["value"].to_numpy(float)
    # Scaled here, since `t.interval` gives NaN for the scale 0 of values that agree.
    limits = values.mean() + sem(values) * np.array(t.interval(0.95, len(values) - 1))
    return pd.Series([values.mean(), *limits.clip(0, 100)], RATE_FIELDS)


def _with_interval(rate: "pd.Series[float]") -> str:
    if np.isnan(rate["value"]):
        return "-"
    return f"{rate['value']:.1f} ({rate['low']:.1f}-{rate['high']:.1f})"


def _defence_section(frame: pd.DataFrame) -> Iterator[Block]:
    yield Heading(2, "What defences stop")
    yield Paragraph(
        "Each value is a mean over strategies and seeds, and covers only the victims on which the "
        "defence was tried."
    )
    for title, (column, form) in SUMMARIES.items():
        yield Heading(3, title)
        means = frame.groupby(["data", "attack", "defence"], observed=True)[column].mean()
        yield _pivot(means.map(lambda value, form=form: _number(value, form)))


def _honest_section(rows: Sequence[Row]) -> Iterator[Block]:
    """Show what each defence rejects of honest texts, by kind of text."""
    lines = [
        {key: row[key] for key in ("data", "attack")} | {"defence": name, "kind": kind, "share": s}
        for row in rows
        for name, found in row["defences"].items()
        for kind, rates in found.get("honest", {}).items()
        if (s := _rejected_share(rates)) is not None
    ]
    if not lines:
        return
    yield Heading(2, "What honest traffic pays")
    yield Paragraph(
        "The share of honest texts that is rejected, in percent. None has a trigger, and all are "
        "unlike the fitting texts. Each value is a mean over strategies and seeds. Of a bundle, "
        "it is of the default policy, under which unfamiliar texts pass."
    )
    wide = pd.DataFrame(lines).pivot_table(
        "share", ["data", "attack", "defence"], "kind", sort=False, observed=True
    )
    body = [
        [*names, *(_number(value, "z.1f") for value in values)]
        for names, values in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    yield Table(["data set", "attack", "defence", *wide.columns], body, names=3)


def _rejected_share(rates: Row | None) -> float | None:
    """Return the share of rejected texts in percent; None if there were no texts."""
    found = rates and (rates["rejected"] if "rejected" in rates else rates["triggered"])
    return 100 * float(found["value"]) if found else None


def _separation_section(rows: Sequence[Row], out: Path, steps: Path) -> Iterator[Block]:
    there = [row for row in rows if has_scores(row, steps)]
    for number, (data, cells) in enumerate(shown_cells(there).items(), 1):
        if number == 1:
            yield Heading(2, "How PSIM separates clean and poisoned texts")
            yield Paragraph(
                "Left: the scores of clean and poisoned texts, with the thresholds for a budget of "
                "1 % (or the smallest budget that the calibration texts allow). Middle: the ROC "
                "curve of the distance from the threshold. Right: clean accuracy and attack "
                "success rate at other budgets. There is one victim for each attack."
            )
        yield Heading(3, data)
        attacks = ", ".join(row["attack"] for row in cells)
        alt = f"PSIM on {data} ({attacks}): scores, ROC curve, CA and ASR by budget"
        name = f"psim-{number}-{re.sub(r'[^A-Za-z0-9]+', '-', data)}.png"
        yield save_picture(psim_figure(cells, steps), out, name, alt)


def _training_section(rows: Sequence[Row]) -> Iterator[Block]:
    lines: dict[str, list[str]] = {}
    for row in rows:
        for name, found in row["defences"].items():
            if "checkpoints" in found:
                steps = ", ".join(map(str, found["checkpoints"]))
                training = [steps, found["stopped_because"], f"{found['fit_seconds']:.0f}"]
                line = [*(str(row[k]) for k in CELL), name, *training]
                lines.setdefault(found["scores"], line)  # rules for thresholds share one training
    if lines:
        yield Heading(2, "How PSIM's training went")
        header = ["data set", *CELL[1:], "defence"]
        header += ["checkpoints at steps", "stopped because", "seconds"]
        yield Table(header, list(lines.values()), names=len(header) - 1)


def _details_section(frame: pd.DataFrame) -> Iterator[Block]:
    yield Heading(2, "Details")
    yield Paragraph("Each value is a mean over seeds.")
    columns = [column for column, _ in DETAILS.values()]
    for names, cell in frame.groupby(VICTIM, observed=True):
        yield Heading(3, ", ".join(map(str, names)))
        means = cell.groupby("defence", observed=True)[columns].mean()
        lines = [
            [str(name), *(_number(line[column], form) for column, form in DETAILS.values())]
            for name, line in means.iterrows()
        ]
        yield Table(["defence", *DETAILS], lines)


def _number(value: float, form: str) -> str:
    return "-" if np.isnan(value) else format(value, form)


def _pivot(texts: "pd.Series[str]") -> Block:
    """Return a table with a row per data set and attack; the last level becomes the columns."""
    wide = texts.unstack(fill_value="-")
    lines = [[*names, *cells] for names, cells in zip(wide.index, wide.to_numpy(), strict=True)]
    return Table(["data set", "attack", *wide.columns], lines, names=2)
