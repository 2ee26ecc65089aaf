"""Thresholds from clean texts alone: one per predicted class, for a false-rejection budget."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import beta
from tqdm import tqdm

from models.batching import length_sorted_batches
from models.engines import Encoding, Engine
from models.errors import CalibrationError
from models.manifest import Calibration, GroupRecord
from models.screen import (
    FloatArray,
    Group,
    allowed_rejections,
    conformal_threshold,
    min_calibration_size,
)

BATCH_TOKENS = 4096


def predict(engine: Engine, texts: Sequence[Encoding], *, classifier: bool = False) -> FloatArray:
    """Return PSIM's (or the classifier's) probabilities, shape (len(texts), C), in input order."""
    forward = engine.classify if classifier else engine.screen
    rows: list[FloatArray] = [np.empty(0, np.float32)] * len(texts)
    bar = tqdm(total=len(texts), desc=forward.__name__, unit=" texts", leave=False, disable=None)
    for batch in length_sorted_batches([len(t) for t in texts], BATCH_TOKENS):
        probabilities = forward([texts[i] for i in batch])
        for index, row in zip(batch, probabilities, strict=True):
            rows[index] = row
        bar.update(len(batch))
    bar.close()
    return np.stack(rows)


def calibrate(
    probabilities: FloatArray, frr_budget: float, *, by_class: bool = True
) -> list[Group]:
    """Return one group per predicted class, small classes pooled, that together keep the budget.

    Class-conditional split conformal prediction (see `models.screen`): if the clean texts to come
    are exchangeable with these, the expected false rejection rate of each group is within the
    budget, and so is the total. Classes with too few texts for a threshold of their own share one,
    together with the smallest of the other classes if they are still too few.

    Args:
        probabilities: PSIM's, of held-out clean texts, shape (n, C).
        frr_budget: tolerated share of rejected clean texts, in (0, 1).
        by_class: False gives one group of all classes, for comparison.

    Raises:
        CalibrationError: too few texts in all, or probabilities that are not finite.
    """
    if not np.isfinite(probabilities).all():
        raise CalibrationError("the victim gives NaN or infinite scores on the clean texts")
    needed = min_calibration_size(frr_budget)
    if len(probabilities) < needed:
        raise CalibrationError(
            f"{len(probabilities)} calibration texts are too few for a false-rejection budget of "
            f"{frr_budget}: it needs {needed}; give more clean texts or a larger --frr-budget"
        )
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    counts = np.bincount(predicted, minlength=probabilities.shape[1])
    groups = []
    for classes in _pool(counts.tolist(), needed) if by_class else [tuple(range(len(counts)))]:
        scores = np.sort(confidence[np.isin(predicted, classes)])
        groups.append(Group(classes, conformal_threshold(scores, frr_budget), scores))
    return groups


def _pool(counts: list[int], needed: int) -> list[tuple[int, ...]]:
    """Partition the classes so that every part has at least `needed` texts."""
    pooled = [c for c, count in enumerate(counts) if count < needed]
    alone = sorted((c for c in range(len(counts)) if c not in pooled), key=lambda c: counts[c])
    while pooled and sum(counts[c] for c in pooled) < needed:
        pooled.append(alone.pop(0))
    return [(c,) for c in sorted(alone)] + ([tuple(sorted(pooled))] if pooled else [])


def record(engine: Engine, groups: Sequence[Group], frr_budget: float) -> Calibration:
    """Return what the manifest keeps of a calibration."""
    return Calibration(
        engine=engine.name,
        dtype=engine.dtype,
        frr_budget=frr_budget,
        groups=[
            GroupRecord(
                classes=list(group.classes),
                texts=len(group.scores),
                threshold=group.threshold,
                rejected=int((group.scores >= group.threshold).sum()),
                frr_interval=clopper_pearson(
                    allowed_rejections(len(group.scores), frr_budget), len(group.scores)
                ),
            )
            for group in groups
        ],
    )


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact two-sided binomial interval (Clopper and Pearson 1934) of a rate.

    Raises:
        ValueError: not 0 <= successes <= n, or n is 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} of {n} is no rate")
    tail = (1 - level) / 2
    low = beta.ppf(tail, successes, n - successes + 1) if successes else 0.0
    high = beta.ppf(1 - tail, successes + 1, n - successes) if successes < n else 1.0
    return float(low), float(high)
