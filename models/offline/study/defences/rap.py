"""RAP, a defence from the literature: a perturbation that clean texts yield to."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from models.detection.screen import FloatArray
from models.engines.base import Encoding
from models.engines.pytorch import TorchEngine, collate, special_tokens
from models.network.adapters import transformer_of
from models.offline.evaluation.metrics import DefendedPredictions, classes_of
from models.offline.io.inference import predict
from models.offline.io.samples import Sample, require_labels
from models.offline.study.defences.threshold import rejecting, require_enough, threshold_of

WORD = "cf"
"""A rare word, as in the paper; none of the triggers in our recipes."""
LEAST_DROP, MOST_DROP = 0.1, 0.3
EPOCHS, ROWS, LEARNING_RATE = 5, 32, 1e-2


@dataclass(frozen=True)
class Rap:
    """RAP (Yang et al., EMNLP 2021): robustness-aware perturbations.

    A rare word before the text gets an embedding that lowers the probability of a protected class
    on clean texts, by `LEAST_DROP` to `MOST_DROP`. A backdoor holds the class against it. The score
    is therefore minus the drop of the predicted class.

    The paper protects one class that is known in advance. Here every class is protected, each by an
    embedding of its own.
    """

    vectors: FloatArray
    """Embedding of the word's first token for each class, shape (C, D)."""
    threshold: float
    """Texts with at least this score are rejected."""

    @staticmethod
    def train(trainer: TorchEngine, known: Sequence[Sample], labels: Sequence[str]) -> "Rap":
        """Train the embeddings on clean texts; nothing is rejected until `calibrated`.

        Args:
            trainer: the victim in float32; its weights stay as they are.
            known: clean texts with labels.
            labels: the victim's classes, in order.

        Raises:
            DataError: a text has no label or an unknown one, or all texts have the same label.
        """
        require_labels(known, labels)
        trainer.guarded.requires_grad_(False)
        truth = classes_of(known, labels)
        vectors = [
            _train_vector(
                trainer, [s.text for s, c in zip(known, truth, strict=True) if c == own], own
            )
            for own in range(len(labels))
        ]
        return Rap(np.stack(vectors), math.inf)

    def calibrated(self, engine: TorchEngine, held_back: Sequence[str], budget: float) -> "Rap":
        """Choose the threshold from clean texts, by the same rule as for PSIM.

        Raises:
            CalibrationError: there are too few for the budget.
        """
        require_enough(len(held_back), budget)
        before = predict(engine, engine.encode(held_back), classifier=True)
        return replace(self, threshold=threshold_of(self.scores(held_back, before, engine), budget))

    def scores(self, texts: Sequence[str], before: FloatArray, engine: TorchEngine) -> FloatArray:
        """Return minus the drop of the predicted class's probability, shape (n,).

        Args:
            texts: the texts.
            before: the victim's probabilities without the word, shape (n, C).
            engine: the victim.
        """
        predicted = before.argmax(1)
        scores = np.empty(len(texts), np.float32)
        for own in np.unique(predicted).tolist():
            rows = np.flatnonzero(predicted == own)
            vector = torch.from_numpy(self.vectors[own])
            with _perturbed(engine, vector):
                after = predict(
                    engine, _encode(engine, [texts[i] for i in rows.tolist()]), classifier=True
                )
            scores[rows] = after[:, own] - before[rows, own]
        return scores

    def defend(self, texts: Sequence[str], engine: TorchEngine) -> DefendedPredictions:
        """Classify the original texts, and reject those that yield least."""
        before = predict(engine, engine.encode(texts), classifier=True)
        scores = self.scores(texts, before, engine)
        return rejecting(before.argmax(1), scores, self.threshold)

    def passes(self, texts: Sequence[str]) -> float:
        """Return the number of extra passes of the victim per text."""
        return 1.0


def _encode(engine: TorchEngine, texts: Sequence[str]) -> list[Encoding]:
    """Tokenize texts with the word before them, where no truncation removes it."""
    return engine.encode([f"{WORD} {text}" for text in texts])


def _embeddings(engine: TorchEngine) -> torch.nn.Module:
    model: Any = transformer_of(engine.guarded.victim)
    embeddings: torch.nn.Module = model.get_input_embeddings()
    return embeddings


@contextmanager
def _perturbed(engine: TorchEngine, vector: torch.Tensor) -> Iterator[None]:
    """Put a vector in the place of the embedding of each row's first own token."""
    place = len(special_tokens(engine.tokenizer)[0])

    def put(_: object, args: object, output: torch.Tensor) -> torch.Tensor:
        own = vector.to(output).expand(len(output), 1, -1)
        return torch.cat([output[:, :place], own, output[:, place + 1 :]], 1)

    handle = _embeddings(engine).register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def _train_vector(engine: TorchEngine, texts: Sequence[str], own: int) -> FloatArray:
    """Train the embedding that lowers the probability of a class on its own clean texts.

    As in the authors' code, gradients are never reset, and the norm of the embedding stays.
    """
    place = len(special_tokens(engine.tokenizer)[0])
    token = _encode(engine, [""])[0].input_ids[place]
    weight: Any = _embeddings(engine).weight
    vector = weight[token].detach().clone().requires_grad_()
    norm = vector.detach().norm()
    encoded, whole = _encode(engine, texts), engine.encode(texts)
    before = predict(engine, whole, classifier=True)[:, own] if texts else np.empty(0, np.float32)
    with _perturbed(engine, vector):
        for _ in range(EPOCHS):
            for start in range(0, len(texts), ROWS):
                batch = encoded[start : start + ROWS]
                after = engine.guarded.classify(collate(batch, engine.pad_id, engine.device))
                base = torch.from_numpy(before[start : start + ROWS]).to(after)
                drop = base - after[:, own]
                loss = (LEAST_DROP - drop).relu().mean() + (drop - MOST_DROP).relu().mean()
                loss.backward()  # type: ignore[no-untyped-call]
                with torch.no_grad():
                    vector -= LEARNING_RATE * vector.grad
                    vector *= norm / vector.norm()
    trained: FloatArray = vector.detach().cpu().numpy()
    return trained
