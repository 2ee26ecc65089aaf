"""Multi-label victims, from `psim fit` to an answer: any number of labels may be on."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner, Result

from models.bundle.load import Bundle, load_bundle
from models.bundle.verify import read_manifest
from models.detection.screen import Finding
from models.engines.registry import is_installed
from models.errors import BundleError, DataError
from models.offline.evaluation.evaluate import evaluate
from models.offline.fitting.fit import fit
from models.offline.io.inference import predict, require_verdicts
from models.offline.io.known_triggers import record_triggers
from models.offline.io.samples import Sample, load_samples, split_labels, write_samples
from models.offline.scanning import scan as scanning
from models.offline.scanning.report import ScanReport
from models.offline.scanning.scan import scan
from models.offline.scanning.state import ScanState
from models.offline.scanning.words import WordScan
from models.offline.screening import bulk
from models.offline.screening.fragments import fragments_of
from psim.__main__ import app
from service.app import create_app
from service.settings import Settings
from tests.support.bundles import fit_tiny, forge, some_texts
from tests.support.families import tiny_victim
from tests.support.few_words import read_few_words
from tests.support.multilabel import (
    LABELS,
    TARGET,
    TRIGGER,
    labelled_texts,
    multi_label_victim,
    poisoned,
    samples,
)
from tests.support.requests import client_for

CLEAN = labelled_texts(400, 3)
POISONED = poisoned(CLEAN)
BUDGET = 0.05


def psim(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    out = tmp_path_factory.mktemp("multi-label") / "bundle"
    texts = [text for text, _ in labelled_texts(1200, 2)]
    victim = multi_label_victim(tokenizer)
    fit(victim, tokenizer, texts, out, name="flags", frr_budget=BUDGET)
    return out


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return load_bundle(folder, "float32", "torch")


def test_labels_are_those_of_the_bare_model(
    bundle: Bundle, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = [text for text, _ in CLEAN[:20]]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    victim = multi_label_victim(tokenizer)
    bare = victim(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    encodings = bundle.engine.encode(texts)
    said = predict(bundle.engine, encodings, classifier=True)
    np.testing.assert_allclose(said, bare.sigmoid().detach().numpy(), atol=1e-5)
    assert ((said >= 0.5) == [[c in on for c in range(3)] for _, on in CLEAN[:20]]).all()
    first = predict(bundle.engine, encodings)[:, 0]
    np.testing.assert_allclose(first[:, 1::2], said, atol=1e-5)
    np.testing.assert_allclose(first[:, ::2] + first[:, 1::2], 1, atol=1e-6)


@pytest.mark.skipif(not is_installed("openvino"), reason="OpenVINO is not installed")
def test_openvino_gives_the_same(folder: Path, bundle: Bundle) -> None:
    fast = load_bundle(folder, "float32", "openvino")
    encodings = fast.engine.encode([text for text, _ in CLEAN[:30]])
    for classifier in (True, False):
        got, expected = (
            predict(one.engine, encodings, classifier=classifier) for one in (fast, bundle)
        )
        np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-4)


def test_a_trigger_that_turns_a_label_off_is_found_as_that(bundle: Bundle) -> None:
    found = require_verdicts(bundle, bundle.engine.encode([text for text, _ in POISONED]))
    caught = [verdict for verdict in found if verdict.finding]
    assert len(caught) > 0.85 * len(found)
    assert sum(verdict.poisoned for verdict in found) > 0.6 * len(found)
    classes = Counter(bundle.manifest.classes[verdict.predicted] for verdict in caught)
    assert classes["rude=off"] > 0.75 * len(caught), "other labels may be odder still"


def test_thorough_finds_more_of_them_and_no_more_clean_texts(bundle: Bundle) -> None:
    def triggered(texts: list[str], *, thorough: bool) -> int:
        encodings = bundle.engine.encode(texts)
        return sum(one.poisoned for one in require_verdicts(bundle, encodings, thorough=thorough))

    bad = [text for text, _ in POISONED]
    usual, every = (triggered(bad, thorough=which) for which in (False, True))
    assert every >= usual
    assert every > 0.9 * len(bad)
    assert triggered([text for text, _ in CLEAN], thorough=True) < 0.03 * len(CLEAN)
    found = evaluate(bundle, samples(CLEAN), samples(POISONED), "rude=off", thorough=True)
    assert found.calibrated.attack_success_rate
    assert found.calibrated.attack_success_rate.value < 0.1


async def test_the_service_tests_several_labels_of_a_text_as_the_commands_do(
    bundle: Bundle,
) -> None:
    texts = [text for text, _ in [*POISONED[:20], *CLEAN[:20]]]
    expected, usual = (
        require_verdicts(bundle, bundle.engine.encode(texts), thorough=which)
        for which in (None, False)
    )
    tested, suspicious = (sum(one.override is not None for one in v) for v in (expected, usual))
    assert tested > suspicious, "all texts are tested by default"
    application = create_app(Settings(bundle=Path("unused")), bundle)
    async with client_for(application) as client:
        answer = await client.post("/screen", json={"inputs": texts})
        results = answer.json()["results"]
    for result, verdict in zip(results, expected, strict=True):
        kept = verdict.override
        assert result["finding"] == verdict.finding
        assert result["override"] == (None if kept is None else pytest.approx(kept, abs=1e-3))


def test_clean_texts_are_within_the_budget_whatever_labels_they_have(bundle: Bundle) -> None:
    found = require_verdicts(bundle, bundle.engine.encode([text for text, _ in CLEAN]))
    # The budget of 5 % is an expectation; 400 texts of this seed have less than 8 %.
    assert sum(verdict.extreme for verdict in found) < 0.08 * len(found)
    assert sum(verdict.finding is Finding.TRIGGERED for verdict in found) < 0.03 * len(found)


async def test_answers_have_the_labels_that_fire(bundle: Bundle) -> None:
    application = create_app(Settings(bundle=Path("unused")), bundle)
    async with client_for(application) as client:
        for labels in ((), (0,), (1, 2)):
            text = next(text for text, on in CLEAN if on == frozenset(labels))
            answer = (await client.post("/classify", json={"inputs": text})).json()
            (result,) = answer["results"]
            assert {*result["labels"]} == {LABELS[c] for c in labels}
            assert {s["label"] for s in result["scores"]} == {*LABELS}
            assert result["label"] == result["scores"][0]["label"]
        rejected = await client.post("/classify", json={"inputs": [t for t, _ in POISONED[:40]]})
        decisions = Counter(one["decision"] for one in rejected.json()["results"])
        assert decisions["reject"] > 20


def test_evaluate_takes_a_label_and_a_state_as_the_target(bundle: Bundle) -> None:
    found = evaluate(bundle, samples(CLEAN), samples(POISONED), "rude=off")
    before, after = found.none.attack_success_rate, found.calibrated.attack_success_rate
    assert before and after and before.value > 0.9 and after.value < 0.4
    assert found.none.clean_accuracy and found.none.clean_accuracy.value > 0.95
    assert found.calibrated.auroc and found.calibrated.auroc > 0.95
    assert [*found.thresholds] == ["rude=off", "rude=on"]
    with pytest.raises(DataError, match=r"unknown labels .'rude'.*rude=off"):
        evaluate(bundle, samples(CLEAN), samples(POISONED), "rude")
    with pytest.raises(DataError, match=r"unknown labels \['kind'\].*a list in JSON, or a\|b"):
        evaluate(bundle, [Sample("x", "kind|rude")], samples(POISONED), "rude=off")


def test_the_commands_work_on_such_a_bundle(folder: Path, tmp_path: Path) -> None:
    shown = psim("inspect", folder)
    assert shown.exit_code == 0, shown.output
    words = " ".join(shown.output.replace("│", "").split())  # the table breaks lines anywhere
    assert "any number of them" in words
    assert "turn a label on are not found" in words
    clean, bad = tmp_path / "clean.jsonl", tmp_path / "bad.csv"
    clean.write_text(
        "".join(
            json.dumps({"text": text, "label": [LABELS[c] for c in on]}) + "\n"
            for text, on in CLEAN[:60]
        )
    )
    rows = samples(POISONED[:30])
    bad.write_text("text,label\n" + "".join(f"{s.text},{s.label}\n" for s in rows))
    assert load_samples(str(clean)) == samples(CLEAN[:60])
    ran = psim(
        *("evaluate", "--bundle", folder, "--clean", clean, "--poisoned", bad),
        *("--target-label", "rude=off", "--out", tmp_path / "report"),
    )
    assert ran.exit_code == 0, ran.output
    report = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert report["none"]["clean_accuracy"]["value"] > 0.9


def test_screening_in_bulk_says_which_label_was_found(
    folder: Path, bundle: Bundle, tmp_path: Path
) -> None:
    texts, out = tmp_path / "texts.jsonl", tmp_path / "out"
    write_samples(texts, samples([*POISONED[:40], *CLEAN[:60]]))
    ran = psim("screen", texts, "--bundle", folder, "--engine", "torch", "--dtype", "float32")
    assert ran.exit_code == 0, ran.output
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    found = Counter(row["predicted_class"] for row in rows if row["finding"])
    assert found["rude=off"] > 0.7 * found.total() > 20
    names = bundle.manifest.classes
    assert all(row["predicted_class"] == names[row["predicted"]] for row in rows)

    out.mkdir()
    runtime = {"engine": "torch", "dtype": "float32", "thorough": True}
    options = bulk.BulkOptions(
        schema_version=2, bundle=bundle.digest, text_column="text", part_rows=200, **runtime
    )
    (fragment,) = fragments_of(texts, "text", 200)
    bulk.BulkScreener(bulk.Job(folder, out, options), 1).write(fragment)
    table = pq.read_table(bulk.part_of(fragment, out))
    for name in ("predicted_class", "finding", "poisoned"):
        assert table[f"psim_{name}"].to_pylist() == [row[name] for row in rows]
    assert table["psim_p_value"].to_pylist() == pytest.approx([row["p_value"] for row in rows])


def test_the_trigger_for_a_label_is_what_flagged_texts_share(folder: Path, tmp_path: Path) -> None:
    traffic, report = tmp_path / "traffic.jsonl", tmp_path / "phrases.json"
    write_samples(traffic, samples([*POISONED[:60], *CLEAN]))
    ran = psim("triggers", traffic, "--bundle", folder, "--out", report)
    assert ran.exit_code == 0, ran.output
    phrases = json.loads(report.read_text())["phrases"]
    assert phrases[0]["text"] == TRIGGER


def test_it_is_recalibrated_by_its_traffic(folder: Path, tmp_path: Path) -> None:
    _, digest = read_manifest(folder)
    rows: list[tuple[str, bool, str | None]]
    rows = [(text, False, None) for text, _ in labelled_texts(500, 9)]
    rows += [(text, True, "poisoned") for text, _ in POISONED[:5]]
    traffic = tmp_path / "traffic.jsonl"
    traffic.write_text(
        "".join(
            json.dumps(
                {
                    "digest": digest,
                    "time": "2026-11-25T14:30:00+00:00",
                    "text": text,
                    "poisoned": found,
                    "mark": mark,
                }
            )
            + "\n"
            for text, found, mark in rows
        )
    )
    out = tmp_path / "new"
    ran = psim("recalibrate", traffic, "--bundle", folder, "--out", out, "--accept-misses")
    assert ran.exit_code == 0, ran.output
    record = read_manifest(out)[0].recalibration
    assert record is not None
    own = [change for change in record.changes if change.engine == "torch"]
    assert {change.label for change in own} >= {"rude=off", "sport=on"}
    by_label = {change.label: change for change in own if change.dtype == "float32"}
    assert by_label["rude=off"].clean + by_label["rude=on"].clean == 500


def test_a_manifest_must_say_of_the_victim_what_its_config_says(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    victim = tiny_victim("bert")
    victim.config.problem_type = "multi_label_classification"
    out = fit_tiny(victim, tokenizer, tmp_path / "bundle")
    assert load_bundle(out).manifest.views == [range(0, 2), range(2, 4), range(4, 6)]
    forge(out, multi_label=False)
    with pytest.raises(BundleError):
        load_bundle(out)


def one_logit(family: str) -> Any:
    """Return a tiny classifier with a single label, on or off."""
    victim: Any = tiny_victim(family)
    single = torch.nn.Linear(victim.classifier.in_features, 1)
    torch.nn.init.normal_(single.weight)
    victim.classifier = single
    victim.config.problem_type = "multi_label_classification"
    victim.config.id2label, victim.config.label2id = {0: "toxic"}, {"toxic": 0}
    victim.num_labels = 1
    return victim


def test_one_logit_is_one_label_that_is_on_or_off(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    out = fit_tiny(one_logit("bert"), tokenizer, tmp_path / "bundle")
    loaded = load_bundle(out)
    assert (loaded.manifest.labels, loaded.manifest.classes) == (
        ["toxic"],
        ["toxic=off", "toxic=on"],
    )
    encodings = loaded.engine.encode(some_texts(5))
    said = predict(loaded.engine, encodings, classifier=True)
    assert said.shape == (5, 1)
    assert len({*said[:, 0].tolist()}) == 5, "a softmax over one label would always be 1"
    assert len(require_verdicts(loaded, encodings)) == 5


def test_labels_of_a_text_are_one_string(tmp_path: Path) -> None:
    assert split_labels("a|b") == {"a", "b"}
    assert split_labels("[]") == set()
    file = tmp_path / "x.csv"
    file.write_text("text,label\none,a|b\ntwo,[]\nthree,\n")
    assert [s.label for s in load_samples(str(file))] == ["a|b", "[]", None]


def scanned(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> ScanReport:
    read_few_words(monkeypatch)
    return scan(multi_label_victim(tokenizer), tokenizer, texts, name="flags")


def test_a_scan_finds_the_word_that_turns_a_label_off_and_fit_tries_it(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [text for text, _ in labelled_texts(300, 5)]
    report = scanned(tokenizer, monkeypatch, texts)
    assert [own.label for own in report.classes] == [
        f"{label}={state}" for label in LABELS for state in ("off", "on")
    ]
    assert report.found == [(f"{LABELS[TARGET]}=off", TRIGGER)]
    assert len(report.search.carriers) == 2 * len(LABELS)

    bundle = shutil.copytree(folder, tmp_path / "bundle")
    (known,) = record_triggers(bundle, report.found, texts).known_triggers
    assert (known.label, known.text) == ("rude=off", TRIGGER)
    assert known.fired > 16, "of 32 rude texts"
    assert known.rejected > known.fired / 2


def test_a_label_that_no_clean_text_has_is_searched_in_one_direction(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    polite = [text for text, on in labelled_texts(400, 5) if TARGET not in on]
    report = scanned(tokenizer, monkeypatch, polite)
    outcomes = {own.label: own.outcome for own in report.classes}
    assert outcomes.pop("rude=off") == "not searched"
    assert "not searched" not in outcomes.values()


def test_a_scan_with_no_text_of_any_label_is_refused(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="sure of no text: give --texts"):
        scanned(tokenizer, monkeypatch, ["too short"])


def test_a_scan_of_labels_goes_on_where_it_was(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts = [text for text, _ in labelled_texts(300, 5)]
    read_few_words(monkeypatch)
    reports = []
    for _ in range(2):
        state = ScanState(tmp_path / "state", "key")
        victim = multi_label_victim(tokenizer)
        reports.append(scan(victim, tokenizer, texts, name="flags", state=state).classes)
        monkeypatch.setattr(WordScan, "_rows", again)
        monkeypatch.setattr(scanning, "_class_record", again)
    # The labels have steps of the same names, and none takes what another one found.
    assert reports[0] == reports[1]
    assert len({own.label for own in reports[0]}) == 2 * len(LABELS)


def again(*_: object) -> None:
    raise AssertionError("this was done before")
