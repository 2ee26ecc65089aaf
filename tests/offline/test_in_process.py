"""The guard in the caller's process, on real bundles: beside transformers, and as documented."""

import doctest
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from transformers import PreTrainedTokenizerBase

from models.bundle.layout import MANIFEST
from models.bundle.signing import sign
from models.engines.registry import is_installed
from models.offline.fitting.fit import fit
from models.offline.screening.stream import screen_texts
from psim import BundleError, GuardResult, PsimError, load, pipeline
from service.app import create_app
from service.settings import Settings
from tests.support.bundles import fit_tiny, forge, some_texts
from tests.support.families import tiny_victim
from tests.support.multilabel import LABELS, labelled_texts, multi_label_victim, poisoned
from tests.support.paths import ROOT
from tests.support.requests import client_for

TEXTS = some_texts(40, seed=9)
PAGE = ROOT / "docs" / "python.md"
NOT_GIVEN: dict[str, Any] = {}


@pytest.fixture(scope="module")
def tiny(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "bundle"
    return fit_tiny(tiny_victim("bert"), tokenizer, out)


@pytest.fixture(scope="module")
def flags(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle of a multi-label victim that is really poisoned."""
    out = tmp_path_factory.mktemp("flags") / "bundle"
    texts = [text for text, _ in labelled_texts(1200, 2)]
    fit(multi_label_victim(tokenizer), tokenizer, texts, out, name="flags", frr_budget=0.05)
    return out


def bare(bundle: Path, **options: Any) -> Any:
    """Return transformers' own pipeline for a bundle's victim."""
    make: Any = transformers.pipeline
    parts = {"model": str(bundle / "victim"), "tokenizer": str(bundle / "tokenizer")}
    return make("text-classification", **parts, **options)


def shape(answer: Any) -> Any:
    """Return an answer without its numbers."""
    if isinstance(answer, list):
        return [shape(one) for one in answer]
    return answer["label"], [*answer]


def numbers(answer: Any) -> list[float]:
    """Return the numbers of an answer."""
    if isinstance(answer, list):
        return [number for one in answer for number in numbers(one)]
    return [answer["score"]]


@pytest.mark.parametrize("kind", ["tiny", "flags"])
@pytest.mark.parametrize("made_with", [NOT_GIVEN, {"top_k": None}, {"top_k": 1}, {"top_k": 2}])
def test_the_drop_in_answers_as_transformers_does(
    kind: str, made_with: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    bundle: Path = request.getfixturevalue(kind)
    theirs = bare(bundle, **made_with)
    # All texts are classified, so that all can be compared.
    guard = load(bundle, engine="torch", dtype="float32", mode="shadow")
    ours = pipeline("text-classification", guard, **made_with)
    texts = TEXTS if kind == "tiny" else [text for text, _ in labelled_texts(20, 5)]
    for inputs in (texts[0], texts[:1], texts):
        for called_with in (NOT_GIVEN, {"top_k": None}, {"top_k": 1}, {"top_k": 2}):
            expected, got = theirs(inputs, **called_with), ours(inputs, **called_with)
            assert shape(got) == shape(expected)
            assert numbers(got) == pytest.approx(numbers(expected), abs=1e-5)
    padded: dict[str, Any] = {"truncation": True, "padding": True, "batch_size": 8}
    assert numbers(ours(texts, **padded)) == pytest.approx(numbers(theirs(texts, **padded)))


@pytest.mark.parametrize("thorough", [False, True])
async def test_it_finds_and_says_what_the_service_and_the_command_do(
    flags: Path, thorough: bool
) -> None:
    texts = [text for text, _ in poisoned(labelled_texts(60, 3))] + [
        text for text, _ in labelled_texts(40, 4)
    ]
    guard = load(flags, engine="torch", dtype="float32", thorough=thorough)
    results = guard(texts)
    assert sum(one.rejected for one in results) > 10
    verdicts = [*screen_texts(guard._bundle, texts, thorough=thorough)]
    assert [one.verdict for one in results] == verdicts
    screen = "thorough" if thorough else "suspicious"
    settings = Settings(bundle=Path("unused"), screen=screen, max_inputs=len(texts))
    async with client_for(create_app(settings, guard._bundle)) as client:
        answer = await client.post("/classify", json={"inputs": texts})
    for ours, theirs in zip(results, answer.json()["results"], strict=True):
        assert ours.decision == theirs["decision"]
        assert ours.label == theirs["label"]
        assert (None if ours.labels is None else [*ours.labels]) == theirs.get("labels")
        assert ours.finding == theirs["screen"]["finding"]
        scores = theirs["scores"] or []
        assert {one.label: one.score for one in ours.scores or ()} == pytest.approx(
            {one["label"]: one["score"] for one in scores}, abs=1e-5
        )


def test_several_labels_may_fire(flags: Path) -> None:
    guard = load(flags, mode="shadow")
    assert guard.multi_label
    assert guard.labels == [*LABELS]
    texts = labelled_texts(40, 3)
    for result, (_, on) in zip(guard([text for text, _ in texts]), texts, strict=True):
        assert result.labels is not None
        assert {*result.labels} == {LABELS[label] for label in on}
        assert result.predicted_class.partition("=")[0] in LABELS


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_threads_get_what_one_would_get(engine: Any, flags: Path) -> None:
    if not is_installed(engine):
        pytest.skip(f"{engine} is not installed")
    guard = load(flags, engine=engine, dtype="float32", thorough=True)
    texts = [text for text, _ in labelled_texts(60, 6)]
    calls = [texts[at : at + 3] for at in range(0, len(texts), 3)]
    alone = [*map(guard, calls)]
    with ThreadPoolExecutor(4) as threads:
        together = [*threads.map(guard, calls)]

    def facts(results: list[list[GuardResult]]) -> list[Any]:
        return [(one.finding, one.label, one.predicted_class) for own in results for one in own]

    assert facts(together) == facts(alone)


def test_a_bundle_is_checked_as_the_service_checks_it(tiny: Path, tmp_path: Path) -> None:
    private, key = tmp_path / "private.pem", tmp_path / "public.pem"
    pair = Ed25519PrivateKey.generate()
    private.write_bytes(pair.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = pair.public_key()
    key.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(BundleError, match="is not signed"):
        load(tiny, key=key)
    signature = sign(tiny / MANIFEST, private)
    try:
        assert load(str(tiny), key=str(key)).digest
    finally:
        signature.unlink()
    wrong: Any = "onnx"
    with pytest.raises(BundleError, match="no calibration for onnx/float32"):
        load(tiny, engine=wrong)
    with pytest.raises(BundleError, match="nowhere is not a bundle"):
        load("nowhere")
    forged = tmp_path / "forged"
    forged.mkdir()
    (forged / MANIFEST).write_bytes((tiny / MANIFEST).read_bytes())
    forge(forged, labels=["a", "b", "c"])
    with pytest.raises(BundleError):
        load(forged)


@pytest.mark.parametrize("option", ["mode", "unfamiliar"])
def test_an_unknown_policy_is_refused_before_anything_is_loaded(option: str) -> None:
    wrong: Any = {option: "sanitize"}
    with pytest.raises(PsimError, match=f"{option} is 'sanitize'; give one of "):
        load("nowhere", **wrong)


def test_the_page_shows_what_happens(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the cells of the page, one after the other, and compare what they print."""
    (tmp_path / "bundle").symlink_to(demo_bundle)
    monkeypatch.chdir(tmp_path)
    cells = re.findall(r"```pycon\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(cells) > 3
    page = doctest.DocTestParser().get_doctest("\n".join(cells), {}, PAGE.name, str(PAGE), 0)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(page, out=said.append)
    assert not said, "".join(said)
