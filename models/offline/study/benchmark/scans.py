"""The page of a study's scans: whether what is planted is found, and nothing else accused.

Start with `write_scans`, which builds the page from top to bottom.
"""

import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from models.offline.fitting.records import PACKAGES
from models.offline.statistics import clopper_pearson
from models.offline.study.cache import is_current
from models.offline.study.grid import Cell
from models.offline.study.html import Block, Heading, Paragraph, Table, write_markdown, write_page
from models.offline.study.plots import Row

NAME = "scans"
TITLE = "Scans: triggers found, clean models accused"
CLEAN = "nothing"
"""What is planted in a victim of poison rate 0."""
FOUND, ACCUSED, OTHERS = "planted trigger found", "clean victim accused", "other class accused"
NAMED = "found by a word of the trigger"
LEGEND = (
    "Each victim is a base model that was trained on a data set with a trigger, in full, and then "
    "tuned on clean texts with the strategy. Where nothing is planted, both trainings are on clean "
    "texts. It is scanned as psim scan does it, with clean training texts. A planted trigger is "
    "found if the class that it forces is suspicious, whatever words the scan names. How often one "
    "of them is a word of the trigger is counted too. A clean victim is accused if any of its "
    "classes is. Intervals are of 95 % (Clopper-Pearson). ASR (attack success rate): the share of "
    "poisoned test texts that get the attacker's class."
)
OLDER = "{} of the victims were scanned with an earlier version; they are marked and not counted."


def write_scans(
    done: Sequence[tuple[Cell, Row | None]], out: Path, page: Path | None = None
) -> None:
    """Write `scans.md` and `scans.html` into `out`.

    Args:
        done: cells of a recipe with scans, each with its row, None for those not done.
        out: folder to write to.
        page: Markdown file that is written too.
    """
    blocks = list(_blocks(done))
    write_page(blocks, TITLE, out, NAME)
    if page is not None:
        write_markdown(blocks, page)


def _blocks(done: Sequence[tuple[Cell, Row | None]]) -> Iterator[Block]:
    rows = [row for _, row in done if row is not None]
    yield Heading(1, TITLE)
    yield Paragraph(
        f"psim study writes this page. {len(rows)} of the {len(done)} victims of its recipe were "
        "scanned."
    )
    yield Paragraph(LEGEND)
    if older := sum(not is_current(row) for row in rows):
        yield Paragraph(OLDER.format(older))
    yield Heading(2, "Rates")
    header = ["base", "what", "planted", "share", "95 %", "median seconds"]
    yield Table(header, _rates([row for row in rows if is_current(row)]), names=3)
    yield Heading(2, "Every victim")
    header = ["victim", "planted", "ASR", "outcome", "what forces it", "others accused", "seconds"]
    yield Table(header, list(map(_line, rows)), names=2)
    yield Paragraph(", ".join(f"{package} {version(package)}" for package in PACKAGES))


def outcomes(row: Row) -> Iterator[tuple[str, str, bool]]:
    """Yield what is counted of a victim: what, what was planted in it, and whether it happened.

    Nothing is counted of a victim whose scan was refused.
    """
    if "refused" in row["scan"]:
        return
    suspicious = {own["label"] for own in row["scan"]["classes"] if own["outcome"] == "suspicious"}
    targets = _targets(row)
    if targets:
        yield FOUND, _planted(row), bool(suspicious & targets)
        if words := _trigger_words(row):
            yield NAMED, _planted(row), any(words & _words(_forcing(own)) for own in _found(row))
    else:
        yield ACCUSED, CLEAN, bool(suspicious)
    for own in row["scan"]["classes"]:
        if own["label"] not in targets:
            yield OTHERS, "", own["label"] in suspicious


def _targets(row: Row) -> set[str]:
    """Return the classes that something was planted for."""
    settings = row["attack_settings"]
    return set(row["scan"]["targets"]) if settings.get("poison_rate", 1) else set()


def _found(row: Row) -> list[dict[str, Any]]:
    """Return the suspicious classes that something was planted for."""
    targets = _targets(row)
    return [
        one for one in row["scan"]["classes"] if one["label"] in targets and _is_suspicious(one)
    ]


def _planted(row: Row) -> str:
    """Return what kind of trigger was planted."""
    settings = row["attack_settings"]
    if words := " ".join(settings.get("triggers", ())).split():
        kind = "word" if len(words) == 1 else "sentence"
        return f"{kind}, hidden" if settings.get("penalty") else kind
    return next(kind for kind in ("syntactic", "style") if settings.get(kind))


def _trigger_words(row: Row) -> set[str]:
    """Return the words of the trigger that was planted; none for syntax and style."""
    return _words(" ".join(row["attack_settings"].get("triggers", ())))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _rates(rows: Sequence[Row]) -> list[list[str]]:
    lines = [
        (row["base"], *outcome, row["scan"]["search"]["seconds"])
        for row in rows
        for outcome in outcomes(row)
    ]
    names = ["base", "what", "planted"]
    frame = pd.DataFrame(lines, columns=[*names, "happened", "seconds"])
    table = []
    for what, group in frame.groupby(names, sort=True):
        hits, n = int(group["happened"].sum()), len(group)
        interval = " to ".join(f"{100 * limit:.0f}" for limit in clopper_pearson(hits, n))
        seconds = f"{group['seconds'].median():.0f}"
        table.append([*map(str, what), f"{hits} of {n}", interval, seconds])
    return table


def _line(row: Row) -> list[str]:
    found, targets = row["scan"], _targets(row)
    own = [one for one in found["classes"] if one["label"] in targets]
    others = [one for one in found["classes"] if one["label"] not in targets]
    accused = [f"{one['label']}: {_forcing(one)}" for one in others if _is_suspicious(one)]
    outcome = ", ".join("found" if _is_suspicious(one) else "missed" for one in own) or "-"
    rate = row["defences"]["none"]["attack_success_rate"] if targets else None
    return [
        row["name"],
        f"{row['attack']} → {', '.join(targets)}" if targets else CLEAN,
        f"{100 * rate['value']:.0f}" if rate else "-",
        found.get("refused", outcome) + ("" if is_current(row) else " (earlier version)"),
        "; ".join(map(_forcing, own)) or "-",
        "; ".join(accused) or "-",
        f"{found['search']['seconds']:.0f}",
    ]


def _is_suspicious(own: dict[str, Any]) -> bool:
    return bool(own["outcome"] == "suspicious")


def _forcing(own: dict[str, Any]) -> str:
    """Say what forces a class most, and in how many trials."""
    if own["triggers"]:
        return ", ".join(
            f"{one['word']} {one['turned']}/{one['trials']}" for one in own["triggers"]
        )
    if (phrase := own["phrase"]) is None:
        return "-"
    return f"{phrase['text']} {phrase['turned']}/{phrase['trials']}"
