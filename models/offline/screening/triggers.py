"""Phrases that flagged texts share and other texts of the same traffic lack."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from scipy.stats import hypergeom
from sklearn.feature_extraction.text import CountVectorizer

MAX_TEXTS, MAX_CHARS = 20_000, 4_000
"""Number of flagged and of passed texts that are read, and of characters in each."""
MIN_TEXTS = 5
"""Flagged texts that a phrase must explain, unless 1 % of them is more."""
MAX_WORDS = 8
"""Words of a phrase."""
ALIKE = 0.95
"""A longer phrase replaces the best one if its excess is at least this share of the best excess."""
CHANCE = 1e-4
"""Tolerated probability that chance alone produces a phrase that is reported."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words that flagged texts contain far more often than others."""

    text: str
    explains: int
    """Flagged texts that contain it and none of the phrases found before."""
    flagged: int
    """Flagged texts that contain it."""
    passed: int
    """Passed texts that contain it."""
    lift: float
    """Its share of the flagged texts over its share of the passed ones, with add-one smoothing."""


def common_phrases(flagged: Sequence[str], passed: Sequence[str], most: int = 10) -> list[Phrase]:
    """Return phrases that explain the flagged texts, by greedy cover.

    Each phrase is the best explanation of the texts that the phrases before it leave. It is
    reported if chance would put it into as many flagged texts only with a probability of at most
    `CHANCE` (hypergeometric test, Bonferroni-corrected for all candidates).

    Args:
        flagged: texts that were flagged.
        passed: texts of the same traffic that passed.
        most: maximum number of phrases.
    """
    least = max(MIN_TEXTS, len(flagged) // 100)
    candidates = _count_candidates(flagged, passed, least) if len(flagged) >= least else None
    if candidates is None:
        return []
    found: list[Phrase] = []
    unexplained = np.ones(candidates.contained.shape[0], np.bool_)
    while len(found) < most and unexplained.sum() >= least:
        explains = _column_sums(candidates.contained[unexplained])
        best = _best(candidates, explains, int(unexplained.sum()))
        if best is None or explains[best] < least:
            break
        found.append(candidates.phrase(best, int(explains[best])))
        unexplained &= ~candidates.contained[:, best].toarray().ravel().astype(np.bool_)
    return found


@dataclass(frozen=True)
class _Candidates:
    """Phrases in at least a few flagged texts, and where they occur."""

    texts: Sequence[str]
    contained: Any
    """Whether each flagged text contains each phrase: a sparse matrix of 0 and 1."""
    in_passed: NDArray[np.int64]
    """Number of passed texts that contain each phrase."""
    passed: int
    """Number of passed texts."""

    def phrase(self, index: int, explains: int) -> Phrase:
        in_flagged, in_passed = self.contained[:, index].sum(), self.in_passed[index]
        share_of_flagged = (in_flagged + 1) / (self.contained.shape[0] + 1)
        share_of_passed = (in_passed + 1) / (self.passed + 1)
        return Phrase(
            text=str(self.texts[index]),
            explains=explains,
            flagged=int(in_flagged),
            passed=int(in_passed),
            lift=float(share_of_flagged / share_of_passed),
        )


def _count_candidates(
    flagged: Sequence[str], passed: Sequence[str], least: int
) -> _Candidates | None:
    """Return the phrases in at least `least` flagged texts; None if there are none."""
    options = {
        "token_pattern": r"\w+|[^\w\s]+", "ngram_range": (1, MAX_WORDS), "binary": True,
        "dtype": np.int32,
    }  # fmt: skip
    counter = CountVectorizer(min_df=least, **options)
    try:
        contained = counter.fit_transform(_cut(flagged))
    except ValueError:  # no phrase is in so many texts
        return None
    others = _cut(passed) or [""]
    in_passed = CountVectorizer(vocabulary=counter.vocabulary_, **options).transform(others)
    return _Candidates(
        counter.get_feature_names_out(), contained, _column_sums(in_passed), len(others)
    )


def _best(candidates: _Candidates, explains: NDArray[np.int64], unexplained: int) -> int | None:
    """Return the index of the phrase that explains most, or None if it may be chance.

    Args:
        candidates: all phrases.
        explains: number of unexplained texts that contain each phrase.
        unexplained: number of unexplained texts.
    """
    excess = explains - candidates.in_passed / candidates.passed * unexplained
    if excess.max() <= 0:
        return None
    alike = np.flatnonzero(excess >= ALIKE * excess.max())
    best = max(alike.tolist(), key=lambda i: (len(candidates.texts[i].split()), excess[i]))
    # Drawing `unexplained` texts from all: probability that as many of them contain the phrase.
    chance = hypergeom.sf(
        explains[best] - 1,
        candidates.passed + unexplained,
        candidates.in_passed[best] + explains[best],
        unexplained,
    )
    return best if chance * len(candidates.texts) <= CHANCE else None


def _column_sums(matrix: Any) -> NDArray[np.int64]:
    sums: NDArray[np.int64] = np.asarray(matrix.sum(0)).ravel()
    return sums


def _cut(texts: Sequence[str]) -> list[str]:
    return [text[:MAX_CHARS] for text in texts[:MAX_TEXTS]]


def phrase_table(phrases: Sequence[Phrase], triggered: int, unfamiliar: int, passed: int) -> Table:
    """Return a rich table of the phrases found in so many flagged and passed texts."""
    flagged = triggered + unfamiliar
    table = Table(
        title=f"{flagged} of {flagged + passed} texts are flagged ({triggered} triggered, "
        f"{unfamiliar} unfamiliar); what they have in common",
        caption=None if phrases else "nothing that the other texts have not",
    )
    for column in ("phrase", "explains", "in flagged", "in passed", "lift"):
        table.add_column(column, justify="left" if column == "phrase" else "right")
    for p in phrases:
        table.add_row(
            p.text, f"{p.explains} of {flagged}", str(p.flagged), str(p.passed), f"{p.lift:.0f}"
        )
    return table
