"""Bundles with an override test: what is fitted, shown and refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from transformers import PreTrainedTokenizerBase

from models.bundle.layout import CARRIERS, MANIFEST, READINGS, outcome_names
from models.bundle.load import load_bundle
from models.bundle.manifest import Manifest
from models.detection.screen import logit
from models.engines.base import REFERENCE
from models.errors import BundleError
from models.offline.evaluation.bundle_report import warnings_of
from models.offline.fitting.carriers import MIN_WORDS
from models.offline.io.classifiers import save_classifier
from models.offline.io.samples import Sample, write_samples
from service.app import create_app
from service.settings import Settings
from tests.support.bundles import fit_tiny, forge, rehash, some_texts, sure_victim
from tests.support.commands import assert_refused, psim
from tests.support.families import tiny_victim
from tests.support.requests import client_for, listening

CLEAN, HARMLESS = outcome_names(REFERENCE, "suspicious")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Hold a victim, its bundle with carriers, and texts."""
    folder = tmp_path_factory.mktemp("carriers")
    save_classifier(sure_victim(tokenizer), tokenizer, folder / "victim")
    fit_tiny(sure_victim(tokenizer), tokenizer, folder / "bundle")
    write_samples(folder / "clean.jsonl", [Sample(text) for text in some_texts(160)])
    return folder


@pytest.fixture
def bundle(folder: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(folder / "bundle", tmp_path / "bundle"))


def manifest_of(bundle: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle / MANIFEST).read_text())
    return content


def carriers_of(bundle: Path) -> list[list[str]]:
    content: list[list[str]] = json.loads((bundle / CARRIERS).read_text())["carriers"]
    return content


def test_carriers_are_beginnings_of_clean_texts_and_come_back(folder: Path) -> None:
    bundle = load_bundle(folder / "bundle", "float32", "torch")
    carriers = carriers_of(folder / "bundle")
    assert bundle.override is not None
    assert [*bundle.carriers] == [text for own in carriers for text in own]
    assert [len(own) for own in carriers] == [len(own) for own in bundle.override.carriers]
    assert sum(map(bool, carriers)) >= 2
    for label, own in enumerate(carriers):
        assert all(any(text.startswith(one) for text in some_texts(160)) for one in own)
        assert all(len(one.split()) >= MIN_WORDS for one in own)
        read = bundle.engine.screen(bundle.engine.encode(own)).readings[:, 0]
        assert (read.argmax(1) == label).all()
        assert (read.max(1) >= 0.8).all()
    geometry = bundle.override.geometry
    assert geometry.window + 2 * geometry.carrier <= bundle.engine.window_length
    groups = {
        c
        for g in manifest_of(folder / "bundle")["calibrations"][0]["override"]
        for c in g["classes"]
    }
    assert groups == {0, 1, 2}


async def test_an_upstream_with_the_same_weights_agrees_on_all_carriers_and_another_does_not(
    folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    other = fit_tiny(tiny_victim("bert", 1), tokenizer, tmp_path / "other")
    found = []
    for upstream in (folder / "bundle", other):
        bare = create_app(Settings(bundle=upstream, mode="shadow"))
        async with listening(bare) as url:
            settings: dict[str, Any] = {"upstream": url, "upstream_parity_min": 0.9}
            async with client_for(
                create_app(Settings(bundle=folder / "bundle", **settings))
            ) as own:
                found.append((await own.get("/info")).json()["upstream_parity"])
                ready = (await own.get("/ready")).status_code == 200
                assert ready == (upstream != other)
    same, different = found
    assert same["texts"] == len([text for own in carriers_of(folder / "bundle") for text in own])
    assert same["same"] == 1
    assert same["largest_difference"] < 1e-3
    assert different["same"] < 0.9


def test_a_victim_that_is_never_sure_has_no_test(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    bundle = fit_tiny(tiny_victim("bert"), tokenizer, tmp_path / "bundle")
    loaded = load_bundle(bundle)
    assert (loaded.override, [*loaded.carriers]) == (None, [])
    assert not (bundle / CARRIERS).exists()
    inspected = psim("inspect", bundle)
    assert "there is no override test" in " ".join(inspected.stdout.split())


def test_inspect_shows_carriers_and_what_the_test_can_tell(bundle: Path) -> None:
    manifest = manifest_of(bundle)
    manifest["calibrations"][0]["thorough"][0]["natural"] = 0.21
    for group in [g for c in manifest["calibrations"] for g in c["thorough"]][1:]:
        group["natural"] = 0.2
    forge(bundle, calibrations=manifest["calibrations"])
    done = psim("inspect", bundle)
    assert done.exit_code == 0, done.output
    shown = "".join(c for c in done.stdout if c.isascii())
    shown = " ".join(shown.split())
    for label, count in zip(manifest["labels"], manifest["override"]["carriers"], strict=True):
        assert f"{count} {label}" in shown
    assert "clean texts of yours" in shown
    assert "21.0%" in shown
    weak = ", ".join(
        manifest["labels"][c] for c in manifest["calibrations"][0]["thorough"][0]["classes"]
    )
    assert f"more than 20% of clean texts of {weak} keep" in shown


Change = Callable[[list[list[str]]], Any]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: {"carriers": [own[1:] for own in c]}, "as many carriers"),
        (lambda c: {"carriers": [[*own, "one more text here"] for own in c]}, "as many carriers"),
        (lambda c: {"carriers": c[1:]}, "as many carriers"),
        (lambda c: {"carriers": [[*own[1:], ""] for own in c]}, "without a token"),
        (lambda c: {"carriers": [[*own[1:], 5] for own in c]}, "does not hold the carriers"),
        (lambda c: {"carriers": [" ".join(own) for own in c]}, "does not hold the carriers"),
        (lambda c: {"carriers": {"a": c}}, "does not hold the carriers"),
        (lambda c: {"carriers": None}, "does not hold the carriers"),
        (lambda c: {"texts": c}, "does not hold the carriers"),
        (lambda c: {"carriers": c, "more": 1}, "does not hold the carriers"),
        (lambda c: c, "not an object of JSON"),
    ],
)  # fmt: skip
def test_carriers_that_are_not_as_the_manifest_says_are_refused(
    bundle: Path, change: Change, says: str
) -> None:
    (bundle / CARRIERS).write_text(json.dumps(change(carriers_of(bundle))))
    rehash(bundle, CARRIERS)
    with pytest.raises(BundleError, match=says) as refused:
        load_bundle(bundle)
    assert "\n" not in str(refused.value)
    assert carriers_of_any(bundle) not in str(refused.value)


def carriers_of_any(bundle: Path) -> str:
    """Return a text that no message may quote."""
    return "film" if "film" in (bundle / CARRIERS).read_text() else "service"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"carriers": [["\\ud800"]]}'])
def test_carriers_that_are_no_json_are_refused(bundle: Path, content: bytes) -> None:
    (bundle / CARRIERS).write_bytes(content)
    with pytest.raises(BundleError, match="was altered"):
        load_bundle(bundle)
    rehash(bundle, CARRIERS)
    with pytest.raises(BundleError, match=r"carriers\.json (is not JSON|does not hold)"):
        load_bundle(bundle)


def test_carriers_and_the_manifest_come_together(bundle: Path) -> None:
    manifest = manifest_of(bundle)
    carriers = (bundle / CARRIERS).read_bytes()
    (bundle / CARRIERS).unlink()
    with pytest.raises(BundleError, match=r"carriers\.json' is missing"):
        load_bundle(bundle)
    forge(bundle, files={n: d for n, d in manifest["files"].items() if n != CARRIERS})
    with pytest.raises(BundleError, match=r"carriers\.json' is missing"):
        load_bundle(bundle)
    assert_refused(psim("inspect", bundle), "carriers.json' is missing")
    (bundle / CARRIERS).write_bytes(carriers)
    forge(bundle, files=manifest["files"], override=None)
    with pytest.raises(BundleError, match="without an override test"):
        load_bundle(bundle)


def without_test(bundle: Path) -> None:
    """Forge a bundle that has no override test any more, but for its outcomes."""
    manifest = manifest_of(bundle)
    (bundle / CARRIERS).unlink()
    calibrations = [own | {"override": [], "thorough": []} for own in manifest["calibrations"]]
    files = {name: digest for name, digest in manifest["files"].items() if name != CARRIERS}
    forge(bundle, override=None, calibrations=calibrations, files=files)


def test_a_test_cannot_be_taken_out_of_a_bundle_in_part(bundle: Path) -> None:
    calibrations = manifest_of(bundle)["calibrations"]
    without_test(bundle)
    with pytest.raises(BundleError, match="outcomes of override tests, the manifest has none"):
        load_bundle(bundle)
    arrays = {
        n: a
        for n, a in load_arrays(bundle / READINGS).items()
        if "suspicious" not in n and "thorough" not in n
    }
    save_arrays(arrays, bundle / READINGS)
    rehash(bundle, READINGS)
    assert load_bundle(bundle).override is None, "nothing of it is left"
    forge(bundle, calibrations=calibrations)
    with pytest.raises(BundleError, match="not what its calibration texts give"):
        load_bundle(bundle)


ArrayChange = Callable[[np.ndarray[Any, np.dtype[Any]]], np.ndarray[Any, np.dtype[Any]] | None]


def _to_class(number: float) -> ArrayChange:
    def change(array: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
        array = array.copy()
        array[0, 0] = number
        return array

    return change


@pytest.mark.parametrize("name", [CLEAN, HARMLESS])
@pytest.mark.parametrize(
    "change",
    [
        lambda a: None,
        lambda a: a[:, :1],
        lambda a: a[:, 0],
        lambda a: a[None],
        lambda a: a.astype(np.float64),
        lambda a: a * np.float32(np.nan),
        _to_class(3),
        _to_class(-1),
        _to_class(0.5),
        _to_class(np.inf),
    ],
)
def test_outcomes_that_do_not_fit_are_refused(bundle: Path, name: str, change: ArrayChange) -> None:
    arrays = load_arrays(bundle / READINGS)
    changed = change(arrays.pop(name))
    if changed is not None:
        arrays[name] = np.ascontiguousarray(changed)
    save_arrays(arrays, bundle / READINGS)
    rehash(bundle, READINGS)
    with pytest.raises(BundleError, match="does not hold the calibration"):
        load_bundle(bundle)


def test_too_few_outcomes_or_other_ones_are_refused(bundle: Path) -> None:
    arrays = load_arrays(bundle / READINGS)
    for changed, says in (
        (arrays[CLEAN][:5], "does not hold the calibration"),
        (arrays[CLEAN][:0], "does not hold the calibration"),
        (
            np.maximum(arrays[CLEAN], np.array([0, 99, 0.99], np.float32)),
            "not what its calibration texts give",
        ),
    ):
        save_arrays({**arrays, CLEAN: np.ascontiguousarray(changed)}, bundle / READINGS)
        rehash(bundle, READINGS)
        with pytest.raises(BundleError, match=says):
            load_bundle(bundle)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.5, -1.0])
def test_a_forged_threshold_of_the_test_is_refused(bundle: Path, threshold: float) -> None:
    calibrations = manifest_of(bundle)["calibrations"]
    calibrations[0]["override"][0]["threshold"] = threshold
    forge(bundle, calibrations=calibrations)
    with pytest.raises(BundleError, match="not what its calibration texts give"):
        load_bundle(bundle)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window": 0}, "override.window"),
        ({"carrier": 0}, "override.carrier"),
        ({"window": 500}, "the override test needs more than"),
        ({"carriers": [16]}, "override.carriers"),
        ({"carriers": [16, 16]}, "a number of carriers for each label"),
        ({"carriers": [16, 16, 15]}, "as many carriers"),
    ],
)
def test_a_forged_record_of_the_test_is_refused(
    bundle: Path, changes: dict[str, Any], says: str
) -> None:
    forge(bundle, override=manifest_of(bundle)["override"] | changes)
    with pytest.raises(BundleError, match=says):
        load_bundle(bundle)


def test_thresholds_of_classes_without_a_label_are_refused(bundle: Path) -> None:
    calibrations = manifest_of(bundle)["calibrations"]
    calibrations[0]["override"][0]["classes"] = [7]
    forge(bundle, calibrations=calibrations)
    assert_refused(psim("inspect", bundle), "a class that has no label")


def test_a_class_whose_triggers_can_hardly_be_confirmed_is_named(bundle: Path) -> None:
    manifest = Manifest.model_validate_json((bundle / MANIFEST).read_text())
    (own,) = (c for c in manifest.calibrations if c.runtime == manifest.default.runtime)
    extreme = {c: group.threshold for group in own.groups for c in group.classes}

    def warned(kept: float) -> list[str]:
        """Warn if an extreme text of the first group has to keep as much."""
        group = own.override[0]
        needed = logit(kept) - logit(group.keeps) + extreme[group.classes[0]]
        others = [other.model_copy(update={"threshold": 0.0}) for other in own.override[1:]]
        groups = [group.model_copy(update={"threshold": needed}), *others]
        calibrations = [own.model_copy(update={"override": groups})]
        return warnings_of(manifest.model_copy(update={"calibrations": calibrations}))

    name = manifest.classes[own.override[0].classes[0]]
    assert any(f"a text of {name} has to keep more than 99%" in one for one in warned(0.995))
    assert not any("has to keep" in one for one in warned(0.98))


def test_an_old_bundle_is_refused_with_the_command_that_makes_a_new_one(bundle: Path) -> None:
    """Schema 4 knew neither carriers nor the groups of the test."""
    manifest = manifest_of(bundle)
    del manifest["override"]
    for calibration in manifest["calibrations"]:
        del calibration["override"], calibration["thorough"]
    for version in (4, 5, 6, 7):
        (bundle / MANIFEST).write_text(json.dumps(manifest | {"schema_version": version}))
        message = f"has schema {version} instead of 9, so it is of another version; run `psim fit`"
        with pytest.raises(BundleError, match=message) as why:
            load_bundle(bundle)
        assert "\n" not in str(why.value)
        for command in (("inspect", bundle), ("screen", bundle / MANIFEST, "--bundle", bundle)):
            assert_refused(psim(*command), "psim fit --victim")


def fitted(folder: Path, out: Path, *options: Any) -> Any:
    return psim(
        "fit", "--victim", folder / "victim", "--texts", folder / "clean.jsonl", "--out", out,
        "--frr-budget", 0.05, "--engine", "torch", *options,
    )  # fmt: skip


def test_carriers_can_be_given(folder: Path, tmp_path: Path) -> None:
    given = [f"{text} alpha" for text in some_texts(120, seed=9)]
    write_samples(tmp_path / "given.jsonl", [Sample(text) for text in given])
    done = fitted(folder, tmp_path / "bundle", "--carriers", tmp_path / "given.jsonl")
    assert done.exit_code == 0, done.output
    chosen = [text for own in carriers_of(tmp_path / "bundle") for text in own]
    assert chosen
    assert all(any(text.startswith(one) for text in given) for one in chosen)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["a film", "short"], "sure of carriers of two classes at least"),
        (["the very same text of one class"] * 30, "sure of carriers of two classes at least"),
        ([], "is empty"),
        (None, "does not exist"),
    ],
)
def test_carriers_that_are_of_no_use_are_refused(
    folder: Path, tmp_path: Path, texts: list[str] | None, says: str
) -> None:
    if texts is not None:
        write_samples(tmp_path / "given.jsonl", [Sample(text) for text in texts])
    done = fitted(folder, tmp_path / "bundle", "--carriers", tmp_path / "given.jsonl")
    assert_refused(done, says)
    assert not (tmp_path / "bundle").exists()


def test_screen_tests_suspicious_lines_or_all(folder: Path) -> None:
    def tested(*options: str) -> list[bool]:
        done = psim("screen", folder / "clean.jsonl", "--bundle", folder / "bundle", *options)
        assert done.exit_code == 0, done.output
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        for row in rows:
            assert (row["override"] is None) == (row["override_threshold"] is None)
            over = row["override"] is not None and row["override"] >= row["override_threshold"]
            assert row["poisoned"] == (row["finding"] == "triggered")
            assert row["poisoned"] == over or row["override"] is None
        return [row["override"] is not None for row in rows]

    assert all(tested("--thorough"))
    assert 0 < sum(tested()) < 80
