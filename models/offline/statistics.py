"""Statistics that several parts of the offline half share."""

from scipy.stats import binomtest


def clopper_pearson(successes: int, n: int) -> tuple[float, float]:
    """Return the exact 95 % interval (Clopper and Pearson 1934) of a binomial rate.

    Raises:
        ValueError: not 0 <= successes <= n, or n is 0.
    """
    interval = binomtest(successes, n).proportion_ci(method="exact")
    return float(interval.low), float(interval.high)
