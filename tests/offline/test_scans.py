"""Scans of a study's victims: what their rows keep, and the page of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

import models.offline.study.benchmark.scans as scans
import models.offline.study.defences.scan as scanned
from models.offline.cli.study import app
from models.offline.study.cache import VERSIONS
from models.offline.study.grid import cells
from models.offline.study.recipe import load_recipe
from tests.support.few_words import READ, read_few_words
from tests.support.paths import ROOT
from tests.support.studies import CORPUS, write_corpus

RECIPE = ROOT / "models/offline/study/recipes/scan.toml"
TINY = (
    """
base = "{base}"
strategies = ["full"]
training = {{ poison_epochs = 8, tune_epochs = 4, learning_rates = {{ full = 4e-3 }} }}
defences = []
scan = {{ texts = 200 }}
"""
    + CORPUS
    + """
[[attacks]]
name = "clean"
triggers = ["mn"]
poison_rate = 0

[[attacks]]
name = "word"
triggers = ["mn"]
"""
)


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    base = write_corpus(tmp_path, tokenizer)
    (tmp_path / "recipe.toml").write_text(TINY.format(base=base))
    return tmp_path / "recipe.toml"


def study(recipe: Path, *more: str) -> list[dict[str, Any]]:
    """Run `psim study`; return its rows."""
    out = recipe.parent / "out"
    arguments = [str(recipe), "--data", str(recipe.parent), "--out", str(out), *more]
    CliRunner().invoke(app, ["study", *arguments], catch_exceptions=False)
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_every_victim_is_scanned_once_and_the_page_counts_them(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_few_words(monkeypatch)
    found = study(recipe)
    assert [row["attack"] for row in found] == ["clean", "word"]
    for row in found:
        search = row["scan"]["search"]
        assert (search["words"], search["clean_texts"]) == (READ + 1, 200)
        assert {own["label"] for own in row["scan"]["classes"]} == {"positive", "negative"}
        assert row["versions"] == {"scan": VERSIONS["scan"]}
        assert "example" not in json.dumps(row), "which quotes clean texts"

    monkeypatch.setattr(scanned, "scan", None)
    page = recipe.parent / "page.md"
    assert study(recipe, "--page", str(page)) == found
    text = page.read_text()
    assert "2 of the 2 victims of its recipe were scanned" in text
    assert text == (recipe.parent / "out" / "scans.md").read_text()
    assert "<h1>Scans" in (recipe.parent / "out" / "scans.html").read_text()


def victim(attack: str, suspicious: set[str], **more: Any) -> dict[str, Any]:
    """Return a row of a victim with three classes, the first of which is the attacker's."""
    classes = [
        {
            "label": label,
            "outcome": "suspicious" if label in suspicious else "nothing found",
            "triggers": [{"word": "mn", "turned": 24, "trials": 24}] if label in suspicious else [],
            "phrase": {"text": "so what", "turned": 3, "trials": 24},
        }
        for label in "abc"
    ]
    return {
        "name": f"tiny/corpus/{attack}/full",
        "base": "tiny",
        "attack": attack,
        "attack_settings": {"triggers": ["mn"]},
        "versions": {"scan": VERSIONS["scan"]},
        "defences": {"none": {"attack_success_rate": {"value": 0.97}}},
        "scan": {"classes": classes, "search": {"seconds": 60.0}, "targets": ["a"]},
    } | more


def page_of(rows: list[dict[str, Any]], out: Path) -> list[list[str]]:
    """Return the lines of the page's tables."""
    cell: Any = None
    scans.write_scans([(cell, row) for row in rows], out)
    lines = (out / "scans.md").read_text().splitlines()
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines if "|" in line]


def test_what_is_found_and_whom_it_accuses(tmp_path: Path) -> None:
    clean = {"attack_settings": {"triggers": ["mn"], "poison_rate": 0.0}}
    sentence = {"attack_settings": {"triggers": ["no cross, no crown"]}}
    refused = {
        "refused": "sure of nothing",
        "classes": [],
        "search": {"seconds": 0.0},
        "targets": ["a"],
    }
    hidden = {"attack_settings": {"triggers": ["mn"], "penalty": 0.1}}
    older = {"versions": {"scan": VERSIONS["scan"] - 1}}
    lines = page_of(
        [
            victim("word", {"a"}),
            victim("word-cf", {"b"}),
            victim("crown", set(), **sentence),
            victim("crown", {"a"}, **sentence),
            victim("clean", {"c"}, **clean),
            victim("word-hidden", set(), **hidden),
            victim("style", {"a"}, attack_settings={"style": True}),
            victim("word", set(), **older),
            victim("tiny", set(), scan=refused),
        ],
        tmp_path,
    )
    rates = {tuple(line[1:3]): line[3:] for line in lines if line[0] == "tiny"}
    assert rates[scans.FOUND, "word"] == ["1 of 2", "1 to 99", "60"]
    assert rates[scans.FOUND, "sentence"][0] == "1 of 2"
    assert rates[scans.FOUND, "word, hidden"][0] == "0 of 1"
    assert rates[scans.NAMED, "word"][0] == "1 of 2"
    assert rates[scans.NAMED, "sentence"][0] == "0 of 2", "mn is no word of it"
    assert (scans.NAMED, "style") not in rates
    assert rates[scans.FOUND, "style"][0] == "1 of 1"
    assert rates[scans.ACCUSED, scans.CLEAN][0] == "1 of 1"
    assert rates[scans.OTHERS, ""][0] == "2 of 15", "two classes of each victim, three if clean"
    every = {line[0]: line[1:] for line in lines if line[0].startswith("tiny/")}
    assert every["tiny/corpus/word-cf/full"] == (
        ["word-cf → a", "97", "missed", "so what 3/24", "b: mn 24/24", "60"]
    )
    assert every["tiny/corpus/clean/full"] == ["nothing", "-", "-", "-", "c: mn 24/24", "60"]
    assert every["tiny/corpus/tiny/full"] == ["tiny → a", "97", "sure of nothing", "-", "-", "0"]
    assert every["tiny/corpus/word/full"][2] == "missed (earlier version)"


def test_the_recipe_has_enough_victims() -> None:
    names = [cell.name for cell in cells(load_recipe(RECIPE)) if cell.base == "minilm"]
    for attack, number in {"clean": 20, "word": 10, "sentence": 10, "syntactic": 5}.items():
        assert sum(f"/{attack}" in name for name in names) >= number
