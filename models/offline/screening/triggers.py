"""What the flagged texts of some traffic have in common that the others have not."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from scipy.stats import hypergeom
from sklearn.feature_extraction.text import CountVectorizer

MOST_TEXTS, MOST_CHARS = 20_000, 4_000
"""Texts of either kind that are looked at, and characters of each."""
LEAST = 5
"""Flagged texts that a phrase must explain, or 1 % of them."""
LONGEST = 8
"""Words of a phrase."""
ALIKE = 0.95
"""A longer phrase stands for its parts if it is in so many of the texts that they are in."""
CHANCE = 1e-4
"""How likely it may be that all phrases found are the work of chance."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words that flagged texts hold far more often than others."""

    text: str
    explains: int
    """Flagged texts that hold it, and no phrase that was found before."""
    flagged: int
    """All flagged texts that hold it."""
    passed: int
    """Texts that passed and hold it."""
    lift: float
    """Share of the flagged texts over share of the passed ones, each with one text more."""


def common_phrases(flagged: Sequence[str], passed: Sequence[str], most: int = 10) -> list[Phrase]:
    """Return phrases that explain flagged texts, by greedy cover: the next explains what is left.

    A phrase is reported if so many flagged texts would hold it by chance only with a probability
    under `CHANCE`, over all candidates (hypergeometric test, Bonferroni).

    Args:
        flagged: texts that were flagged.
        passed: texts of the same traffic that were not.
        most: phrases at most.
    """
    least = max(LEAST, len(flagged) // 100)
    if len(flagged) < least:
        return []
    options = {
        "token_pattern": r"\w+|[^\w\s]+", "ngram_range": (1, LONGEST), "binary": True,
        "dtype": np.int32,
    }  # fmt: skip
    counter = CountVectorizer(min_df=least, **options)
    try:
        holds = counter.fit_transform(_cut(flagged))
    except ValueError:  # no phrase is in so many of the texts
        return []
    names = counter.get_feature_names_out()
    others = CountVectorizer(vocabulary=counter.vocabulary_, **options)
    rest = _cut(passed) or [""]
    in_passed = np.asarray(others.transform(rest).sum(0)).ravel()
    words = np.array([len(name.split()) for name in names])
    in_flagged = np.asarray(holds.sum(0)).ravel()
    found: list[Phrase] = []
    left = np.ones(holds.shape[0], np.bool_)
    while len(found) < most and left.sum() >= least:
        explains: NDArray[np.int64] = np.asarray(holds[left].sum(0)).ravel()
        excess = explains - in_passed / len(rest) * left.sum()
        if excess.max() <= 0:
            break
        alike = np.flatnonzero(excess >= ALIKE * excess.max())
        best = max(alike, key=lambda i: (words[i], excess[i]))
        # Of all texts, that so many of those that hold it are among the flagged.
        chance = hypergeom.sf(
            explains[best] - 1,
            len(rest) + left.sum(),
            in_passed[best] + explains[best],
            left.sum(),
        )
        if explains[best] < least or chance * len(names) > CHANCE:
            break
        of_flagged = (in_flagged[best] + 1) / (len(left) + 1)
        of_passed = (in_passed[best] + 1) / (len(rest) + 1)
        found.append(
            Phrase(
                text=str(names[best]),
                explains=int(explains[best]),
                flagged=int(in_flagged[best]),
                passed=int(in_passed[best]),
                lift=float(of_flagged / of_passed),
            )
        )
        left &= ~np.asarray(holds[:, best].toarray(), np.bool_).ravel()
    return found


def _cut(texts: Sequence[str]) -> list[str]:
    return [text[:MOST_CHARS] for text in texts[:MOST_TEXTS]]


def phrase_table(phrases: Sequence[Phrase], flagged: int, passed: int) -> Table:
    """Return a rich table of what was found in so many texts."""
    table = Table(
        title=f"{flagged} of {flagged + passed} texts are flagged; what they have in common",
        caption=None if phrases else "nothing that the other texts have not",
    )
    for column in ("phrase", "explains", "in flagged", "in passed", "lift"):
        table.add_column(column, justify="left" if column == "phrase" else "right")
    for p in phrases:
        table.add_row(
            p.text, f"{p.explains} of {flagged}", str(p.flagged), str(p.passed), f"{p.lift:.0f}"
        )
    return table
