"""The command `psim` as its users call it: results on the right stream, errors in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from transformers import PreTrainedTokenizerBase

from models.bundle.layout import ADAPTER_WEIGHTS
from models.bundle.load import load_bundle
from models.engines.base import Encoding, Screening
from models.offline.io.classifiers import save_classifier
from models.offline.io.samples import Sample, load_samples, write_samples
from tests.support.bundles import fit_tiny, rehash, some_texts
from tests.support.commands import assert_refused, psim
from tests.support.families import tiny_victim

LABELS = ["LABEL_0", "LABEL_1", "LABEL_2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Hold a victim, its bundle, and texts."""
    folder = tmp_path_factory.mktemp("cli")
    save_classifier(tiny_victim("bert"), tokenizer, folder / "victim")
    fit_tiny(tiny_victim("bert"), tokenizer, folder / "bundle")
    samples = [Sample(t, LABELS[i % 3]) for i, t in enumerate(some_texts(160))]
    write_samples(folder / "clean.jsonl", samples)
    write_samples(folder / "unlabelled.jsonl", [Sample(s.text) for s in samples])
    return folder


def test_from_texts_without_labels_to_verdicts(folder: Path, tmp_path: Path) -> None:
    out, clean = tmp_path / "bundle", folder / "clean.jsonl"
    fitted = psim(
        "fit", "--victim", folder / "victim", "--texts", folder / "unlabelled.jsonl",
        "--out", out, "--frr-budget", 0.05, "--layers", "last:2", "--seed", 3,
    )  # fmt: skip
    assert fitted.exit_code == 0, fitted.output
    assert "top 2 layer(s)" in fitted.stdout
    manifest = load_bundle(out).manifest
    assert (manifest.psim.layers, manifest.psim.seed) == (2, 3)
    assert manifest.fit.seconds > 0
    assert manifest.fit.peak_memory_mb > 100

    inspected = psim("inspect", out)
    assert inspected.exit_code == 0
    assert f"all {len(manifest.files)} files are intact" in inspected.stdout

    poisoned = tmp_path / "poisoned.jsonl"
    made = psim("attack", "--texts", clean, "--target-label", "LABEL_1", "--out", poisoned)
    assert made.exit_code == 0
    assert all("mn" in s.text.split() for s in load_samples(str(poisoned)))
    report = tmp_path / "report"
    evaluated = psim(
        "evaluate", "--bundle", out, "--clean", clean, "--poisoned", poisoned,
        "--target-label", "LABEL_1", "--out", report,
    )  # fmt: skip
    assert evaluated.exit_code == 0, evaluated.output
    assert "AUROC" in evaluated.stdout
    assert json.loads((report / "evaluation.json").read_text())["none"]["clean_accuracy"]["n"] > 0
    assert (report / "scores.png").read_bytes().startswith(b"\x89PNG")

    screened = psim("screen", clean, "--bundle", out)
    assert screened.exit_code == 0
    verdicts = [json.loads(line) for line in screened.stdout.splitlines()]
    assert [v["line"] for v in verdicts] == list(range(1, 161))
    piped = psim("screen", "-", "--bundle", out, stdin=clean.read_bytes()).stdout.splitlines()
    # How far a pipe has got decides what shares a batch, and so how floats are rounded; these texts
    # calibrated the bundle, so a p-value may move by the one that is the text itself.
    assert [json.loads(line) for line in piped] == [pytest.approx(v, abs=0.02) for v in verdicts]


def test_a_line_that_cannot_be_screened_stops_no_other(folder: Path) -> None:
    lines = [
        b'{"text": "a fine film"}',
        b"{oops secret",
        b'{"body": "secret"}',
        b'{"text": ""}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff\xfe"}',
        b'{"text": 5}',
        b"",
        b"[" * 100_000,
        json.dumps({"text": "secret" * 200_000}).encode(),
        b'{"text": "another film"}',
    ]
    result = psim("screen", "-", "--bundle", folder / "bundle", stdin=b"\n".join(lines))
    assert result.exit_code == 1
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [a["line"] for a in answers] == list(range(1, 12))
    assert ["error" in a for a in answers] == [False, *[True] * 9, False]
    assert "9 rows could not be screened" in result.stderr
    assert "secret" not in result.output


def test_scores_that_are_no_numbers_are_an_error_of_their_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.engines.pytorch import ModuleEngine

    original = ModuleEngine.screen
    loaded = load_bundle(folder / "bundle")
    bad = loaded.engine.encode(["bad"])[0]

    def screen(self: ModuleEngine, batch: list[Encoding]) -> Screening:
        answer = original(self, batch)
        answer.readings[[i for i, encoding in enumerate(batch) if encoding == bad]] = np.nan
        return answer

    monkeypatch.setattr(ModuleEngine, "screen", screen)
    stdin = '{"text": "good"}\n{"text": "bad"}\n{"text": "good"}\n'
    result = psim("screen", "-", "--bundle", folder / "bundle", stdin=stdin)
    assert ["error" in json.loads(line) for line in result.stdout.splitlines()] == [
        False, True, False,
    ]  # fmt: skip
    assert result.exit_code == 1


def flip(bundle: Path) -> None:
    file = bundle / "victim" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def pickled(bundle: Path) -> None:
    (bundle / "victim" / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def without_adapter(bundle: Path) -> None:
    (bundle / "psim" / ADAPTER_WEIGHTS).unlink()


def adapter_of_another(bundle: Path) -> None:
    file = bundle / "psim" / ADAPTER_WEIGHTS
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file(weights, file, metadata={"victim_digest": "0" * 64})
    rehash(bundle, f"psim/{ADAPTER_WEIGHTS}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "was altered"),
        (pickled, "is a pickle"),
        (without_adapter, "is missing"),
        (adapter_of_another, "another base model"),
        (shutil.rmtree, "is not a bundle"),
    ],
)
def test_a_damaged_bundle_is_one_line_and_exit_code_2(
    damage: Callable[[Path], None], message: str, folder: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(folder / "bundle", tmp_path / "bundle"))
    damage(bundle)
    assert_refused(psim("screen", folder / "clean.jsonl", "--bundle", bundle), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"body": "a"}', "no column 'text'"),
        ('{"text": "a"}\n{"text": " "}', "1 of 2 texts are empty or missing, the first in line 2"),
        (json.dumps({"text": "a" * 1_000_000}), "1000000 characters; the limit is"),
        ('{"text": "\\udc00"}', "not valid Unicode"),
        ('{"text": "only one"}', "too few"),
    ],
)
def test_texts_that_cannot_be_fitted_are_refused(
    content: str, message: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    texts = tmp_path / "x.jsonl"
    result = psim("fit", "--victim", folder / "victim", "--texts", texts, "--out", tmp_path / "b")
    assert_refused(result, message)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frr-budget", "0"], "between 0 and 1"),
        (["--frr-budget", "nan"], "between 0 and 1"),
        (["--layers", "first:1"], "write last:N"),
        (["--layers", "last:9"], "the victim has 3"),
        (["--victim", "/nowhere"], "no such folder"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    arguments: list[str], message: str, folder: Path, tmp_path: Path
) -> None:
    given: dict[str, object] = {"--victim": folder / "victim", "--texts": folder / "clean.jsonl"}
    given |= {"--out": tmp_path / "b"} | dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert_refused(psim("fit", *[part for pair in given.items() for part in pair]), message)


def test_wrong_labels_are_refused(folder: Path, tmp_path: Path) -> None:
    wrong, one = tmp_path / "wrong.jsonl", tmp_path / "one.jsonl"
    write_samples(wrong, [Sample("a film", "good"), Sample("a plot", "bad")])
    write_samples(one, [Sample("a film", "good"), Sample("a plot", "good")])
    clean = folder / "clean.jsonl"
    bundle = ["evaluate", "--bundle", folder / "bundle"]
    assert_refused(
        psim(*bundle, "--clean", wrong, "--poisoned", clean, "--target-label", "LABEL_1"),
        "unknown labels ['bad', 'good']",
    )
    assert_refused(
        psim(*bundle, "--clean", clean, "--poisoned", clean, "--target-label", "good"),
        "unknown labels ['good']",
    )
    assert_refused(
        psim(
            "finetune", "--victim", folder / "victim", "--train", one, "--dev", one,
            "--out", tmp_path / "v",
        ),
        "all texts have the same label",
    )  # fmt: skip


def test_results_are_overwritten_only_on_demand_and_strangers_never(
    folder: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(folder / "bundle", tmp_path / "bundle"))
    fit = ["fit", "--victim", folder / "victim", "--texts", folder / "clean.jsonl"]
    fit += ["--frr-budget", 0.05, "--out"]
    assert_refused(psim(*fit, bundle), "exists already")
    assert_refused(psim(*fit, folder, "--force"), "neither a bundle nor a model")
    before = load_bundle(bundle).digest
    failing = psim(*fit, bundle, "--force", "--frr-budget", 0.0001)
    assert_refused(failing, "too few")
    assert load_bundle(bundle).digest == before
    assert psim(*fit, bundle, "--force").exit_code == 0
    assert load_bundle(bundle).digest != before
    assert {p.name for p in tmp_path.iterdir()} == {"bundle"}


def test_an_interrupt_says_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("models.offline.fitting.fit.fit", interrupt)
    result = psim(
        "fit", "--victim", folder / "victim", "--texts", folder / "clean.jsonl",
        "--out", tmp_path / "b",
    )  # fmt: skip
    assert result.exit_code == 130
    assert "Run the same command again" in result.stderr
