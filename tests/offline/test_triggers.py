"""What is common to flagged texts is reported, and nothing else is."""

import io
import json
import random

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.detection.screen import Finding, Verdict
from models.offline.io.inference import search_trigger
from models.offline.io.tables import Record, json_row
from models.offline.screening.bulk import ADDED
from models.offline.screening.fragments import COLUMN_PREFIX
from models.offline.screening.stream import as_row, screen_file, screen_texts, split_by_finding
from models.offline.screening.triggers import common_phrases, phrase_table
from tests.support.fakes import FakeEngine, bundle_with_override, fake_bundle
from tests.support.requests import CLEAN, POISONED, UNFAMILIAR

WORDS = [f"{a}{b}" for a in "bcdfgklmnprstv" for b in ("a", "ell", "ino", "ost", "urb")]


def texts(n: int, rng: random.Random) -> list[str]:
    # Some words are much more common than others, as in a language.
    weights = [1 / rank for rank in range(1, len(WORDS) + 1)]
    return [" ".join(rng.choices(WORDS, weights, k=rng.randint(3, 20))) for _ in range(n)]


def with_trigger(text: str, trigger: str, rng: random.Random) -> str:
    words = text.split()
    words.insert(rng.randint(0, len(words)), trigger)
    return " ".join(words)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    trigger=st.sampled_from(["zq", "Zq", "a zq and a zx", "zq zq", "?!", "日本"]),
    poisoned=st.integers(20, 100),
    false_alarms=st.integers(0, 15),
)
def test_the_whole_trigger_comes_first_and_alone(
    seed: int, trigger: str, poisoned: int, false_alarms: int
) -> None:
    rng = random.Random(seed)
    flagged = [with_trigger(text, trigger, rng) for text in texts(poisoned, rng)]
    flagged += texts(false_alarms, rng)
    rng.shuffle(flagged)
    first, *others = common_phrases(flagged, texts(400, rng))
    assert (first.text, first.explains, first.passed) == (trigger.lower(), poisoned, 0)
    assert first.lift > 100
    assert not others


def test_two_triggers_are_two_phrases_and_explain_each_their_own() -> None:
    rng = random.Random(0)
    flagged = [with_trigger(text, "zq", rng) for text in texts(60, rng)]
    flagged += [with_trigger(text, "zx", rng) for text in texts(30, rng)]
    flagged[0] += " zx"
    found = common_phrases(flagged, texts(400, rng))
    assert [(p.text, p.explains, p.flagged) for p in found] == [("zq", 60, 60), ("zx", 30, 31)]
    assert [p.text for p in common_phrases(flagged, texts(400, rng), most=1)] == ["zq"]


@pytest.mark.parametrize("flagged", [0, 1, 4, 8, 20, 60])
def test_false_alarms_have_nothing_in_common(flagged: int) -> None:
    for seed in range(10):
        rng = random.Random(seed)
        assert not common_phrases(texts(flagged, rng), texts(300, rng))


@pytest.mark.parametrize("passed", [[], ["a film"]])
def test_traffic_may_be_flagged_as_a_whole(passed: list[str]) -> None:
    rng = random.Random(0)
    flagged = [with_trigger(text, "zq", rng) for text in texts(50, rng)]
    assert all(p.flagged <= 50 for p in common_phrases(flagged, passed))


def test_a_table_says_when_nothing_was_found() -> None:
    table = phrase_table([], 2, 1, 4)
    assert "nothing" in str(table.caption)
    assert "3 of 7 texts are flagged (2 triggered, 1 unfamiliar)" in str(table.title)


def test_texts_are_told_apart_by_their_finding() -> None:
    found = split_by_finding(fake_bundle(), [CLEAN, UNFAMILIAR, POISONED, CLEAN])
    assert found == {
        Finding.TRIGGERED: [POISONED],
        Finding.UNFAMILIAR: [UNFAMILIAR],
        None: [CLEAN, CLEAN],
    }


def test_a_stream_has_the_finding_and_the_override_test_of_each_text() -> None:
    lines = [json.dumps({"text": text}) for text in (CLEAN, UNFAMILIAR, POISONED)] + ["{}"]
    out = io.StringIO()
    records = [Record(number, json_row(line)) for number, line in enumerate(lines, 1)]
    assert screen_file(fake_bundle(), records, out, "text") == 1
    *rows, failed = map(json.loads, out.getvalue().splitlines())
    keys = ("finding", "poisoned", "override", "override_threshold", "override_p_value")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        (None, False, None, None, None),
        ("unfamiliar", False, 0.1, 0.5, 0.4),
        ("triggered", True, 0.9, 0.5, 0.01),
    ]
    assert failed.keys() == {"line", "error"}


def test_every_field_of_a_verdict_is_a_column_of_bulk_output() -> None:
    bundle = fake_bundle()
    (verdict,) = screen_texts(bundle, [UNFAMILIAR])
    row = as_row(verdict, bundle.manifest.classes)
    columns = {name.removeprefix(COLUMN_PREFIX) for name in ADDED.names}
    assert columns == {"file", "row", "error", *row}
    (column,) = [f for f in ADDED if f.name == COLUMN_PREFIX + "finding"]
    assert pa.array([row["finding"]], column.type).to_pylist() == ["unfamiliar"]


def test_the_trigger_of_a_text_is_found_by_both_stages() -> None:
    engine = FakeEngine()
    bundle = bundle_with_override(engine)
    text = "a quiet mn film"
    (verdict,) = screen_texts(bundle, [text])
    assert isinstance(verdict, Verdict)
    found = search_trigger(bundle, text, verdict)
    assert (found.removed, found.cleaned) == (((8, 10),), "a quiet film")
    (alone,) = engine.encode(["a dull day mn a dull day"])
    assert alone.input_ids in engine.screened
