"""The threshold of baselines: the same conformal rule as for PSIM, and what it rejects."""

import numpy as np

from models.detection.conformal import conformal_threshold, min_calibration_size
from models.detection.screen import FloatArray
from models.errors import CalibrationError
from models.offline.evaluation.metrics import Classes, DefendedPredictions


def require_enough(count: int, frr_budget: float) -> None:
    """Check that there are enough clean texts for a threshold.

    Raises:
        CalibrationError: there are too few for the budget.
    """
    if count < (needed := min_calibration_size(frr_budget)):
        raise CalibrationError(
            f"{count} clean texts are too few for a false-rejection budget of {frr_budget}: "
            f"it needs {needed}; give more clean texts or a larger budget"
        )


def threshold_of(scores: FloatArray, frr_budget: float) -> float:
    """Return the score from which texts are rejected, by the scores of clean texts, shape (n,).

    Raises:
        CalibrationError: there are too few for the budget.
    """
    require_enough(len(scores), frr_budget)
    return conformal_threshold(scores, frr_budget)


def rejecting(predicted: Classes, scores: FloatArray, threshold: float) -> DefendedPredictions:
    """Return what a classifier says of texts, those rejected whose score reaches the threshold."""
    return DefendedPredictions(predicted, scores >= np.float32(threshold), scores)
