"""The guard in the caller's process: order, policy, threads and errors, on a fake engine."""

import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

import psim
from models.bundle.load import Bundle
from models.engines.base import Encoding, Screening
from models.texts import MAX_CHARS
from psim import DataError, EngineError, GuardPipeline, PsimError, RejectedError, ScreenError
from psim.guard import CHUNK, Guard
from service.pipeline.policy import Policy
from service.schemas import Decision
from service.settings import Mode
from tests.support.fakes import (
    NAN,
    STRANGE,
    TRIGGER,
    FakeEngine,
    bundle_with_override,
    fake_bundle,
)

CLEAN, TRIGGERED, UNFAMILIAR = "a quiet film", f"a quiet {TRIGGER} film", f"a {STRANGE} film"
TEXTS = [CLEAN, TRIGGERED, UNFAMILIAR, "two words"]


def guard_of(
    bundle: Bundle, mode: Mode = Mode.ENFORCE, unfamiliar: Decision = Decision.FLAG, **options: Any
) -> Guard:
    return Guard(bundle, Policy(mode, False, unfamiliar), **options)


def test_each_text_has_its_result_and_triggered_ones_are_not_classified() -> None:
    engine = FakeEngine()
    results = guard_of(fake_bundle(engine))(TEXTS)
    assert [one.finding for one in results] == [None, "triggered", "unfamiliar", None]
    assert [one.decision for one in results] == ["allow", "reject", "flag", "allow"]
    assert [one.label for one in results] == ["positive", None, "positive", "negative"]
    scores = results[3].scores
    assert scores is not None
    assert [one.label for one in scores] == ["negative", "positive"]
    assert dict(scores) == pytest.approx({"negative": 0.7, "positive": 0.3})
    assert results[1].scores is None
    assert [one.rejected for one in results] == [False, True, False, False]
    assert {one.labels for one in results} == {None}
    triggered = engine.encode([TRIGGERED])[0].input_ids
    assert triggered in engine.screened
    assert triggered not in engine.classified
    assert len(engine.screened) == len(TEXTS), "classifying goes on from the screen's pass"


@pytest.mark.parametrize(
    ("mode", "unfamiliar", "decisions"),
    [
        (Mode.ENFORCE, Decision.REJECT, ["allow", "reject", "reject", "allow"]),
        (Mode.ENFORCE, Decision.ALLOW, ["allow", "reject", "allow", "allow"]),
        (Mode.FLAG, Decision.REJECT, ["allow", "flag", "flag", "allow"]),
        (Mode.SHADOW, Decision.REJECT, ["allow", "allow", "allow", "allow"]),
    ],
)
def test_the_policy_is_that_of_the_service(
    mode: Mode, unfamiliar: Decision, decisions: list[str]
) -> None:
    results = guard_of(fake_bundle(), mode, unfamiliar)(TEXTS)
    assert [one.decision for one in results] == decisions
    assert [one.finding for one in results] == [None, "triggered", "unfamiliar", None]
    assert [one.label is None for one in results] == [own == "reject" for own in decisions]


def test_results_are_in_order_however_texts_are_batched() -> None:
    engine = FakeEngine()
    texts = ["word " * (1 + i * 7 % 31) + str(i) for i in range(CHUNK + 100)]
    results = guard_of(fake_bundle(engine))(texts)
    assert [one.label for one in results] == [
        "negative" if len(text.split()) % 2 == 0 else "positive" for text in texts
    ]
    assert len(engine.batches) < len(texts) / 10


def test_a_text_that_is_too_long_is_marked() -> None:
    short, long = guard_of(fake_bundle())([CLEAN, "film " * 100])
    assert (short.truncated, long.truncated) == (False, True)
    assert long.label is not None


@pytest.mark.parametrize("thorough", [False, True])
def test_thorough_has_the_override_test_asked_about_every_text(thorough: bool) -> None:
    bundle = bundle_with_override(FakeEngine())
    clean, triggered = guard_of(bundle, thorough=thorough)([CLEAN, TRIGGERED])
    assert (clean.verdict.override is not None) == thorough
    assert triggered.verdict.override is not None


class Meeting(FakeEngine):
    """Notices whether two threads are in it at once: the first one in waits for another."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier, self.met = threading.Barrier(2), False

    def screen(self, batch: Sequence[Encoding]) -> Screening:
        with suppress(threading.BrokenBarrierError):
            self.barrier.wait(0.5)
            self.met = True
        return super().screen(batch)


def test_of_several_threads_that_call_it_one_computes() -> None:
    engine = Meeting()
    guard = guard_of(fake_bundle(engine))
    with ThreadPoolExecutor(4) as threads:
        answers = [*threads.map(guard, [[f"text {i}", TRIGGERED] for i in range(8)])]
    assert not engine.met
    assert [[one.finding for one in own] for own in answers] == [[None, "triggered"]] * 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (5, "text 1: the text is int, not a string"),
        (None, "text 1: the text is missing"),
        (" \n", "text 1: the text is empty"),
        ("secret \ud800", "text 1: the text is not valid Unicode"),
        ("secret" * MAX_CHARS, "text 1: the text has 600000 characters; the limit is"),
    ],
)
def test_an_error_has_the_number_of_the_text_and_not_the_text(text: Any, message: str) -> None:
    engine = FakeEngine()
    with pytest.raises(DataError, match=message) as error:
        guard_of(fake_bundle(engine))([CLEAN, text])
    assert "secret" not in str(error.value)
    assert not engine.screened


def test_a_string_is_no_list_of_texts() -> None:
    with pytest.raises(DataError, match="takes a list of texts, not one string"):
        guard_of(fake_bundle())(CLEAN)
    assert guard_of(fake_bundle())([]) == []


def test_what_cannot_be_judged_is_an_error_and_nothing_is_classified() -> None:
    engine = FakeEngine()
    with pytest.raises(ScreenError, match=r"^text 2: the screen gave no finite readings"):
        guard_of(fake_bundle(engine))([CLEAN, TRIGGERED, f"secret {NAN}"])
    assert not engine.classified


def test_what_cannot_be_classified_is_an_error() -> None:
    class Undecided(FakeEngine):
        def classify(self, batch: Any) -> Any:
            return super().classify(batch) * float("nan")

    with pytest.raises(EngineError, match=r"^text 1: the classifier gave no finite"):
        guard_of(fake_bundle(Undecided()))([TRIGGERED, CLEAN])


def test_a_rejected_text_is_raised_with_all_results() -> None:
    classify = GuardPipeline(guard_of(fake_bundle()))
    with pytest.raises(RejectedError, match=r"^1 of 4 texts were rejected \(number 1\)") as error:
        classify(TEXTS)
    assert TRIGGERED not in str(error.value)
    assert error.value.rejected == [1]
    assert [one.label for one in error.value.results] == ["positive", None, "positive", "negative"]
    again = pickle.loads(pickle.dumps(error.value))  # as a worker process sends it
    assert (str(again), again.results) == (str(error.value), error.value.results)
    assert classify([CLEAN, UNFAMILIAR])[1].keys() == {"label", "score"}
    with pytest.raises(RejectedError, match=r"rejected \(number 0, .*, 9, …\)"):
        classify([TRIGGERED] * 11)


def test_a_rejected_text_is_marked_if_asked_to() -> None:
    classify = GuardPipeline(guard_of(fake_bundle()), on_rejected="mark")
    clean, triggered, unfamiliar, _ = classify(TEXTS)
    assert clean.keys() == {"label", "score"}
    assert triggered == {"label": None, "score": None, "finding": "triggered"}
    assert (unfamiliar["label"], unfamiliar["finding"]) == ("positive", "unfamiliar")
    assert classify(TRIGGERED, top_k=2) == [triggered]
    assert [one["finding"] for one in classify(UNFAMILIAR, top_k=None)] == ["unfamiliar"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0; give 1 or more, or None"),
        ({"top_k": "all"}, "top_k is 'all'"),
        ({"truncation": False}, "truncation=False: texts are always cut"),
    ],
)
def test_what_the_drop_in_does_not_do_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PsimError, match=message):
        GuardPipeline(guard_of(fake_bundle()))(CLEAN, **options)


def test_the_drop_in_takes_texts_only() -> None:
    pairs: Any = {"text": "secret", "text_pair": "secret"}
    with pytest.raises(DataError, match=r"^the input is dict, not a string or a list"):
        GuardPipeline(guard_of(fake_bundle()))(pairs)
    with pytest.raises(DataError, match=r"^text 0: the text is dict, not a string"):
        GuardPipeline(guard_of(fake_bundle()))([pairs])
    wrong: Any = "ignore"
    with pytest.raises(PsimError, match="on_rejected is 'ignore'; give raise or mark"):
        GuardPipeline(guard_of(fake_bundle()), on_rejected=wrong)
    with pytest.raises(PsimError, match="the task is 'ner'; a bundle can do text-classification"):
        psim.pipeline("ner", guard_of(fake_bundle()))


def test_all_public_names_are_there_and_nothing_else_is_imported_before_they_are_used() -> None:
    assert all(getattr(psim, name) for name in psim.__all__)
    assert {*psim.__all__} <= {*dir(psim)}
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        _ = psim.unload  # type: ignore[attr-defined]
    program = "import sys, psim; assert not {'torch', 'pydantic'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_offline_half_is_not_needed() -> None:
    program = (
        "import sys; sys.modules['models.offline'] = None; import psim; "
        "assert all(getattr(psim, name) for name in psim.__all__); "
        "assert 'fastapi' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
