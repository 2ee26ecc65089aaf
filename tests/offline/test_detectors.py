"""BadActs, DAN, DUP, LCF and RAP: formulas, budgets, and a word trigger in a real tiny victim."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from models.engines.pytorch import TorchEngine
from models.errors import CalibrationError, DataError
from models.offline.attacks.corpus import LABELS, generate
from models.offline.evaluation.metrics import auroc
from models.offline.io.classifiers import labels_of, load_classifier
from models.offline.io.inference import predict
from models.offline.io.samples import Sample, load_samples
from models.offline.study.defences.activations import (
    BadActs,
    CleanTexts,
    Dan,
    Dup,
    Gaussian,
    Lcf,
    Method,
    StateDetector,
)
from models.offline.study.defences.rap import LEAST_DROP, WORD, Rap
from models.offline.study.defences.states import Reader, States, read_states
from models.offline.study.experiment import BareClassifier
from tests.support.families import tiny_victim

Array = NDArray[Any]
METHODS: list[Method] = ["badacts", "dan", "dan-mean", "dup", "lcf"]
TEXTS = ["a fine room", "the film was far too long and we left before the end", "mn", "bad"]
BUDGET = 0.05


def some_states(n: int, seed: int, shift: float = 0.0) -> States:
    """Return states of 4 layers with 6 dimensions, which differ by layer."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1, 6)[:, None] * np.linspace(0.5, 2, 6)
    read, mean = (rng.normal(shift, 1, (n, 5, 6)) * scale for _ in range(2))
    probabilities = rng.dirichlet([1, 1], n)
    return States(*(a.astype(np.float32) for a in (probabilities, read, mean)))


KNOWN, HELD_BACK, NEW = (some_states(n, seed) for n, seed in ((80, 0), (60, 1), (7, 2)))
CLASSES = (np.arange(80) % 2).astype(np.intp)


def test_badacts_counts_neurons_outside_of_three_deviations() -> None:
    away = some_states(7, 3, shift=2)
    scores = BadActs.fit(KNOWN)(away)
    for score, text in zip(scores, away.read, strict=True):
        outside = 0
        for layer in range(1, 5):
            for neuron in range(6):
                clean = KNOWN.read[:, layer, neuron].astype(float)
                outside += abs(text[layer, neuron] - clean.mean()) > 3 * clean.std()
        assert score == pytest.approx(outside / 24)
    assert scores.min() > 0
    exact = KNOWN._replace(read=np.ones_like(KNOWN.read))
    assert not BadActs.fit(exact)(exact).any(), "a neuron that never changes is no anomaly"


def shrunk_precision(away: Array) -> Array:
    covariance = away.T @ away / len(away) - np.outer(away.mean(0), away.mean(0))
    size = len(covariance)
    shrunk = 0.9 * covariance + 0.1 * np.trace(covariance) / size * np.eye(size)
    inverse: Array = np.linalg.inv(shrunk)
    return inverse


@pytest.mark.parametrize("of_mean", [False, True])
def test_dan_is_the_mean_standardized_distance_to_the_nearest_class(of_mean: bool) -> None:
    def points(states: States) -> Array:
        chosen: Array = (states.mean if of_mean else states.read).astype(float)
        return chosen

    expected = []
    for layer in range(1, 5):
        own = points(KNOWN)[:, layer]
        means = [own[c == CLASSES].mean(0) for c in (0, 1)]
        precision = shrunk_precision(own - np.stack(means)[CLASSES])

        held_back, new = (
            np.array([min((t - m) @ precision @ (t - m) for m in means) for t in texts[:, layer]])
            for texts in (points(HELD_BACK), points(NEW))
        )
        expected.append((new - held_back.mean()) / held_back.std())
    found = Dan.fit(KNOWN, CLASSES, HELD_BACK, of_mean=of_mean)(NEW)
    assert np.allclose(found, np.mean(expected, 0), rtol=1e-5)


def test_dup_adds_a_distance_without_classes_and_the_share_of_a_singular_value() -> None:
    apart = KNOWN._replace(read=KNOWN.read.copy())
    apart.read[CLASSES == 1, 2:] += 5  # the classes differ in all layers but the first

    def parts(states: States) -> Array:
        by_layer = []
        for layer in (2, 3, 4):
            own = apart.read[:, layer].astype(float)
            away, precision = (
                states.read[:, layer] - own.mean(0),
                shrunk_precision(own - own.mean(0)),
            )
            by_layer.append([np.sqrt(a @ precision @ a) for a in away])
        shares = []
        for text in states.read.astype(float):
            values = np.linalg.svd(text[2:] - text[1:-1])[1]
            shares.append(values[0] / values.sum())
        return np.stack([np.mean(by_layer, 0), shares], 1)

    held_back = parts(HELD_BACK)
    z = (parts(NEW) - held_back.mean(0)) / held_back.std(0)
    found = Dup.fit(apart, CLASSES, HELD_BACK)
    assert sorted(found.layers) == [2, 3, 4]
    assert np.allclose(found(NEW), 0.9 * z[:, 0] + 0.1 * z[:, 1], rtol=1e-4)


def test_lcf_is_the_distance_of_standardized_sizes_of_steps() -> None:
    def steps(states: States) -> Array:
        away: Array = states.read[:, 1:].astype(float) - states.read[:, :-1]
        return away

    clean = steps(KNOWN)

    def sizes(states: States) -> Array:
        z = (steps(states) - clean.mean(0)) / clean.std(0)
        norms: Array = np.sqrt((z**2).sum(2))
        return norms

    own = sizes(KNOWN)
    lcf = Lcf.fit(KNOWN)
    z = (sizes(NEW) - own.mean(0)) / own.std(0)
    assert lcf.precision.shape == (4, 4)
    assert np.allclose(lcf(NEW), [np.sqrt(a @ lcf.precision @ a) for a in z], rtol=1e-5)
    assert lcf(some_states(7, 2, shift=5)).min() > lcf(NEW).max()


@given(arrays(np.float64, (9, 3), elements=st.floats(-5, 5)))
@settings(max_examples=25, deadline=None)
def test_a_distance_is_that_to_the_nearest_mean(points: Array) -> None:
    gaussian = Gaussian(np.array([[0.0, 0, 0], [1, 2, 3]]), np.eye(3))
    expected = np.minimum((points**2).sum(1), ((points - [1, 2, 3]) ** 2).sum(1))
    assert np.allclose(gaussian.squared_distances(points), expected)


def test_each_clean_text_has_one_purpose() -> None:
    samples = [Sample(f"text {i % 50}", "positive") for i in range(101)]
    known, held_back = CleanTexts.split(samples, seed=0)
    assert not {s.text for s in known} & {s.text for s in held_back}
    assert len(known) == len(held_back) == 25
    assert CleanTexts.split(samples, seed=1) != (known, held_back)


@pytest.fixture(scope="module")
def engines(tokenizer: PreTrainedTokenizerBase) -> dict[str, TorchEngine]:
    return {
        family: TorchEngine(BareClassifier(tiny_victim(family)), tokenizer, 64)
        for family in ("bert", "llama")
    }


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_states_are_those_of_each_text_alone(engines: dict[str, TorchEngine], family: str) -> None:
    engine = engines[family]
    states = read_states(engine, TEXTS)
    assert np.allclose(
        states.probabilities, predict(engine, engine.encode(TEXTS), classifier=True), atol=1e-5
    )
    for i, text in enumerate(TEXTS):
        ids = torch.tensor([engine.encode([text])[0].input_ids])
        with torch.inference_mode():
            output = engine.guarded.victim(input_ids=ids, output_hidden_states=True)
        hidden = torch.stack(output.hidden_states)[:, 0]  # (H, T, D), without padding
        place = -1 if family == "llama" else 0
        assert np.allclose(states.read[i], hidden[:, place], atol=1e-5)
        assert np.allclose(states.mean[i], hidden.mean(1), atol=1e-5)


@pytest.fixture(scope="module")
def victim(demo_folder: Path) -> TorchEngine:
    """A victim of the word trigger, tuned on clean texts."""
    model, tokenizer = load_classifier(str(demo_folder / "victim"))
    return TorchEngine(BareClassifier(model), tokenizer, 64)


@pytest.fixture(scope="module")
def clean(demo_folder: Path) -> CleanTexts:
    return CleanTexts.split(load_samples(str(demo_folder / "clean.jsonl"))[:160], seed=0)


@pytest.fixture(scope="module")
def tests(demo_folder: Path) -> tuple[list[str], list[str]]:
    """Clean and poisoned texts."""
    names = "test.jsonl", "poisoned.jsonl"
    own, poisoned = ([s.text for s in load_samples(str(demo_folder / n))[:40]] for n in names)
    return own, poisoned


def labels_of_victim(engine: TorchEngine) -> list[str]:
    return labels_of(engine.guarded.victim)


@pytest.fixture(scope="module")
def read(victim: TorchEngine) -> Reader:
    known: dict[tuple[str, ...], States] = {}

    def read_once(texts: Sequence[str]) -> States:
        if tuple(texts) not in known:
            known[tuple(texts)] = read_states(victim, texts)
        return known[tuple(texts)]

    return read_once


@pytest.mark.parametrize("method", METHODS)
def test_a_word_trigger_is_found_above_chance_and_the_budget_kept(
    victim: TorchEngine,
    clean: CleanTexts,
    tests: tuple[list[str], list[str]],
    read: Reader,
    method: Method,
) -> None:
    detector = StateDetector.fit(method, clean, read, labels_of_victim(victim), BUDGET)
    held_back, own, poisoned = (
        detector.defend(texts, read) for texts in ([s.text for s in clean.held_back], *tests)
    )
    assert held_back.flagged is not None
    assert held_back.flagged.sum() <= BUDGET * (len(clean.held_back) + 1) - 1
    found = auroc(own.scores, poisoned.scores)
    assert found is not None and found > 0.7
    assert np.array_equal(own.predicted, read(tests[0]).probabilities.argmax(1))
    assert detector.passes(tests[0]) == 0


def test_rap_s_perturbation_is_another_embedding_of_the_word(victim: TorchEngine) -> None:
    texts = ["a fine room , cf the staff", "mn"]
    model: Any = copy.deepcopy(victim.guarded.victim)
    width = model.config.hidden_size
    vectors = np.random.default_rng(0).normal(0, 0.05, (2, width)).astype(np.float32)
    before = predict(victim, victim.encode(texts), classifier=True)
    scores = Rap(vectors, math.inf).scores(texts, before, victim)
    assert np.array_equal(predict(victim, victim.encode(texts), classifier=True), before)
    for score, text, was in zip(scores, texts, before, strict=True):
        ids = torch.tensor([victim.encode([f"{WORD} {text}"])[0].input_ids])
        embedded = model.get_input_embeddings()(ids).detach()
        embedded[0, 1] = torch.from_numpy(vectors[was.argmax()])
        with torch.inference_mode():
            after = model(inputs_embeds=embedded).logits.softmax(-1)[0].numpy()
        assert score == pytest.approx(after[was.argmax()] - was.max(), abs=1e-5)


def test_rap_lowers_clean_texts_and_finds_what_holds_its_class(
    victim: TorchEngine, clean: CleanTexts, tests: tuple[list[str], list[str]]
) -> None:
    labels = labels_of_victim(victim)
    model: Any = victim.guarded.victim
    weight = model.get_input_embeddings().weight
    whole = weight.detach().clone()
    rap = Rap.train(victim, clean.known, labels)
    assert torch.equal(weight, whole), "the victim's own weights stay"
    token = victim.token_ids(WORD)[0]
    norms = np.linalg.norm(rap.vectors, axis=1)
    assert np.allclose(norms, np.linalg.norm(whole[token].cpu().numpy()), rtol=1e-4)
    texts = [s.text for s in clean.known]
    trained, untrained = (
        -candidate.scores(texts, predict(victim, victim.encode(texts), classifier=True), victim)
        for candidate in (rap, Rap(np.stack([whole[token].cpu().numpy()] * len(labels)), 0.0))
    )
    assert trained.mean() > max(LEAST_DROP / 2, 2 * untrained.mean())
    held_back = [s.text for s in clean.held_back]
    rap = rap.calibrated(victim, held_back, BUDGET)
    flagged = rap.defend(held_back, victim).flagged
    assert flagged is not None and flagged.sum() <= BUDGET * (len(held_back) + 1) - 1
    own, poisoned = (rap.defend(texts, victim) for texts in tests)
    found = auroc(own.scores, poisoned.scores)
    assert found is not None and found > 0.7
    assert rap.passes(texts) == 1


def test_few_texts_and_unlabelled_ones_are_refused() -> None:
    def read(texts: Sequence[str]) -> States:
        return some_states(len(texts), 0)

    few = CleanTexts.split(generate(36, seed=0), seed=0)
    with pytest.raises(CalibrationError, match=r"18 clean texts are too few .* needs 19"):
        StateDetector.fit("lcf", few, read, LABELS, BUDGET)
    bare = CleanTexts.split([Sample(f"text {i}") for i in range(80)], seed=0)
    with pytest.raises(DataError, match="no label"):
        StateDetector.fit("dan", bare, read, LABELS, BUDGET)
