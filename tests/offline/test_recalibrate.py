"""`psim recalibrate`: a new bundle from audited traffic, trusted no further than it must be."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file as load_arrays
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner, Result

from models.bundle.digests import file_digest
from models.bundle.layout import MANIFEST, READINGS
from models.bundle.load import load_bundle
from models.bundle.verify import read_manifest
from models.detection.calibrate import calibrate
from models.detection.screen import FloatArray, Layout, Screen, Verdict
from models.offline.cli.bundle import MAX_RISE
from models.offline.demo import CLEAN_TEXT, TRIGGERED_TEXT
from models.offline.fitting.recalibrate import limits_of, risen
from models.offline.io.inference import predict
from models.offline.io.samples import load_samples
from psim.__main__ import app
from tests.support.bundles import fit_tiny, some_texts
from tests.support.deploy import RUNBOOK
from tests.support.families import tiny_victim
from tests.support.servers import served

TEXTS = [f"{text} here" for text in some_texts(600, seed=7)]
BUDGET = 0.05


def psim(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    return fit_tiny(tiny_victim("bert"), tokenizer, tmp_path_factory.mktemp("parent") / "bundle")


@pytest.fixture(scope="module")
def verdicts(parent: Path) -> dict[str, Verdict]:
    """What the parent says of each text."""
    bundle = load_bundle(parent)
    readings = predict(bundle.engine, bundle.engine.encode(TEXTS))
    return {t: bundle.screen.judge(row) for t, row in zip(TEXTS, readings, strict=True)}


@pytest.fixture(scope="module")
def by_score(verdicts: dict[str, Verdict]) -> list[str]:
    """The texts, the most suspicious first."""
    return sorted(verdicts, key=lambda text: -verdicts[text].margin)


def row(text: str | None, poisoned: bool | None = False, **changes: object) -> dict[str, object]:
    """Return a line of the export, with some of the fields that are not read."""
    known = {"time": "2026-11-25T14:30:00+00:00", "decision": "allow", "score": 0.5, "id": "x"}
    return known | {"text": text, "poisoned": poisoned} | changes


def export(folder: Path, judge: Path, rows: Iterable[dict[str, object]]) -> Path:
    """Write an export of what a bundle judged."""
    _, digest = read_manifest(judge)
    file = folder / "traffic.jsonl"
    file.write_text("".join(json.dumps({"digest": digest} | one) + "\n" for one in rows))
    return file


def assert_refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert not isinstance(result.exception, Exception), result.exception


def test_the_new_bundle_has_the_thresholds_of_the_traffic_and_all_else_of_its_parent(
    parent: Path, verdicts: dict[str, Verdict], by_score: list[str], tmp_path: Path
) -> None:
    digests = {f: file_digest(f) for f in parent.rglob("*") if f.is_file()}
    alarms, poisoned = by_score[:5], by_score[5:8]
    unmarked, passed = by_score[8:12], [t for t in TEXTS if not verdicts[t].poisoned]
    assert all(verdicts[text].poisoned for text in [*alarms, *poisoned, *unmarked])
    rows = [
        *(row(text) for text in passed * 2),
        *(row(text, True, mark="false_alarm") for text in alarms),
        *(row(text, True, mark="poisoned") for text in poisoned),
        *(row(text, True, mark=None) for text in unmarked),
        # One look at a text tells of all its rows, and poisoned is poisoned.
        row(alarms[0], True),
        row(poisoned[0], True, mark="false_alarm"),
        # Nobody has looked at these two.
        row("what failed open is not known to be clean", None),
        row("of another model", digest="0" * 64),
        row(None),
        row(" "),
        # Neither poisoned nor known to be clean.
        row("unlike all that the bundle knows", finding="unfamiliar"),
    ]
    out = tmp_path / "new"
    source = export(tmp_path, parent, rows)
    done = psim(
        "recalibrate", source, "--bundle", parent, "--out", out, "--max-rise", 99, "--accept-misses"
    )
    assert done.exit_code == 0, done.output
    assert digests == {f: file_digest(f) for f in parent.rglob("*") if f.is_file()}

    old, new = load_bundle(parent), load_bundle(out)
    assert new.digest != old.digest
    same = {f for f in old.manifest.files if f != READINGS}
    assert all(new.manifest.files[f] == old.manifest.files[f] for f in same)
    record = new.manifest.recalibration
    assert record is not None
    assert (record.parent, record.source) == (old.digest, "traffic.jsonl")
    assert record.source_digest == file_digest(source)
    assert (record.passed, record.false_alarms) == (len(passed), 5)
    assert (record.poisoned, record.unmarked) == (3, 4 + 2)
    assert record.others == 1

    clean = [*passed, *alarms]
    for own in new.manifest.calibrations:
        loaded = load_bundle(out, own.dtype, own.engine)
        stored = load_arrays(out / READINGS)[str(own.runtime)]
        # Rounded as batches go.
        expected = predict(loaded.engine, loaded.engine.encode(clean))
        order = np.lexsort(expected.reshape(len(expected), -1).T)
        theirs = np.lexsort(stored.reshape(len(stored), -1).T)
        np.testing.assert_allclose(stored[theirs], expected[order], atol=0.02)
        changes = {c.label: c for c in record.changes if c.runtime == own.runtime}
        assert [*changes] == new.manifest.labels
        assert sum(c.clean for c in changes.values()) == len(clean)
        assert sum(c.poisoned for c in changes.values()) == 3
        before = load_bundle(parent, own.dtype, own.engine).screen
        for number, label in enumerate(changes):
            assert changes[label].before == before.threshold_of(number)
            assert changes[label].after == loaded.screen.threshold_of(number)
            limits = limits_of(before, number), limits_of(loaded.screen, number)
            assert changes[label].risen == pytest.approx(risen(*limits))
    usual = [c for c in record.changes if c.runtime == old.manifest.default.runtime]
    assert sum(c.clean_flagged_before for c in usual) == 5
    assert sum(c.clean_flagged_after for c in usual) <= BUDGET * len(clean)
    assert sum(c.poisoned_flagged_before for c in usual) == 3
    inspected = psim("inspect", out)
    assert "recalibrated" in inspected.stdout
    assert record.parent[:12] in inspected.stdout


def test_false_alarms_are_thinned_to_the_rate_at_which_the_audit_sampled_what_passed(
    parent: Path, by_score: list[str], tmp_path: Path
) -> None:
    alarms, passed = by_score[:100], by_score[110:400]
    rows = [
        *(row(text, sample_rate=0.2) for text in passed),
        *(row(text, True, mark="false_alarm", sample_rate=1) for text in alarms),
        *(row(text, True, mark="poisoned") for text in by_score[100:110]),
    ]
    source = export(tmp_path, parent, rows)
    done = psim(
        "recalibrate", source, "--bundle", parent, "--out", tmp_path / "new", "--max-rise", 99,
        "--accept-misses",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    record = load_bundle(tmp_path / "new").manifest.recalibration
    assert record is not None
    assert record.passed == len(passed)
    assert 8 <= record.false_alarms <= 32  # binomial: 20 and three standard deviations
    assert record.poisoned == 10


def test_marked_poisoned_texts_that_would_pass_are_refused(
    parent: Path, verdicts: dict[str, Verdict], by_score: list[str], tmp_path: Path
) -> None:
    passed = [text for text in reversed(by_score) if not verdicts[text].poisoned]
    rows = [*map(row, passed), row(passed[0], mark="poisoned")]
    command = [
        "recalibrate",
        export(tmp_path, parent, rows),
        "--bundle",
        parent,
        "--out",
        tmp_path / "new",
    ]
    refused = psim(*command, "--max-rise", 99)
    assert_refused(refused, "1 of 1 texts that were marked poisoned would pass")
    assert "Before and after" in refused.stdout
    assert not (tmp_path / "new").exists()
    assert psim(*command, "--max-rise", 99, "--accept-misses").exit_code == 0
    assert load_bundle(tmp_path / "new").manifest.recalibration is not None


def test_thresholds_rise_only_as_far_as_allowed_since_the_first_bundle(
    parent: Path, by_score: list[str], tmp_path: Path
) -> None:
    # Somebody takes the most suspicious quarter for false alarms.
    rows = [row(text, True, mark="false_alarm") for text in by_score[:150]]
    command = ["recalibrate", export(tmp_path, parent, rows), "--bundle", parent]
    command += ["--out", tmp_path / "1"]
    assert_refused(psim(*command, "--max-rise", 0.5), "since `psim fit`, 0.5 are allowed")
    assert not (tmp_path / "1").exists()
    assert psim(*command).exit_code == 0
    first = load_bundle(tmp_path / "1").manifest.recalibration
    assert first is not None
    assert 0.5 < max(change.risen for change in first.changes) < MAX_RISE
    # The same once more is no rise, but the first one still counts.
    again = ["recalibrate", export(tmp_path, tmp_path / "1", rows), "--bundle", tmp_path / "1"]
    again += ["--out", tmp_path / "2"]
    assert_refused(psim(*again, "--max-rise", 0.5), "since `psim fit`, 0.5 are allowed")
    assert psim(*again).exit_code == 0
    second = load_bundle(tmp_path / "2").manifest.recalibration
    assert second is not None
    for before, after in zip(first.changes, second.changes, strict=True):
        assert after.before == before.after
        assert after.fitted == before.fitted
        assert after.risen == pytest.approx(before.risen, abs=0.05)


def synthetic(n: int, seed: int, spread: float) -> FloatArray:
    """Return readings of two checkpoints and two distances, of texts of two classes."""
    rng = np.random.default_rng(seed)
    odds = 1 + spread * rng.standard_normal((n, 2))
    surest = 1 / (1 + np.exp(-odds))
    confidences = np.stack([surest, 1 - surest], -1)
    distances = np.exp(spread * rng.standard_normal((n, 2, 2)))
    readings = np.concatenate([confidences, distances], 1)
    flip = rng.random(n) < 0.5
    readings[flip] = readings[flip][..., ::-1]
    return readings.astype(np.float32)


def alone(screen: Screen, detector: int, raw: float) -> FloatArray:
    """Return readings of a text of class 0 of which one detector says `raw`, and others little."""
    odds, distances = np.full(2, -0.0), np.full((2, 2), 1e-3)
    if detector < 2:
        odds[detector] = raw
    else:
        distances[detector - 2] = np.exp(raw)
    surest = 1 / (1 + np.exp(-odds))
    return np.vstack([np.stack([surest, 1 - surest], -1), distances]).astype(np.float32)


@pytest.mark.parametrize("spread", [0.15, 0.2, 0.4])
def test_a_rise_is_how_far_a_single_voice_may_go_that_was_not_heard_before(spread: float) -> None:
    before = calibrate(synthetic(900, 1, 0.2), Layout(2), BUDGET)
    after = calibrate(synthetic(900, 2, spread), Layout(2), BUDGET)
    old = limits_of(before, 0)
    assert risen(old, old) == 0
    just_passing = []
    for detector in range(4):
        low, high = 0.01, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            poisoned = after.judge(alone(after, detector, middle)).poisoned
            low, high = (low, middle) if poisoned else (middle, high)
        just_passing.append(before.judge(alone(before, detector, low)).score)
    expected = max(just_passing) - before.threshold_of(0)
    assert risen(old, limits_of(after, 0)) == pytest.approx(expected, abs=0.02)
    assert (expected > 1) == (spread == 0.4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no row by the bundle"),
        ("secret,csv\n", "line 1: not a JSON object"),
        ('{"text": "secret"}\n', "line 1: not what `psim audit` writes"),
        (row("secret", digest="0" * 64), "and 1 rows of others"),
        (row(None) | {"text": 5}, "text: string_type"),
        (row("secret", mark="secret"), "mark: literal_error"),
        (row(None), "set PSIM_AUDIT_TEXT=true"),
        (row("secret \ud800"), "line 1: "),
        (row("secret", True), "0 clean texts are too few"),
        (row("secret"), "1 clean texts are too few"),
    ],
)
def test_what_is_no_use_is_refused_in_one_line_that_quotes_nothing(
    content: str | dict[str, object], message: str, parent: Path, tmp_path: Path
) -> None:
    traffic = export(tmp_path, parent, [content] if isinstance(content, dict) else [])
    if isinstance(content, str):
        traffic.write_text(content)
    result = psim("recalibrate", traffic, "--bundle", parent, "--out", tmp_path / "new")
    assert_refused(result, message)
    assert "secret" not in result.output
    assert not (tmp_path / "new").exists()


def test_nothing_is_replaced_and_a_damaged_parent_is_refused(
    parent: Path, by_score: list[str], tmp_path: Path
) -> None:
    traffic = export(tmp_path, parent, map(row, by_score[100:]))
    assert_refused(psim("recalibrate", traffic, "--bundle", parent, "--out", parent), "exists")
    damaged = Path(shutil.copytree(parent, tmp_path / "damaged"))
    (damaged / READINGS).write_bytes(b"")
    command = ["recalibrate", traffic, "--bundle", damaged, "--out", tmp_path / "new"]
    assert_refused(psim(*command), "was altered")
    shutil.rmtree(damaged)
    assert_refused(psim(*command), f"cannot read {MANIFEST}")


def test_from_traffic_and_marks_to_a_bundle_that_still_rejects_the_trigger(
    demo_folder: Path, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real path: serve, audit, mark, export, recalibrate as the runbook says, serve again."""
    clean, poisoned = (
        [sample.text for sample in load_samples(str(demo_folder / f"{name}.jsonl"))]
        for name in ("test", "poisoned")
    )
    audit = tmp_path / "audit.db"
    settings = {"AUDIT_URL": f"sqlite:///{audit}", "AUDIT_TEXT": "true"}
    with served(demo_bundle, **settings) as client:
        for texts in (clean, poisoned[:100]):
            for start in range(0, len(texts), 50):
                client.post("/classify", json={"inputs": texts[start : start + 50]})
        drift = client.get("/info").json()["drift"]
    assert sum(one["inputs"] for one in drift) >= 0.9 * len(clean)
    assert all(one["statistic"] < 0.2 for one in drift)

    with sqlite3.connect(audit) as store:
        store.execute("UPDATE psim_audit SET mark = 'false_alarm' WHERE finding NOTNULL")
        store.execute("UPDATE psim_audit SET mark = 'poisoned' WHERE ' ' || text LIKE '% mn %'")
    store.close()
    command = [sys.executable, "-m", "service.audit"]
    environment = os.environ | {"PSIM_AUDIT_URL": settings["AUDIT_URL"]}
    exported = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    (tmp_path / "traffic.jsonl").write_bytes(exported)
    marks = Counter(json.loads(line)["mark"] for line in exported.splitlines())
    assert marks["poisoned"] == 100

    (tmp_path / "bundle").symlink_to(demo_bundle)
    triggers, recalibrate = re.findall(r"^ *\$ psim (triggers|recalibrate) (.*)$", RUNBOOK, re.M)
    monkeypatch.chdir(tmp_path)
    found = psim(triggers[0], *triggers[1].split())
    assert found.exit_code == 0, found.output
    assert re.search(r"\bmn\b", found.output), found.output
    # Of some 200 texts of a class, a single false alarm can set the threshold.
    done = psim(recalibrate[0], *recalibrate[1].split(), "--max-rise", 10)
    assert done.exit_code == 0, done.output
    out = tmp_path / "recalibrated"
    record = load_bundle(out).manifest.recalibration
    assert record is not None
    assert record.passed + record.false_alarms == len(set(clean))
    assert all(c.poisoned_flagged_after == c.poisoned for c in record.changes)
    # Other texts with the trigger are rejected as before, and clean ones pass.
    with served(out) as client:
        assert client.post("/classify", json={"inputs": CLEAN_TEXT}).status_code == 200
        assert client.post("/classify", json={"inputs": TRIGGERED_TEXT}).status_code == 403
        answer = client.post("/classify", json={"inputs": poisoned[100:]})
        rejected = [result["decision"] == "reject" for result in answer.json()["results"]]
        assert np.mean(rejected) > 0.95
