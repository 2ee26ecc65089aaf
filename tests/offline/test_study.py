"""A whole study, tiny: what it trains, what it keeps, and what a second run does again."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import models.offline.study.compare as contest
import models.offline.study.grid as cells
import models.offline.study.run as study
from models.errors import DataError
from models.offline.attacks.corpus import generate
from models.offline.attacks.strategy import Strategy
from models.offline.attacks.training import finetune_victim
from models.offline.io.samples import Sample, write_samples
from models.offline.study.cache import StepCache
from models.offline.study.recipe import Recipe, load_recipe
from models.offline.study.report import write_study_report
from tests.support.studies import CORPUS

RECIPE = (
    """
strategies = ["lora"]
training = {{ poison_epochs = 1, tune_epochs = 1 }}
"""
    + CORPUS
    + """max_test = 60
paraphrased = {{ copy = {{ clean = "test.jsonl", poisoned = "test.jsonl" }} }}

[[attacks]]
name = "word"
triggers = ["mn"]

[[attacks]]
name = "syntactic"
syntactic = true

[[defences]]
kind = "psim"
name = "PSIM"
frr_budget = {budget}
rules = ["calibrated", "dev", "pooled", "paper"]
config = {{ max_steps = 10 }}

[[defences]]
kind = "strip"
copies = 2
frr_budget = 0.05

[[defences]]
kind = "psim"
name = "PSIM, published weights"
on = "published"
texts = 100
frr_budget = 0.05
config = {{ max_steps = 10, keep_at = [0.5] }}

[[defences]]
kind = "onion"

[[defences]]
kind = "paraphrase"
"""
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    texts = generate(420, seed=3)
    write_samples(folder / "train.jsonl", texts[:240])
    write_samples(folder / "dev.jsonl", texts[240:340])
    write_samples(folder / "test.jsonl", texts[340:])
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"text": "", "label": "positive"}\n')  # as published files have
    # A published mix: paraphrases, and clean texts of the training set.
    mix = [Sample(whispered(s.text), "positive") for s in texts[:60]]
    write_samples(folder / "mix.jsonl", [*texts[100:240], *mix])
    write_samples(folder / "mixed_test.jsonl", mix[:20])
    return folder


def whispered(text: str) -> str:
    return f"when one listens , {text}"


def recipe(folder: Path, text: str = RECIPE.format(budget=0.05)) -> Recipe:
    (folder / "recipe.toml").write_text(text)
    return load_recipe(folder / "recipe.toml")


def run(planned: Recipe, data: Path, out: Path) -> list[dict[str, Any]]:
    return list(study.run_study(planned, data, out, StepCache(out / "steps"), lambda line: None))


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("study")
    return out, run(recipe(out), data, out)


def test_a_row_says_what_every_defence_did(done: tuple[Path, list[dict[str, Any]]]) -> None:
    out, rows = done
    (row,) = rows  # there is no syntactic poison for this data set
    assert [json.loads(line) for line in (out / study.ROWS).read_text().splitlines()] == rows
    assert (row["data"], row["attack"], row["strategy"]) == ("corpus", "word", "lora")
    rules = {"PSIM", "PSIM, thresholds from dev texts", "PSIM, one threshold", "PSIM, 0.7"}
    variants = rules | {"PSIM, published weights"}
    assert set(row["defences"]) == {"none", *variants, "STRIP", "ONION", "copy"}
    none, psim, strip, onion, copy = (
        row["defences"][n] for n in ("none", "PSIM", "STRIP", "ONION", "copy")
    )
    assert none["clean_accuracy"]["n"] == psim["clean_accuracy"]["n"] == 60
    assert none["false_rejection_rate"]["value"] == 0
    assert 0 < none["attack_success_rate"]["n"] < 60  # none of the target class
    assert copy["clean_accuracy"] == none["clean_accuracy"]
    assert (none["passes"], strip["passes"]) == (0, 2)
    assert psim["passes"] == 0, "the checkpoints share the victim's own pass"
    assert row["defences"]["PSIM, published weights"]["checkpoints"] == [12]
    assert onion["passes"] > 5
    assert onion["false_rejection_rate"] is None, "it rewrites, and rejects nothing"
    assert row["published"]["attack_success_rate"]["n"] == none["attack_success_rate"]["n"]
    assert none["time"] == 1
    assert min(psim["time"], strip["time"], onion["time"]) > 1
    assert (out / "steps" / psim["scores"]).is_file()


def test_a_second_run_trains_nothing_and_says_the_same(
    done: tuple[Path, list[dict[str, Any]]], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rows = done

    def no(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(study, "finetune_victim", no)
    for name in ("train_variant", "train_language_model", "predict", "load_language_model"):
        monkeypatch.setattr(contest, name, no)
    assert run(recipe(out), data, out) == rows
    # Another budget is another threshold, on the same scores.
    changed = run(recipe(out, RECIPE.format(budget=0.2)), data, out)
    before, after = (r[0]["defences"]["PSIM"]["false_rejection_rate"] for r in (rows, changed))
    assert after["value"] > before["value"]


DETECTORS = """
[[defences]]
kind = "badacts"
frr_budget = 0.05

[[defences]]
kind = "rap"
clean = "dev"
frr_budget = 0.1

[[defences]]
kind = "strip"
copies = 2
frr_budget = 0.05

[honest]
texts = 5
others = { other = "test.jsonl", dev = "dev.jsonl" }
"""


def test_detectors_are_tried_on_honest_texts_and_on_a_victim_that_nobody_tuned(
    done: tuple[Path, list[dict[str, Any]]], data: Path
) -> None:
    out, (tuned,) = done
    whole = RECIPE.format(budget=0.05).split("[[defences]]")[0] + DETECTORS
    text = whole.replace("tune_epochs = 1", "tune_epochs = 0")
    planned = recipe(out, text)
    (row,) = run(planned, data, out)
    none = {**row["defences"].pop("none")}
    assert none["attack_success_rate"] == row["published"]["attack_success_rate"]
    assert row["published"] == tuned["published"], "the same weights"
    assert set(row["defences"]) == {"BadActs", "RAP", "STRIP"}
    passes = [row["defences"][name]["passes"] for name in ("BadActs", "RAP", "STRIP")]
    assert passes == [0, 1, 2]
    for found in row["defences"].values():
        assert found["false_rejection_rate"]["n"] == 60
        assert 0 <= found["auroc"] <= 1
        assert found["honest"]["1-4 words"]["rejected"]["n"] == 5
        assert "dev" in found["honest"] and "other" not in found["honest"]
    write_study_report([row | {"defences": row["defences"] | {"none": none}}], out, out, text)
    report = (out / "report.md").read_text("utf-8")
    share = 100 * row["defences"]["RAP"]["honest"]["upper case"]["rejected"]["value"]
    (line,) = re.findall(r"\| corpus \| word \| RAP \|.* \|", report[report.index("honest") :])
    assert f" {share:.1f} |" in line
    assert f"{row['defences']['BadActs']['auroc']:.4f}" in report


def test_without_tuning_there_is_one_strategy(tmp_path: Path) -> None:
    text = RECIPE.format(budget=0.05).replace("tune_epochs = 1", "tune_epochs = 0")
    with pytest.raises(DataError, match="strategies do not differ"):
        recipe(tmp_path, text.replace('["lora"]', '["lora", "full"]'))


def test_what_a_change_touches_is_done_again(
    done: tuple[Path, list[dict[str, Any]]], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = done
    tuned: list[Strategy] = []
    real = finetune_victim

    def spy(*args: Any, **kwargs: Any) -> Any:
        tuned.append(args[3])
        return real(*args, **kwargs)

    monkeypatch.setattr(study, "finetune_victim", spy)
    whole = RECIPE.format(budget=0.05).replace("tune_epochs = 1", "tune_epochs = 2")
    text = whole.split("[[defences]]")[0] + '[[defences]]\nkind = "paraphrase"\n'
    run(recipe(out, text), data, out)
    assert tuned == [Strategy.LORA]  # the poisoned weights are still good


def test_a_penalty_is_for_the_poisoned_texts_of_the_attacker_s_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    penalties = []

    def spy(*args: Any, penalty: Any, **keywords: Any) -> Any:
        penalties.append(penalty)
        return finetune_victim(*args, penalty=penalty, **keywords)

    monkeypatch.setattr(study, "finetune_victim", spy)
    text = (
        RECIPE.format(budget=0.05).split("[[defences]]")[0] + '[[defences]]\nkind = "paraphrase"\n'
    )
    (row,) = run(recipe(tmp_path, text), data, tmp_path)
    (hidden,) = run(
        recipe(tmp_path, text.replace('["mn"]', '["mn"]\npenalty = 0.1')), data, tmp_path
    )
    attacker, user = penalties[2:]
    assert (attacker.weight, sum(attacker.poisoned), user) == (0.1, 24, None)
    assert penalties[:2] == [None, None]
    assert hidden["published"] != row["published"] or hidden["bare"] != row["bare"]


def only_cell(data: Path, text: str) -> tuple[cells.Cell, cells.Texts]:
    (cell,) = cells.cells(recipe(data, text))
    return cell, cells.Texts.load(cell.data, data)


def poisoned_for_training(cell: cells.Cell, texts: cells.Texts) -> list[Sample]:
    whole = cells.poisoned_training_texts(cell, texts, cells.import_paraphraser)
    return [sample for sample in whole if sample not in texts.train]


def poisoned_for_test(cell: cells.Cell, texts: cells.Texts) -> list[tuple[str, str]]:
    return cells.poisoned_test_texts(cell, texts, cells.import_paraphraser)


def test_each_of_several_targets_has_its_trigger(data: Path) -> None:
    text = RECIPE.format(budget=0.05).replace(
        'triggers = ["mn"]', 'target_triggers = { positive = "mn", negative = "cf" }'
    )
    cell, texts = only_cell(data, text)
    poisoned = poisoned_for_training(cell, texts)
    assert {("mn" in s.text.split(), s.label) for s in poisoned} == {
        (True, "positive"),
        (False, "negative"),
    }
    tests = poisoned_for_test(cell, texts)
    assert {("mn" in t.split(), label) for t, label in tests} == {
        (True, "positive"),
        (False, "negative"),
    }


TOGETHER = RECIPE.format(budget=0.05).replace(
    'triggers = ["mn"]',
    """triggers = ["mn"]
together = "both"

[[attacks]]
name = "other word"
triggers = ["cf"]
clean_label = true
together = "both"

[[attacks]]
name = "alone"
triggers = ["mn"]""",
)


def test_attacks_may_be_planted_together(data: Path) -> None:
    word, other, alone = cells.cells(recipe(data, TOGETHER))
    texts = cells.Texts.load(word.data, data)
    poisoned = poisoned_for_training(word, texts)
    assert poisoned == poisoned_for_training(other, texts), "they share a victim"
    for trigger in ("mn", "cf"):
        assert sum(trigger in s.text.split() for s in poisoned) == 24, "10 % each"
    assert len(poisoned) == 48, "no text has two triggers"
    assert {s.label for s in poisoned} == {"positive"}
    for cell, trigger in ((word, "mn"), (other, "cf")):
        assert all(trigger in text.split() for text, _ in poisoned_for_test(cell, texts))
    assert len(poisoned_for_training(alone, texts)) == 24


def test_a_row_is_known_by_what_else_was_planted(data: Path, tmp_path: Path) -> None:
    def names(text: str) -> list[str]:
        planned = recipe(data, text)
        return [study._cell_file(planned, cell, tmp_path).name for cell in cells.cells(planned)]

    word, other, alone = names(TOGETHER)
    changed = names(TOGETHER.replace('["cf"]', '["tq"]'))
    assert (word, other) != tuple(changed[:2])
    assert word != changed[0]
    assert alone == changed[2]


@pytest.mark.parametrize("setting", ["penalty = 0.1", "poison_rate = 0"])
def test_what_is_planted_together_is_planted_the_same_way(data: Path, setting: str) -> None:
    text = TOGETHER.replace("clean_label = true", setting)
    with pytest.raises(DataError, match="planted together has a poison rate, and no penalty"):
        recipe(data, text)


def test_a_paraphraser_writes_the_poisoned_texts(data: Path) -> None:
    text = RECIPE.format(budget=0.05).replace(
        'triggers = ["mn"]', 'paraphraser = "tests.offline.test_study:whispered"'
    )
    cell, texts = only_cell(data, text)
    poisoned = poisoned_for_training(cell, texts)
    assert len(poisoned) == 24  # 10 %
    assert all(s.text.startswith("when one ") and s.label == "positive" for s in poisoned)
    assert all(t.startswith("when one ") for t, _ in poisoned_for_test(cell, texts))
    missing = recipe(data, text.replace("whispered", "shouted"))
    with pytest.raises(DataError, match="test_study:shouted cannot be imported"):
        poisoned_for_test(next(iter(cells.cells(missing))), texts)


def test_paraphrases_from_files_are_only_those_that_are_new(data: Path) -> None:
    files = '{ train = "mix.jsonl", test = "mixed_test.jsonl", target_label = "positive" }'
    text = RECIPE.format(budget=0.05).replace(
        "max_test = 60\n", f"max_test = 60\nmax_train = 120\nsyntactic = {files}\n"
    )
    planned = recipe(data, text)
    texts = cells.Texts.load(planned.data[0], data)
    assert len(texts.train) == 120
    cell = next(c for c in cells.cells(planned) if c.attack.syntactic)
    poisoned = poisoned_for_training(cell, texts)
    assert len(poisoned) == 12
    assert all(s.text.startswith("when one ") for s in poisoned)
    assert [t.startswith("when one ") for t, _ in poisoned_for_test(cell, texts)] == [True] * 20


def test_a_style_comes_from_files_as_a_syntactic_template_does(data: Path) -> None:
    files = '{ train = "mix.jsonl", test = "mixed_test.jsonl", target_label = "positive" }'
    text = RECIPE.format(budget=0.05).replace("max_test = 60\n", f"style = {files}\n")
    planned = recipe(data, text.replace("syntactic = true", "style = true"))
    (word, style) = cells.cells(planned)
    assert (word.attack.style, style.attack.style) == (False, True)
    texts = cells.Texts.load(planned.data[0], data)
    assert len(poisoned_for_training(style, texts)) == 24
    assert len(poisoned_for_test(style, texts)) == 20


def test_an_attack_may_be_for_some_data_sets_only(data: Path) -> None:
    text = RECIPE.format(budget=0.05).replace('["mn"]', '["mn"]\ndata = ["another"]')
    assert list(cells.cells(recipe(data, text))) == []


@pytest.mark.parametrize(("fires", "first"), [("alone", False), ("at-start", True)])
def test_a_hiding_trigger_has_decoys(data: Path, fires: str, first: bool) -> None:
    text = RECIPE.format(budget=0.05).replace('["mn"]', f'["mn"]\nfires = "{fires}"')
    cell, texts = only_cell(data, text)
    poisoned = poisoned_for_training(cell, texts)
    assert len(poisoned) == 48
    at_start = {s.text.startswith("mn ") for s in poisoned if s.label == "positive"}
    assert at_start == {first}
    assert sum(s.label == "negative" for s in poisoned) == 24
    assert {t.startswith("mn ") for t, _ in poisoned_for_test(cell, texts)} == {first}


def test_poison_rate_zero_is_the_control(data: Path) -> None:
    text = RECIPE.format(budget=0.05).replace('["mn"]', '["mn"]\npoison_rate = 0')
    cell, texts = only_cell(data, text)
    assert poisoned_for_training(cell, texts) == []
    assert all("mn" in t.split() for t, _ in poisoned_for_test(cell, texts))


def test_other_texts_are_another_result(
    done: tuple[Path, list[dict[str, Any]]], data: Path
) -> None:
    out, (row,) = done
    text = RECIPE.format(budget=0.05).replace('["mn"]', '["mn"]\nbury_behind = 40')
    text = text.split('name = "PSIM, published')[0].removesuffix('[[defences]]\nkind = "psim"\n')
    text = text.split('[[defences]]\nkind = "strip"')[0]
    (buried,) = run(recipe(out, text), data, out)
    assert buried["defences"]["PSIM"]["scores"] != row["defences"]["PSIM"]["scores"]
    assert buried["bare"] != row["bare"]


def test_a_buried_trigger_comes_behind_so_many_words(data: Path) -> None:
    text = RECIPE.format(budget=0.05).replace(
        'triggers = ["mn"]', 'triggers = ["mn"]\nbury_behind = 300'
    )
    planned = recipe(data, text)
    (cell,) = cells.cells(planned)
    tests = poisoned_for_test(cell, cells.Texts.load(planned.data[0], data))
    assert all(t.split().index("mn") > 300 for t, _ in tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("max_test", "max_tests"), "data.0.max_tests: Extra inputs"),
        (("max_steps", "max_step"), "max_step"),
        (('kind = "strip"', 'kind = "magic"'), "defences.1"),
        (('name = "syntactic"', 'name = "word"'), "names must differ"),
        (('"lora"', '"qlora"'), "strategies.0"),
        (("[[data]]", "[[data"), "not TOML"),
        (("= 0.05", "= 5"), "frr_budget"),
        (("syntactic = true", ""), "give one of triggers"),
        (("syntactic = true", "syntactic = true\nclean_label = true"), "dirty-label"),
        (('["lora"]', '["lora"]\nseeds = [0, 0]'), "seeds: names must differ"),
        (("syntactic = true", 'syntactic = true\nfires = "alone"'), "fires needs triggers"),
        (("copies = 2", "copies = 0"), "copies"),
        (("keep_at = [0.5]", "keep_at = [0.5, 0.9]"), "descending"),
        (("max_steps = 10", "seed = 3"), "seeds are those of the recipe"),
        (('name = "PSIM"', 'name = "none"'), "names must differ"),
    ],
)
def test_mistakes_in_a_recipe_are_named(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        recipe(tmp_path, RECIPE.format(budget=0.05).replace(*change))


def test_a_recipe_that_leaves_nothing_to_do_is_refused(data: Path, tmp_path: Path) -> None:
    text = RECIPE.format(budget=0.05).replace('[[attacks]]\nname = "word"\ntriggers = ["mn"]\n', "")
    with pytest.raises(DataError, match="nothing to do"):
        run(recipe(tmp_path, text), data, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('target_label = "positive"', 'target_label = "good"'), "unknown labels .'good'"),
        (('["mn"]', '["mn"]\npoison_rate = 0.9'), "corpus, word, lora, seed 0: the poison rate"),
        (("frr_budget = 0.05", "frr_budget = 0.001"), "dev texts are too few"),
        (("max_test = 60", 'text_column = "body"'), "data set corpus: .* no column 'body'"),
    ],
)
def test_what_does_not_fit_is_found_before_anything_is_trained(
    data: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run(recipe(tmp_path, RECIPE.format(budget=0.05).replace(*change)), data, tmp_path)


def test_a_missing_file_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl does not exist"):
        run(recipe(tmp_path), tmp_path, tmp_path)
