"""The second screen: it reads the right states, measures true distances, and is heard."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from torch import nn
from transformers import PreTrainedTokenizerBase

from models.detection.calibrate import calibrate
from models.detection.screen import Layout, Verdict
from models.engines.pytorch import TorchEngine, collate
from models.network.activations import Activations
from models.network.adapters import lora_config, transformer_of
from models.network.guarded import guard
from models.network.trunk import Trunk
from models.offline.fitting.activations import MIN_FOR_MEAN, fit_activations
from tests.support.bundles import KINDS, some_texts, victim_of
from tests.support.families import FAMILIES, tiny_victim


def engine_of(victim: nn.Module, tokenizer: PreTrainedTokenizerBase, layers: int) -> TorchEngine:
    return TorchEngine(guard(victim, lora_config(victim, layers), 2), tokenizer, 64)


@pytest.mark.parametrize("kind", FAMILIES)
def test_states_are_those_that_the_classifier_builds_on(
    kind: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    victim: Any = tiny_victim(kind)
    engine = engine_of(victim, tokenizer, layers=1)
    assert engine.guarded.trunk.watched == [2]  # of three layers, the last one is adapted
    batch = engine.encode(["good", "a slow film was not bad", "the room"])
    inputs = collate(batch, 0, engine.device)
    with torch.inference_mode():
        states, logits = engine.guarded.states(inputs)
        whole = victim(**inputs, output_hidden_states=True)
    last = [len(text) - 1 if hasattr(victim, "score") else 0 for text in batch]
    hidden = whole.hidden_states[2]
    assert torch.equal(states, hidden[range(3), last][:, None])
    assert torch.equal(logits, whole.logits)


@pytest.mark.parametrize(
    ("layers", "below", "watched"),
    [
        (1, 0, []),
        (2, 1, [1]),
        (6, 5, [3, 4, 5]),
        (12, 11, [6, 7, 8, 9, 10]),
        (12, 7, [6, 7]),
        (30, 29, [15, 18, 20, 22, 25]),
    ],
)
def test_the_watched_layers_are_in_the_middle_and_below_the_adapters(
    layers: int, below: int, watched: list[int]
) -> None:
    assert Trunk([nn.Identity() for _ in range(layers)], below).watched == watched


@pytest.mark.parametrize("kind", KINDS)
def test_screening_adds_the_distances_of_the_victim_s_states(
    kind: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = engine_of(victim_of(kind), tokenizer, layers=1)
    guarded, texts = engine.guarded, engine.encode(some_texts(60))
    bare = engine.screen(texts[:5]).readings
    fitted = guarded.activations = fit_activations(engine, texts)
    assert fitted is not None
    for name, weights in guarded.psim.named_parameters():
        if ".lora_B.checkpoint1." in name:
            nn.init.normal_(weights)  # what is watched lies below the adapter
    readings = engine.screen(texts[:5]).readings
    assert np.array_equal(readings[:, 0], bare[:, 0])
    with torch.inference_mode():
        states, _ = guarded.states(collate(texts[:5], 0, engine.device))
        distances = fitted.distances(list(states.unbind(1)))
    own = guarded.layout.by_detector(readings.shape[1])["activations"]
    np.testing.assert_allclose(readings[:, own], distances, rtol=1e-5)


def test_a_victim_that_is_adapted_from_the_bottom_has_nothing_to_watch(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    engine = engine_of(tiny_victim("bert"), tokenizer, layers=3)
    texts = engine.encode(some_texts(20))
    assert fit_activations(engine, texts) is None
    assert engine.screen(texts).readings.shape == (20, 2, 3)


def test_distances_are_mahalanobis() -> None:
    rng = np.random.default_rng(0)
    covariance = np.cov(rng.normal(size=(4, 9)))
    factor = np.linalg.cholesky(np.linalg.inv(covariance))
    means, states = rng.normal(size=(3, 3, 4)), rng.normal(size=(3, 5, 4))
    expected = [
        [[np.sqrt((h - m) @ np.linalg.inv(covariance) @ (h - m)) for m in ms] for h in hs]
        for ms, hs in zip(means, states, strict=True)
    ]
    tensors = (
        torch.tensor(a, dtype=torch.float32) for a in (np.stack([factor] * 3), means @ factor)
    )
    found = Activations(*tensors).distances([torch.tensor(h, dtype=torch.float32) for h in states])
    assert found.shape == (5, 3, 3), "texts, layers, classes"
    np.testing.assert_allclose(found, np.swapaxes(expected, 0, 1), rtol=1e-4)


def test_few_texts_and_rare_classes_still_give_a_screen(tokenizer: PreTrainedTokenizerBase) -> None:
    victim: Any = tiny_victim("bert")
    victim.classifier.bias.data = torch.tensor([99.0, 0.0, 0.0])  # all texts are of class 0
    engine = engine_of(victim, tokenizer, layers=1)
    texts = engine.encode(some_texts(MIN_FOR_MEAN + 2))
    assert len(texts) < transformer_of(victim).config.hidden_size  # type: ignore[union-attr,operator]
    fitted = fit_activations(engine, texts)
    assert fitted is not None
    assert fitted.whitening.isfinite().all()
    torch.testing.assert_close(fitted.means[:, 1], fitted.means[:, 0])


def test_clean_texts_set_the_measure(tokenizer: PreTrainedTokenizerBase) -> None:
    """scikit-learn's own distance, of residuals to the mean of the predicted class."""
    victim: Any = tiny_victim("bert")
    engine = engine_of(victim, tokenizer, layers=1)
    texts = engine.encode(some_texts(150))
    fitted = fit_activations(engine, texts)
    assert fitted is not None
    with torch.inference_mode():
        states, logits = engine.guarded.states(collate(texts, 0, engine.device))
        found = fitted.distances(list(states.unbind(1)))[:, 0].numpy()
    h, predicted = states[:, 0].double().numpy(), logits.argmax(1).numpy()
    members = [predicted == c for c in range(3)]
    means = np.stack([h[m if m.sum() >= MIN_FOR_MEAN else slice(None)].mean(0) for m in members])
    residuals = h - means[predicted]
    oracle = LedoitWolf(assume_centered=True).fit(residuals).mahalanobis(residuals)
    np.testing.assert_allclose(found[np.arange(150), predicted] ** 2, oracle, rtol=1e-3)


@pytest.mark.parametrize("own", [0, 1])
def test_a_text_far_from_its_class_is_heard_although_psim_is_unsure(own: int) -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.55, 0.9, 400)
    readings = np.zeros((400, 2, 2), np.float32)
    readings[np.arange(400), 0, np.arange(400) % 2] = confidence
    readings[np.arange(400), 0, 1 - np.arange(400) % 2] = 1 - confidence
    readings[:, 1] = rng.uniform(3, 5, (400, 2))
    screen = calibrate(readings, Layout(1), 0.05)

    def judge(confidence: float, distance: float, other: float) -> Verdict:
        text = np.array([[confidence, 1 - confidence], [distance, other]], np.float32)
        return screen.judge(text if own == 0 else text[:, ::-1])

    assert not judge(0.7, 4.0, 9.0).poisoned, "far from the other class only"
    verdict = judge(0.7, 9.0, 4.0)
    assert (verdict.poisoned, verdict.detector) == (True, "activations")
    assert verdict.confidence == pytest.approx(0.7)
    verdict = judge(0.9999, 4.0, 4.0)
    assert (verdict.poisoned, verdict.detector) == (True, "confidence")
