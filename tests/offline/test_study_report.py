"""The report of a study: its numbers against a calculation by hand, its page, its plots."""

import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from models.offline.study.plots import psim_figure, shown_cells
from models.offline.study.report import write_study_report

CLEAN, POISONED, FIRING = 40, 30, 27
SUCCESS, ACCURACY, LOST = (
    "Attack success rate",
    "Clean accuracy (CA), %",
    "Clean accuracy (CA) lost",
)


def rate(value: float | None) -> dict[str, float] | None:
    # Limits that no formula would give: where they are printed, they were taken from here.
    return None if value is None else {"value": value, "low": 0.111, "high": 0.999, "n": 100}


def result(ca: float | None, asr: float | None, **more: Any) -> dict[str, Any]:
    return {
        "clean_accuracy": rate(ca),
        "attack_success_rate": rate(asr),
        "false_rejection_rate": rate(0.0123),
        "false_acceptance_rate": rate(0.0456),
        "false_acceptance_rate_firing": None,
        "auroc": None,
        "auroc_firing": None,
        "passes": None,
        "time": None,
    } | more


def cell(data: str, attack: str, strategy: str, seed: int) -> dict[str, Any]:
    key = f"{data}-{attack}-{strategy}-{seed}"
    ca = 0.90 - 0.02 * (strategy == "full")
    psim = result(
        ca - 0.01 - 0.02 * seed,
        0.004,
        scores=f"psim/{key}.safetensors",
        auroc=0.8 + 0.05 * seed,
        auroc_firing=0.9 + 0.05 * seed,
        passes=1.0,
        time=2.034,
        checkpoints=[10],
        features=1,
        stopped_because="unlearnt",
        fit_seconds=12.3,
    )
    published = result(0.95, 0.99 - 0.01 * seed)
    none = result(ca, 0.90 + 0.01 * seed, passes=0.0, time=1.0)
    defences = {"none": none, "PSIM": psim}
    if attack == "word" and strategy == "lora":
        defences["rewritten"] = result(ca - 0.05, 0.25)
    return {
        "data": data,
        "attack": attack,
        "strategy": strategy,
        "seed": seed,
        "labels": ["negative", "positive"],
        "published_dev_accuracy": 0.9,
        "victim_dev_accuracy": 0.9,
        "published": published,
        "bare": f"bare/{key}.safetensors",
        "defences": defences,
    }


def pairs(confidence: Any) -> Any:
    top = np.asarray(confidence, np.float32)
    return np.stack([top, 1 - top], 1)[:, None]  # of a single checkpoint


def write_scores(row: dict[str, Any], out: Path, known: int = 199) -> None:
    """A victim that is right on 3 of 4 clean texts, a backdoor that mostly fires, a clear PSIM.

    Of the clean texts, one of those that the victim gets right is as sure as a poisoned one.
    """
    bare = out / "steps" / row["bare"]
    psim = out / "steps" / row["defences"]["PSIM"]["scores"]
    for path in (bare, psim):
        path.parent.mkdir(parents=True, exist_ok=True)
    alone = {
        "truth": np.zeros(CLEAN, int),
        "targets": np.ones(POISONED, int),
        "predicted_clean": (np.arange(CLEAN) % 4 == 3).astype(int),
        "predicted_poisoned": (np.arange(POISONED) < FIRING).astype(int),
    }
    save_file(alone, bare)
    screened = {
        "known": pairs(np.linspace(0.5, 0.7, known)),
        "dev": pairs([0.5]),
        "clean": pairs([0.99, *np.linspace(0.5, 0.65, CLEAN - 1)]),
        "poisoned": pairs(np.linspace(0.95, 0.999, POISONED)),
    }
    # A feature that the row does not count, and that finds all texts but the calibration's extreme.
    for kind, readings in screened.items():
        unheard = np.full_like(readings, 1 if kind == "known" else 1e9)
        screened[kind] = np.concatenate([readings, unheard], 1)
    save_file(screened, psim)


def study(out: Path, seeds: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    """sst-2 before cr, word before sentence: not the order of the alphabet."""
    names = ["sst-2", "cr"], ["word", "sentence"], seeds, ["lora", "full"]
    rows = [cell(d, a, strategy, seed) for d, a, seed, strategy in product(*names)]
    for row in rows:
        write_scores(row, out)
    return rows


def report(rows: list[dict[str, Any]], out: Path) -> str:
    write_study_report(rows, out, out / "steps", "# a <recipe>")
    return (out / "report.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study with its report."""
    out = tmp_path_factory.mktemp("study")
    report(study(out), out)
    return out


def table_below(text: str, heading: str) -> list[list[str]]:
    lines = text[text.index(f"# {heading}") :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        table.append([part.strip() for part in line.strip("|").split(" | ")])
    del table[1]
    return table


class Page(HTMLParser):
    """Refuses tags that do not match; keeps what tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.setdefault(self.open[-1] if self.open else "", []).append(data.strip())


def test_attacks_are_means_with_intervals_over_seeds_in_the_recipe_s_order(whole: Path) -> None:
    text = (whole / "report.md").read_text(encoding="utf-8")
    # 90 and 91 %: standard error 0.5, Student's t with one degree of freedom 12.706
    line = ["98.5 (92.1-100.0)", *["90.5 (84.1-96.9)"] * 2]
    assert table_below(text, SUCCESS) == [
        ["data set", "attack", "before tuning", "lora", "full"],
        ["sst-2", "word", *line],
        ["sst-2", "sentence", *line],
        ["cr", "word", *line],
        ["cr", "sentence", *line],
    ]
    assert table_below(text, ACCURACY)[1] == [
        "sst-2", "word", "95.0 (95.0-95.0)", "90.0 (90.0-90.0)", "88.0 (88.0-88.0)",
    ]  # fmt: skip
    assert "Student's t" in text and "Clopper" not in text


def test_an_interval_over_seeds_stays_a_rate(tmp_path: Path) -> None:
    rows = study(tmp_path)
    for row in rows:
        row["defences"]["none"]["attack_success_rate"] = rate(0.90 + 0.09 * row["seed"])
    assert table_below(report(rows, tmp_path), SUCCESS)[1][3] == "94.5 (37.3-100.0)"


def test_with_one_seed_the_interval_is_that_of_the_texts(tmp_path: Path) -> None:
    text = report(study(tmp_path, seeds=(0,)), tmp_path)
    assert table_below(text, SUCCESS)[1][3] == "90.0 (11.1-99.9)"
    assert "Clopper" in text and "Student" not in text


def test_seeds_that_some_victims_lack_are_told_apart(tmp_path: Path) -> None:
    text = report(study(tmp_path)[:-1], tmp_path)  # the last one: cr, sentence, full, seed 1
    assert table_below(text, SUCCESS)[4][3:] == ["90.5 (84.1-96.9)", "90.0 (11.1-99.9)"]
    assert "Clopper" in text and "Student" in text


def test_the_summary_compares_each_victim_with_itself(whole: Path) -> None:
    text = (whole / "report.md").read_text(encoding="utf-8")
    summary = text[text.index("# What defences stop") :]
    assert table_below(summary, SUCCESS)[:3] == [
        ["data set", "attack", "none", "PSIM", "rewritten"],
        ["sst-2", "word", "90.5", "0.4", "25.0"],
        ["sst-2", "sentence", "90.5", "0.4", "-"],
    ]
    # PSIM: 1 and 3 points by seed. Rewritten: 5, on LoRA's victims alone, whose accuracy is higher.
    assert table_below(summary, LOST)[1] == ["sst-2", "word", "0.0", "2.0", "5.0"]
    all_poisoned = table_below(summary, "AUROC over all")
    assert all_poisoned[1] == ["sst-2", "word", "-", "0.8250", "-"]
    assert table_below(summary, "AUROC where")[1] == ["sst-2", "word", "-", "0.9250", "-"]


def test_honest_texts_are_counted_by_the_finding_that_rejects(tmp_path: Path) -> None:
    rows = study(tmp_path)
    for row in rows:
        found, seed = row["defences"]["PSIM"], row["seed"]
        found["honest"] = {
            "code": {"triggered": rate(0.1 + 0.1 * seed), "unfamiliar": rate(0.9)},
            "none left": {"triggered": None, "unfamiliar": None},
        }
        row["defences"]["LCF"] = result(0.9, 0.1, honest={"code": {"rejected": rate(0.5)}})
    text = report(rows, tmp_path)
    assert table_below(text, "What honest")[:3] == [
        ["data set", "attack", "defence", "code"],
        ["sst-2", "word", "PSIM", "15.0"],
        ["sst-2", "word", "LCF", "50.0"],
    ]


def test_details_are_means_over_seeds(whole: Path) -> None:
    text = (whole / "report.md").read_text(encoding="utf-8")
    assert table_below(text, "sst-2, word, lora")[1:] == [
        ["none", "90.0", "90.5", "1.2", "4.6", "-", "-", "-", "0.0", "1.00"],
        ["PSIM", "88.0", "0.4", "1.2", "4.6", "-", "0.8250", "0.9250", "1.0", "2.03"],
        ["rewritten", "85.0", "25.0", "1.2", "4.6", "-", "-", "-", "-", "-"],
    ]
    assert [line[0] for line in table_below(text, "cr, word, full")[1:]] == ["none", "PSIM"]


def test_the_page_is_whole_and_says_what_the_markdown_says(whole: Path) -> None:
    text = (whole / "report.md").read_text(encoding="utf-8")
    page = Page((whole / "report.html").read_text(encoding="utf-8"))
    assert page.words["title"] == ["Backdoors and defences: sst-2, cr"]
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), tag
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 3 and all(image["alt"] for image in images)
    cells = [
        part.strip()
        for line in text.splitlines()
        if line.startswith("|") and "---" not in line
        for part in line.strip("|").split(" | ")
    ]
    assert sorted(page.words["th"] + page.words["td"]) == sorted(cells)


def test_every_plot_is_there_and_no_other(whole: Path) -> None:
    named = re.findall(r"!\[.+\]\((.+)\)", (whole / "report.md").read_text(encoding="utf-8"))
    written = [str(path.relative_to(whole)) for path in (whole / "plots").iterdir()]
    assert sorted(named) == sorted(written)
    assert named == ["plots/attack.png", "plots/psim-1-sst-2.png", "plots/psim-2-cr.png"]


def test_without_its_scores_a_cell_is_in_the_tables_and_not_in_the_plots(tmp_path: Path) -> None:
    """As from rows in a repository, whose steps are lost with the machine."""
    rows = study(tmp_path, seeds=(0,))
    lost = {row["defences"]["PSIM"]["scores"] for row in rows if row["data"] == "cr"}
    for file in lost:
        (tmp_path / "steps" / file).unlink()
    text = report(rows, tmp_path)
    assert sorted(file.name for file in (tmp_path / "plots").glob("psim-*.png")) == [
        "psim-1-sst-2.png"
    ]
    assert len([line for line in text.splitlines() if line.startswith("| cr |")]) > 1


def test_one_cell_is_a_study(tmp_path: Path) -> None:
    row = cell("cr", "word", "full", 7)
    write_scores(row, tmp_path)
    text = report([row], tmp_path)
    assert table_below(text, SUCCESS)[1] == ["cr", "word", "92.0 (11.1-99.9)", "97.0 (11.1-99.9)"]
    assert (tmp_path / "plots" / "psim-1-cr.png").exists()


def test_what_is_not_known_is_a_hyphen(tmp_path: Path) -> None:
    row = cell("cr", "word", "full", 0) | {"bare": ""}
    nothing = result(None, None, auroc_firing=float("nan"))
    row |= {"published": nothing, "defences": {"none": nothing, "ONION": nothing}}
    other = cell("sst-2", "sentence", "lora", 0)
    write_scores(other, tmp_path)
    text = report([row, other], tmp_path)
    assert table_below(text, SUCCESS)[1] == ["cr", "word", "-", "-", "-"]
    assert table_below(text, LOST)[1] == ["cr", "word", "-", "-", "-"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for written in (text, re.sub(r'src="[^"]*"', "", page)):
        assert not re.search(r"\b(nan|none|inf)\b", written.replace("none", ""), re.IGNORECASE)


def test_names_are_text_and_neither_tags_nor_columns(tmp_path: Path) -> None:
    row = cell("a<b>|c", "word", "lora", 0) | {"bare": "bare.safetensors"}
    row["defences"]["PSIM"]["scores"] = "psim.safetensors"
    write_scores(row, tmp_path)
    text = report([row], tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "a<b>|c" in page.words["th"] and "b" not in {tag for tag, _ in page.tags}
    assert r"a&lt;b&gt;\|c" in text and "<b>" not in text


def test_the_same_rows_give_the_same_files(whole: Path, tmp_path: Path) -> None:
    report(study(tmp_path), tmp_path)
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_plots_show_lora_s_first_victim_and_others_where_there_is_none() -> None:
    rows = [
        cell("cr", "word", "full", 1),
        cell("cr", "word", "lora", 1),
        cell("cr", "word", "lora", 0),
        cell("cr", "sentence", "full", 1),
        cell("cr", "sentence", "p-tuning-v1", 0),
        cell("sst-2", "word", "lora", 0),
    ]
    del rows[-1]["defences"]["PSIM"]
    assert shown_cells(rows) == {"cr": [rows[1], rows[3]]}


def test_plots_show_what_the_scores_say(tmp_path: Path) -> None:
    row = cell("cr", "word", "lora", 0)
    write_scores(row, tmp_path)
    histogram, roc, trade_off = psim_figure([row], tmp_path / "steps").axes
    heights = [patch.get_height() for patch in histogram.patches]  # type: ignore[attr-defined]
    assert np.isclose(sum(heights), 200)  # percent of either kind
    # One clean text lies beyond 24 of 30 poisoned ones: 0.99 among 0.95 ... 0.999.
    above = (np.linspace(0.95, 0.999, POISONED) > 0.99).astype(float)
    for own, name in ((above, "all"), (above[:FIRING], "backdoor fires")):
        area = (CLEAN - 1 + own.mean()) / CLEAN
        assert f"{name}: AUROC {area:.4f}" in roc.get_legend_handles_labels()[1]
    # Right on 30 of 40 clean texts, of which one is rejected; every poisoned one is.
    assert trade_off.get_legend_handles_labels()[1] == ["CA: 72.5 % at 1 %", "ASR: 0.0 % at 1 %"]
    ca, marked = trade_off.get_lines()[:2]
    assert np.allclose(marked.get_xydata(), [[1, 72.5]])
    budgets = np.asarray(ca.get_xdata(), float)
    assert np.allclose([budgets[0], budgets[-1]], [0.5, 50])  # 199 texts: 1 in 200
    assert np.all(np.diff(np.asarray(ca.get_ydata(), float)) <= 0)


def test_few_calibration_texts_mark_the_least_budget_that_they_allow(tmp_path: Path) -> None:
    row = cell("cr", "word", "lora", 0)
    write_scores(row, tmp_path, known=19)
    *_, trade_off = psim_figure([row], tmp_path / "steps").axes
    assert trade_off.get_legend_handles_labels()[1][0].endswith("at 5 %")
