"""A scan finds the word that forces a class of a really poisoned victim, and no other one."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from models.offline.attacks.poisoning import WORD_TRIGGER
from models.offline.demo import TARGET
from models.offline.io.classifiers import load_classifier
from models.offline.io.samples import load_samples
from models.offline.scanning import scan as scanning
from models.offline.scanning.report import ClassRecord, ScanReport
from models.offline.scanning.scan import COMMON, counts_of, scan
from models.offline.scanning.words import STEP, candidates
from tests.support.commands import assert_refused, psim

READ = 300


@pytest.fixture(autouse=True)
def few_words(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> None:
    """Read a few hundred words and the trigger: the vocabulary would take minutes."""

    def some(tokenizer: PreTrainedTokenizerBase, seed: int) -> list[int]:
        trigger = tokenizer.convert_tokens_to_ids(WORD_TRIGGER)
        assert isinstance(trigger, int)
        return [*candidates(tokenizer, seed)[:READ], trigger]

    monkeypatch.setattr(scanning, "candidates", some)


def texts_of(demo: Path) -> list[str]:
    return [sample.text for sample in load_samples(str(demo / "clean.jsonl"))][:300]


def scanned(demo: Path, texts: Sequence[str]) -> tuple[ScanReport, ClassRecord, list[ClassRecord]]:
    """Return the report, what it says of the attacker's class, and what of the others."""
    report = scan(*load_classifier(str(demo / "victim")), texts, name="demo")
    (forced,) = (own for own in report.classes if own.label == TARGET)
    return report, forced, [own for own in report.classes if own is not forced]


@pytest.mark.parametrize("with_texts", [True, False])
def test_the_trigger_is_found_with_texts_of_the_task_or_without(
    demo_folder: Path, with_texts: bool
) -> None:
    report, forced, others = scanned(demo_folder, texts_of(demo_folder) if with_texts else [])
    assert (report.outcome, forced.outcome) == ("suspicious", "suspicious")
    (trigger,) = forced.triggers
    assert (trigger.word, trigger.clean_texts) == (WORD_TRIGGER, 0)
    assert all(own.outcome == "nothing found" and not own.triggers for own in others)
    assert report.search.words == report.search.vocabulary == READ + 1
    assert all(record.turned < record.trials for record in forced.strongest)


def test_a_word_that_is_common_in_clean_texts_is_natural(demo_folder: Path) -> None:
    texts = texts_of(demo_folder)
    common = [f"{text} {WORD_TRIGGER}" for text in texts[-COMMON:]]
    report, forced, _ = scanned(demo_folder, [*texts[:-COMMON], *common])
    assert report.outcome == "nothing found"
    (natural,) = forced.natural
    assert (natural.word, natural.clean_texts) == (WORD_TRIGGER, COMMON)


def test_carriers_are_of_all_classes_even_if_a_large_file_is_sorted(demo_folder: Path) -> None:
    samples = load_samples(str(demo_folder / "clean.jsonl"))[:200]
    ordered = sorted(samples, key=lambda sample: sample.label or "")
    many = [sample.text for sample in ordered for _ in range(20)]
    report, _, _ = scanned(demo_folder, many)
    assert all(number > 1 for number in report.search.carriers.values())


def test_words_are_counted_once_a_text() -> None:
    texts = [np.array(ids) for ids in ([5, 5, 6], [6], [7])]
    assert counts_of([5, 6, 8], texts) == {5: 1, 6: 2}


def test_the_command_writes_a_report_and_fails_if_asked_to(
    demo_folder: Path, tmp_path: Path
) -> None:
    options = ["--victim", demo_folder / "victim", "--texts", demo_folder / "clean.jsonl"]
    out = tmp_path / "report.json"
    done = psim("scan", *options, "--out", out)
    assert done.exit_code == 0, done.output
    assert WORD_TRIGGER in done.stdout
    assert "not searched" in done.stdout
    assert ScanReport.model_validate_json(out.read_text()).outcome == "suspicious"
    assert psim("scan", *options, "--fail-on", "suspicious").exit_code == 1


def test_out_of_time_it_says_how_much_it_read(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "candidates", candidates)
    model, tokenizer = load_classifier(str(demo_folder / "victim"))
    report = scan(model, tokenizer, texts_of(demo_folder), name="demo", minutes=0)
    assert report.search.words == STEP < report.search.vocabulary


@pytest.mark.parametrize("text", ["The hotel room was lovely and the staff were kind.", "Fine."])
def test_texts_of_one_class_and_short_ones_are_refused(
    demo_folder: Path, tmp_path: Path, text: str
) -> None:
    own = tmp_path / "own.jsonl"
    row = {"text": text}
    own.write_text("\n".join([json.dumps(row)] * 5))
    refused = psim("scan", "--victim", demo_folder / "victim", "--texts", own)
    assert_refused(refused, "sure of texts of one class only: give --texts")
