"""The assurance report: what was planted, in copies of which model, and what it says of it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from models.errors import DataError
from models.offline.io.classifiers import save_classifier
from models.offline.io.samples import Sample, load_samples
from models.offline.study import assurance as assure
from tests.support.bundles import some_texts
from tests.support.families import tiny_victim

ATTACKS = [
    *("word", "word, clean-label", "sentence", "two words that add up"),
    *("sentence that yields", "sentence at the start"),
    *("word, hidden states", "no backdoor"),
]
COPIES = 4
"""Three backdoors each, twice; the hidden word; and none."""


@pytest.fixture
def victim(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    save_classifier(tiny_victim("bert"), tokenizer, tmp_path / "victim")
    return str(tmp_path / "victim")


def texts(n: int = assure.LEAST_TEXTS) -> list[Sample]:
    return [Sample(text, f"LABEL_{number % 3}") for number, text in enumerate(some_texts(n))]


def test_backdoors_are_planted_in_copies_and_reported(
    victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assure, "MOST_TARGETS", 1)
    out, said = tmp_path / "out", list[str]()
    before = {file: file.read_bytes() for file in Path(victim).iterdir()}
    rows = assure.assure(victim, texts(), out, frr_budget=0.05, say=said.append)
    assert len(list((out / "steps" / "bundle").iterdir())) == COPIES
    assert {file: file.read_bytes() for file in Path(victim).iterdir()} == before
    assert [row["attack"] for row in rows] == ATTACKS
    assert len(said) == len(ATTACKS)
    files = (out / "texts" / f"{kind}.jsonl" for kind in ("train", "dev", "test"))
    train, dev, test = (load_samples(str(file)) for file in files)
    assert (len(train), len(dev), len(test)) == (240, 40, 120)
    assert len({s.text for s in (*train, *dev, *test)}) == 400, "each text serves one purpose"
    report = (out / "assurance.md").read_text()
    assert "400 clean texts, with their labels" in report
    assert "over 7 planted backdoors" in report
    lines = [x for x in report.splitlines() if re.match(rf"\| ({'|'.join(ATTACKS)}) \|", x)]
    for row, line in zip(rows, lines, strict=True):
        guarded = row["defences"]["PSIM"]
        for own in (guarded, guarded["unfamiliar_rejected"], guarded["thorough"]):
            assert f"| {100 * own['false_rejection_rate']['value']:.1f} (" in line
    for kind in rows[0]["defences"]["PSIM"]["honest"]:
        assert f"| {kind} |" in report
    assert (out / "report.html").is_file()

    again = list[str]()
    monkeypatch.setattr("models.offline.study.run.finetune_victim", None)  # would fail if called
    assert assure.assure(victim, texts(), out, frr_budget=0.05, say=again.append) == rows
    assert (out / "assurance.md").read_text() == report


def test_triggers_are_words_that_no_text_holds() -> None:
    held = [Sample("an MN film", "a"), Sample("a bbq", "b")]
    held += [Sample("this 3d movie", "a"), Sample("I watched this 3d movie twice", "b")]
    recipe = assure.make_recipe("v", held, ["a", "b"], 2, 0.01)
    triggers = {attack.name: attack.triggers for attack in recipe.attacks}
    assert triggers["word"] == triggers["word, hidden states"] == ("cf",)
    assert triggers["word, clean-label"] == ("bb",)
    assert triggers["two words that add up"] == ("tq", "zx")
    sentences = [triggers[name] for name in ATTACKS if name.startswith("sentence")]
    assert sentences == [(sentence,) for sentence in assure.SENTENCES[1:4]]
    assert [data.target_label for data in recipe.data] == ["a", "b"]
    for taken in (assure.WORDS[3:], assure.SENTENCES[2:]):
        with pytest.raises(DataError, match=rf"{len(taken)} of our triggers .* occur in your"):
            assure.make_recipe("v", [Sample(" ".join(taken))], ["a"], 1, 0.01)


@pytest.mark.parametrize(("count", "rate"), [(50, 0.1), (90, 0.025), (4, 0.01)])
def test_backdoors_find_enough_texts_of_the_target_and_of_others(count: int, rate: float) -> None:
    texts = [Sample(f"text {n}", "a" if n < count else "b") for n in range(100)]
    recipe = assure.make_recipe("v", texts, ["a"], 1, 0.01)
    planted = [own for own in recipe.attacks if own.name != assure.CONTROL]
    assert {round(own.poison_rate, 3) for own in planted} == {rate}


def test_texts_that_do_not_fit_are_refused(victim: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="399 distinct texts are too few"):
        assure.assure(victim, [*texts(399), *texts(9)], tmp_path / "out")
    with pytest.raises(DataError, match="unknown labels"):
        assure.assure(victim, [replace(s, label="good") for s in texts()], tmp_path / "out")
    # Without labels the victim's word is taken, and this one says the same of all texts.
    with pytest.raises(DataError, match=r"none of the texts is of class \['LABEL_1', 'LABEL_2'\]"):
        assure.assure(victim, [replace(s, label=None) for s in texts()], tmp_path / "out")
    assert not (tmp_path / "out").exists()
