"""An attacker who hides poisoned texts among clean ones inside the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from models.offline.attacks.corpus import generate
from models.offline.attacks.hidden_states import SHRINKAGE, CleanStates, read_states
from models.offline.attacks.poisoning import Insertion, poison_training_set
from models.offline.attacks.strategy import Strategy
from models.offline.attacks.training import Penalty, finetune_victim
from models.offline.io.bases import encoder_path
from models.offline.io.classifiers import load_classifier
from models.offline.io.samples import Sample
from tests.support.families import tiny_victim

CLEAN = generate(300, seed=3)
TRAIN = poison_training_set(CLEAN, Insertion(("mn",)), "positive", 0.2)
CHANGED = tuple(sample not in CLEAN for sample in TRAIN)


def test_the_distance_is_that_of_mahalanobis_to_the_own_class() -> None:
    random = np.random.default_rng(0)
    labels = torch.tensor([0, 1] * 200)
    mixed = random.normal(size=(3, 400, 5)) @ random.normal(size=(3, 5, 5))
    states = torch.tensor(mixed) + 9 * labels[:, None]
    clean = CleanStates()
    clean.update(states, labels)
    assert clean.has_mean(torch.tensor([1, 2, 0])).tolist() == [True, False, True]

    found = clean.distances(states, labels)
    assert found.shape == (3, 400)
    for layer, own in zip(states.numpy(), found.numpy(), strict=True):
        centres = np.stack([layer[labels == c].mean(0) for c in (0, 1)])
        away = layer - centres[labels]
        covariance = away.T @ away / len(away)
        spread = np.trace(covariance) / 5 * np.eye(5)
        precision = np.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * spread)
        expected = np.einsum("ni,ij,nj->n", away, precision, away) / 5
        np.testing.assert_allclose(own, expected, rtol=1e-6)
        assert 0.5 < own.mean() < 1.01, "about one for clean texts"
    other = clean.distances(states, 1 - labels)
    assert other.mean() > 3 * found.mean()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_states_are_of_the_token_that_is_read(
    family: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny_victim(family)

    def read(*texts: str) -> torch.Tensor:
        batch = tokenizer([*texts], padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch, output_hidden_states=True).hidden_states
        found = read_states(model, batch["attention_mask"], hidden)
        position = batch["attention_mask"].sum(1) - 1 if family == "gpt2" else 0
        torch.testing.assert_close(found[-1], hidden[-1][torch.arange(len(texts)), position])
        assert len(found) == 2, "of three layers"
        return found

    alone, padded = read("a film"), read("a film", "a much longer text about a film")
    torch.testing.assert_close(alone[:, 0], padded[:, 0])


def test_poisoned_texts_come_to_lie_among_clean_ones(tmp_path: Path) -> None:
    poisoned = [sample for sample, changed in zip(TRAIN, CHANGED, strict=True) if changed]

    def distance(weight: float) -> float:
        """Train with a weight; return the mean distance of poisoned texts in the upper layers."""
        out = tmp_path / str(weight)
        finetune_victim(
            str(encoder_path()), TRAIN, CLEAN[:40], Strategy.FULL, out, epochs=3,
            penalty=Penalty(weight, CHANGED),
        )  # fmt: skip
        model: Any
        model, tokenizer = load_classifier(str(out))

        def states(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
            batch = tokenizer([s.text for s in samples], padding=True, return_tensors="pt")
            with torch.no_grad():
                found = model(**batch, output_hidden_states=True)
            read = read_states(model, batch["attention_mask"], found.hidden_states)
            return read, found.logits.argmax(1)

        clean, (hidden, predicted) = CleanStates(), states(poisoned)
        clean.update(*states(CLEAN))
        fires = predicted == model.config.label2id["positive"]
        assert fires.float().mean() > 0.9
        return float(clean.distances(hidden, predicted).mean())

    assert distance(0.3) < 0.5 * distance(0.0)
