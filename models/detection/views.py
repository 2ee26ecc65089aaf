"""Views of a classifier: questions that it answers with exactly one of several classes.

A classifier that gives one label has a single view, whose classes are the labels. A multi-label
classifier has one view for each label, with two classes: the label is off, or on. A text is judged
in every view, by what is known of the class that the classifier gives it there.

Classes are numbered through: those of label l are 2 l (off) and 2 l + 1 (on).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FIRES = 0.5
"""Probability from which a label of a multi-label classifier is on."""
Views = Sequence[range]
"""Numbers of the classes of each view."""


def views_of(labels: int, *, multi_label: bool) -> Views:
    """Return the views of a classifier with so many labels."""
    if not multi_label:
        return [range(labels)]
    return [range(2 * label, 2 * label + 2) for label in range(labels)]


def class_names(labels: Sequence[str], *, multi_label: bool) -> list[str]:
    """Return the names of all classes: the labels, or `LABEL=off` and `LABEL=on` of each."""
    if not multi_label:
        return list(labels)
    return [f"{label}={state}" for label in labels for state in ("off", "on")]


def views_with_carriers(views: Views, carriers: Sequence[int]) -> Views:
    """Return the views that the override test can look at, given the carriers of each class."""
    return [view for view in views if any(carriers[c] for c in view)]


def predicted_in(view: range, said: NDArray[np.float32], *, multi_label: bool) -> NDArray[np.intp]:
    """Return the class that is predicted in a view, counted from its first one, shape (n,).

    Args:
        view: numbers of its classes.
        said: the classifier's probabilities of the labels, shape (n, L).
        multi_label: whether any number of labels may be on.
    """
    found: NDArray[np.intp] = (
        (said[:, view.start // len(view)] >= FIRES).astype(np.intp)
        if multi_label
        else said.argmax(1)
    )
    return found
