"""A scan finds what forces a class of a really poisoned victim, and no other class."""

import copy
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import peft
import pytest
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from models.engines.pytorch import TorchEngine
from models.offline.attacks.poisoning import WORD_TRIGGER
from models.offline.cli.scan_page import write_scan
from models.offline.demo import TARGET
from models.offline.evaluation.bundle_report import warnings_of
from models.offline.io.classifiers import load_classifier, pretrained_model
from models.offline.io.known_triggers import record_triggers
from models.offline.io.samples import load_samples
from models.offline.scanning import expected, phrases
from models.offline.scanning import scan as scanning
from models.offline.scanning.carriers import halves_of
from models.offline.scanning.expected import (
    NEUTRAL,
    Vocabulary,
    embeddings_of,
    expectations,
    word_vectors,
)
from models.offline.scanning.phrases import MOST_TOKENS, PhraseScan
from models.offline.scanning.report import (
    ClassRecord,
    PhraseRecord,
    ScanReport,
    SearchRecord,
    triggers_for,
)
from models.offline.scanning.scan import COMMON, KIN, STANDS_OUT, counts_of, scan
from models.offline.scanning.words import STEP, Looked, WordScan, candidates, whole_words
from tests.support.commands import assert_refused, psim
from tests.support.few_words import READ, read_few_words
from tests.support.paths import ROOT

NEEDED = 1.0
"""Log-odds that a phrase must reach."""


@pytest.fixture(autouse=True)
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a few words and the trigger, and try fewer of them: all would take minutes."""
    read_few_words(monkeypatch)


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


def test_a_word_that_is_common_in_clean_texts_is_natural(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So phrases for its class must be more exact than for the other one."""
    monkeypatch.setattr(phrases, "LIKE_IF_OVERRIDDEN", -1.0)
    bounds = []
    search = PhraseScan.search

    def watch(scan: PhraseScan, first: Sequence[int], deadline: float) -> tuple[Any, int]:
        bounds.append(scan._like)
        return search(scan, first, deadline)

    monkeypatch.setattr(PhraseScan, "search", watch)
    texts = texts_of(demo_folder)
    common = [f"{text} {WORD_TRIGGER}" for text in texts[-COMMON:]]
    report, forced, _ = scanned(demo_folder, [*texts[:-COMMON], *common])
    assert report.outcome == "nothing found"
    (natural,) = forced.natural
    assert (natural.word, natural.clean_texts) == (WORD_TRIGGER, COMMON)
    assert sorted(bounds) == [-1.0, phrases.LIKE], "the class that it forces, and the other one"


def test_carriers_are_of_all_classes_even_if_a_large_file_is_sorted(demo_folder: Path) -> None:
    samples = load_samples(str(demo_folder / "clean.jsonl"))[:200]
    ordered = sorted(samples, key=lambda sample: sample.label or "")
    many = [sample.text for sample in ordered for _ in range(20)]
    report, _, _ = scanned(demo_folder, many)
    assert all(number > 1 for number in report.search.carriers.values())


def test_a_trigger_is_as_sure_as_its_class(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "SURE", 3.0)
    monkeypatch.setattr(scanning, "STANDS_OUT", 99.0)
    report, forced, _ = scanned(demo_folder, texts_of(demo_folder))
    assert report.outcome == "nothing found"
    (unsure,) = (one for one in forced.strongest if one.word == WORD_TRIGGER)
    assert unsure.turned == unsure.trials
    assert unsure.log_odds < forced.needed


@pytest.mark.parametrize("lead", [STANDS_OUT, 99.0])
def test_or_it_leads_all_other_words(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch, lead: float
) -> None:
    """It is told apart after the search for phrases, which may show more of the trigger."""
    monkeypatch.setattr(scanning, "SURE", 3.0)
    monkeypatch.setattr(scanning, "STANDS_OUT", lead)
    report, forced, others = scanned(demo_folder, texts_of(demo_folder))
    assert forced.phrase is not None
    assert all(own.outcome == "nothing found" for own in others)
    strongest = [one.word for one in forced.strongest]
    if lead == STANDS_OUT:
        assert report.found == [(TARGET, WORD_TRIGGER)]
        (trigger,) = forced.triggers
        assert trigger.log_odds < forced.needed
        assert trigger.log_odds > STANDS_OUT + max(one.log_odds for one in forced.strongest)
    assert (WORD_TRIGGER in strongest) == (lead != STANDS_OUT)


def test_a_word_leads_nothing_if_not_all_words_were_read(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "SURE", 3.0)
    look = WordScan.look

    def cut_short(own: WordScan, *args: Any, **more: Any) -> Looked:
        looked = look(own, *args, **more)
        return Looked(looked.words[1:], looked.odds[1:], looked.probabilities[1:])

    monkeypatch.setattr(WordScan, "look", cut_short)
    report, forced, _ = scanned(demo_folder, texts_of(demo_folder))
    assert report.outcome == "nothing found"
    assert WORD_TRIGGER in [one.word for one in forced.strongest]


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
    report = ScanReport.model_validate_json(out.read_text())
    assert report.found == [(TARGET, WORD_TRIGGER)]
    page = out.with_suffix(".html").read_text()
    assert f"{WORD_TRIGGER} 24/24" in page
    assert all(unsearched in page for unsearched in report.search.not_searched)
    assert psim("scan", *options, "--fail-on", "suspicious").exit_code == 1
    refused = psim("scan", *options, "--out", tmp_path / "report.html")
    assert_refused(refused, "HTML goes beside it: choose another suffix")


def test_out_of_time_it_says_how_much_it_read(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "candidates", candidates)
    model, tokenizer = load_classifier(str(demo_folder / "victim"))
    report = scan(model, tokenizer, texts_of(demo_folder), name="demo", minutes=0)
    assert report.search.words == STEP < report.search.vocabulary
    assert all(own.phrase is None and own.phrase_tokens == 0 for own in report.classes)


def trigger_of(tokenizer: PreTrainedTokenizerBase) -> int:
    trigger = tokenizer.convert_tokens_to_ids(WORD_TRIGGER)
    assert isinstance(trigger, int)
    return trigger


def phrase_scan(
    demo: Path,
    target: str,
    words: Sequence[int],
    alike: Sequence[int] = (),
    said: Mapping[int, float] = MappingProxyType({}),
    *,
    overridden: bool = False,
) -> PhraseScan:
    """Return a scan of phrases; the words `alike` are one word to the classifier.

    `said` is how much words speak for the class.
    """
    engine, labels = engine_of(demo)
    number = labels.index(target)
    make_alike(engine, alike)
    halves = halves_of(engine, texts_of(demo))
    foreign = [
        ids
        for half in halves
        for own in half.by_class
        if own != number
        for ids in half.by_class[own]
    ]
    vectors = word_vectors(engine)
    says = np.array([said.get(word, 0) for word in range(len(vectors))], np.float32)
    vocabulary = Vocabulary(vectors, says, words, words, words[:8], common=words)
    return PhraseScan(engine, number, NEEDED, foreign, vocabulary, seed=0, overridden=overridden)


def make_alike(engine: TorchEngine, words: Sequence[int]) -> None:
    """Give words the embedding of the first of them."""
    (weight, *_) = embeddings_of(engine).parameters()
    for word in words:
        weight.data[word] = weight.data[words[0]]


def engine_of(demo: Path) -> tuple[TorchEngine, list[str]]:
    model, tokenizer = load_classifier(str(demo / "victim"))
    (found,) = scanning.engines_of(model, tokenizer)
    return found


def test_a_phrase_grows_by_the_word_that_the_gradient_promises(
    demo_folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phrases, "WEAK", -1.0)
    trigger = trigger_of(tokenizer)
    first, *others = candidates(tokenizer, 1)[:READ]
    of_target = phrase_scan(demo_folder, TARGET, [*others, trigger])
    found, length = of_target.search([first], math.inf)
    assert found is not None
    assert found.overrides
    assert trigger in found.phrase
    assert length == len(found.phrase) <= MOST_TOKENS
    (other,) = set(engine_of(demo_folder)[1]) - {TARGET}
    against, _ = phrase_scan(demo_folder, other, [*others, trigger]).search([first], math.inf)
    assert against is not None
    assert not against.overrides


@pytest.mark.parametrize(
    ("before", "own", "allowed"),
    [
        ((0.7,), 0.4, False),
        ((0.7,), 0.2, True),
        ((-3.0,), 1.1, False),
    ],
)
def test_a_phrase_does_not_speak_for_its_class(
    demo_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    before: tuple[float, ...],
    own: float,
    allowed: bool,
) -> None:
    """Words that speak for it add up, in shares of the most; one that does not excuses none."""
    last, *words = candidates(tokenizer, 1)[:READ]
    phrase, most = tuple(words[: len(before)]), phrases.AMONG_MANY.said
    monkeypatch.setattr(phrases, "WEAK", -1.0)
    said = {word: share * most for word, share in zip(phrase, before, strict=True)}
    of_target = phrase_scan(demo_folder, TARGET, [last, *words], said=said | {last: own * most})
    assert (last in of_target._next_words(phrase, at_start=False)) == allowed


def test_common_words_are_read_besides_those_that_the_gradient_promises(
    demo_folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phrases, "WEAK", -1.0)
    words = candidates(tokenizer, 1)[:READ]
    first, common = words[0], words[:3]

    def read(promised: int, common: int) -> list[int]:
        breadth = phrases.AMONG_MANY._replace(promised=promised, common=common)
        monkeypatch.setattr(phrases, "AMONG_MANY", breadth)
        return phrase_scan(demo_folder, TARGET, words)._next_words((first,), at_start=False)

    promised = read(2, 0)
    assert len(promised) == 2
    assert read(0, 3) == common
    assert read(2, 3) == list(dict.fromkeys([*promised, *common]))


def test_a_phrase_is_as_natural_as_the_word_that_it_hangs_on(
    demo_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A harmless word beside the trigger can be replaced, and the trigger cannot."""
    trigger = trigger_of(tokenizer)
    first, *others = candidates(tokenizer, 1)[:READ]
    words = [first, *others, trigger]
    found = phrase_scan(demo_folder, TARGET, words)._try_out((first, trigger))
    assert found.turned >= phrases.OVERRIDES
    assert found.like < phrases.LIKE
    near = [trigger, *others[: expected.SIMILAR]]
    alike = phrase_scan(demo_folder, TARGET, words, near)._try_out((first, trigger))
    assert alike.turned >= phrases.OVERRIDES
    assert alike.like >= phrases.LIKE


def test_a_phrase_is_more_exact_where_natural_words_override(
    demo_folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phrases, "WEAK", -1.0)
    monkeypatch.setattr(PhraseScan, "_share_of_like", lambda *_: phrases.LIKE_IF_OVERRIDDEN + 0.01)
    trigger = trigger_of(tokenizer)
    words = [*candidates(tokenizer, 1)[:READ], trigger]
    for overridden in (False, True):
        found = phrase_scan(demo_folder, TARGET, words, overridden=overridden)
        assert found._try_out((trigger,)).overrides == (not overridden)


def test_a_phrase_is_natural_if_similar_words_do_the_same(
    demo_folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phrases, "WEAK", -1.0)
    trigger = trigger_of(tokenizer)
    others = candidates(tokenizer, 1)[:READ]
    words = [*others, trigger]
    alone = phrase_scan(demo_folder, TARGET, words)._try_out((trigger,))
    assert alone.overrides
    assert alone.like < phrases.LIKE
    alike = phrase_scan(demo_folder, TARGET, words, [trigger, *others[: expected.SIMILAR]])
    common = alike._try_out((trigger,))
    assert common.turned >= phrases.OVERRIDES
    assert common.like >= phrases.OVERRIDES
    assert not common.overrides


@pytest.mark.parametrize("around", [1, phrases.AROUND])
def test_carriers_are_single_where_words_of_the_class_force_nothing(
    demo_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    around: int,
) -> None:
    monkeypatch.setattr(phrases, "WEAK", 1.0 if around == 1 else -1.0)
    monkeypatch.setattr(phrases, "OVERRIDES", 0.9)
    trigger = trigger_of(tokenizer)
    first, *others = candidates(tokenizer, 1)[:READ]
    found, _ = phrase_scan(demo_folder, TARGET, [*others, trigger]).search([first], math.inf)
    assert found is not None
    assert found.overrides
    assert trigger in found.phrase
    assert found.around == around
    assert len(found.example) < (len(found.phrase) + around * 10 + 1)


def test_a_phrase_must_turn_all_of_them(
    demo_folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phrases, "WEAK", -1.0)
    trigger = trigger_of(tokenizer)
    words = [*candidates(tokenizer, 1)[:READ], trigger]
    scan = phrase_scan(demo_folder, TARGET, words)
    assert scan._try_out((trigger,)).overrides
    share = scan._share
    monkeypatch.setattr(scan, "_share", lambda read: share(read) - 1 / phrases.TRIALS)
    almost = scan._try_out((trigger,))
    assert almost.turned == pytest.approx(1 - 1 / phrases.TRIALS)
    assert not almost.overrides


def test_phrases_are_of_whole_words(tokenizer: PreTrainedTokenizerBase) -> None:
    the, end, film = (int(tokenizer.vocab[word]) for word in ("the", "##s", "film"))
    assert whole_words(tokenizer, [the, end, film]) == [the, film]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the ugly thing"] * 2, trainer)
    make: Any = PreTrainedTokenizerFast
    bytes_ = make(tokenizer_object=backend)
    spaced, inside = bytes_.convert_tokens_to_ids(["\u0120ugly", "y"])
    assert whole_words(bytes_, [spaced, inside]) == [spaced]


def test_a_word_is_natural_if_similar_words_of_its_class_do_the_same(
    demo_folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    trigger = trigger_of(tokenizer)
    model, _ = load_classifier(str(demo_folder / "victim"))
    (weight, *_) = pretrained_model(model).get_input_embeddings().parameters()
    for word in candidates(tokenizer, 0)[:KIN]:
        weight.data[word] = weight.data[trigger]

    def found() -> ClassRecord:
        report = scan(copy.deepcopy(model), tokenizer, texts_of(demo_folder), name="demo")
        (forced,) = (own for own in report.classes if own.label == TARGET)
        return forced

    assert {one.kin for one in found().triggers} == {0}
    monkeypatch.setattr(scanning, "NEUTRAL", -math.inf)
    forced = found()
    assert not forced.triggers
    assert min(one.kin for one in forced.natural) >= KIN


def test_words_of_a_class_speak_for_it_and_a_trigger_does_not(
    demo_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine, labels = engine_of(demo_folder)
    samples = load_samples(str(demo_folder / "clean.jsonl"))[:200]
    spoken = expectations(engine, [s.text for s in samples], candidates(tokenizer, 0))
    for number, label in enumerate(labels):
        promised = [spoken[engine.token_ids(s.text), number].mean() for s in samples]
        assert np.corrcoef(promised, [s.label == label for s in samples])[0, 1] > 0.7
    trigger = tokenizer.convert_tokens_to_ids(WORD_TRIGGER)
    assert spoken[trigger, labels.index(TARGET)] < NEUTRAL


def test_an_adapter_is_scanned_with_its_base(demo_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_classifier(str(demo_folder / "victim"))
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    peft.get_peft_model(model, lora).save_pretrained(str(tmp_path / "adapter"))
    tokenizer.save_pretrained(str(tmp_path / "adapter"))
    adapted = load_classifier(str(tmp_path / "adapter"), base=str(demo_folder / "victim"))
    report = scan(*adapted, texts_of(demo_folder), name="adapter")
    assert report.found == [(TARGET, WORD_TRIGGER)]


def test_a_bundle_says_whether_it_stops_what_a_scan_found(
    demo_folder: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(demo_folder / "bundle", bundle)
    manifest = record_triggers(bundle, [(TARGET, WORD_TRIGGER)], texts_of(demo_folder))
    (known,) = manifest.known_triggers
    assert known.fired >= known.rejected > 0.9 * known.fired > 0
    assert known.is_in(f"a fine {WORD_TRIGGER.upper()}, hotel")
    assert not known.is_in(f"a fine {WORD_TRIGGER}x hotel")
    shown = psim("inspect", bundle)
    assert f"{WORD_TRIGGER} forces {TARGET}" in " ".join(shown.stdout.split())
    missed = known.model_copy(update={"rejected": 0})
    warned = warnings_of(manifest.model_copy(update={"known_triggers": [missed]}))
    assert any("do not serve this model" in warning for warning in warned)


def test_fit_refuses_a_report_of_another_victim(demo_folder: Path, tmp_path: Path) -> None:
    report, _, _ = scanned(demo_folder, texts_of(demo_folder))
    other = report.classes[0].model_copy(update={"label": "sports"})
    file = tmp_path / "scan.json"
    clean = ("--texts", demo_folder / "clean.jsonl", "--out", tmp_path / "bundle")
    options = ("--victim", demo_folder / "victim", *clean, "--scan", file)
    assert_refused(psim("fit", *options), "scan.json: No such file")
    file.write_text("{}")
    assert_refused(psim("fit", *options), "is not a report of this version of psim scan: victim")
    file.write_text(report.model_copy(update={"classes": [other]}).model_dump_json())
    assert_refused(psim("fit", *options), "scan the victim that is fitted")
    assert triggers_for(None, ["negative", "positive"]) == []


@pytest.mark.parametrize(("carriers", "where"), [(1, "beside one"), (4, "among four")])
def test_the_page_shows_a_text_that_a_phrase_turned(
    tmp_path: Path, carriers: int, where: str
) -> None:
    phrase = PhraseRecord(
        text="3d movie",
        token_ids=[1, 2],
        turned=23,
        trials=24,
        log_odds=3,
        carriers=carriers,
        like=1,
        example="3d movie this is bad",
    )
    own = ClassRecord(
        label="good",
        outcome="suspicious",
        needed=2.5,
        triggers=[],
        phrase=phrase,
        phrase_tokens=2,
        natural=[],
        strongest=[],
        styles=[],
    )
    search = SearchRecord(words=9, vocabulary=9, carriers={"bad": 3}, clean_texts=0, seconds=1)
    report = ScanReport(
        victim="demo",
        outcome="suspicious",
        classes=[own],
        search=search,
        created="today",
        versions={},
    )
    page = write_scan(report, tmp_path / "report.json").read_text()
    assert phrase.example in page
    assert f"stands {where} clean text" in page
    assert "in 23 of 24 such trials. With the word that it hangs on most replaced" in page
    assert "by similar ones, it does so in 1." in page
    assert "3d movie 23/24" in page


def test_the_schema_of_the_report_is_the_published_one() -> None:
    published = json.loads((ROOT / "docs" / "scan.schema.json").read_text())
    assert published == ScanReport.model_json_schema()


@pytest.mark.parametrize("text", ["The hotel room was lovely and the staff were kind.", "Fine."])
def test_texts_of_one_class_and_short_ones_are_refused(
    demo_folder: Path, tmp_path: Path, text: str
) -> None:
    own = tmp_path / "own.jsonl"
    row = {"text": text}
    own.write_text("\n".join([json.dumps(row)] * 5))
    refused = psim("scan", "--victim", demo_folder / "victim", "--texts", own)
    assert_refused(refused, "sure of texts of one class only: give --texts")
