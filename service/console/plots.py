"""Plots as numbers: positions of bars, lines and labels, in percent of the drawing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from service.audit.statistics import CONFIDENCES, TENTHS, ScoreGroup, Slot
from service.console.formatting import count


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar; `kind` is its CSS class, `title` its tooltip."""

    x: float
    width: float
    y: float
    height: float
    kind: str
    title: str
    tenth: int | None = None
    """Its score, in tenths of the threshold."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A label at an axis."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawing."""

    bars: Sequence[Bar]
    ys: Sequence[Tick] = ()
    xs: Sequence[Tick] = ()
    threshold: float | None = None
    """Position of the threshold, from the left."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Bars on top of each other, on a logarithmic scale."""

    parts: Sequence[tuple[str, float]]
    """Kind and count of each bar, from the bottom."""
    title: str
    tenth: int | None = None


def rate_plot(slots: Sequence[Slot], width: timedelta) -> Plot:
    """Return a plot of the flagged share over time."""
    top = _ceiling(max((slot.rate or 0 for slot in slots), default=0))
    bars = [
        _bar(number, len(slots), slot.rate / top, "flagged", _title(slot))
        for number, slot in enumerate(slots)
        if slot.rate is not None
    ]
    ys = [Tick(100 * (1 - part), f"{100 * top * part:.4g} %") for part in (0, 0.5, 1)]
    return Plot(bars, ys, _times(slots, width))


def volume_plot(slots: Sequence[Slot], width: timedelta) -> Plot:
    """Return a plot of the number of inputs over time."""
    top = max([slot.inputs for slot in slots] + [1])
    bars = [
        _bar(number, len(slots), slot.inputs / top, "passed", _title(slot))
        for number, slot in enumerate(slots)
    ]
    return Plot(bars, [Tick(100, "0"), Tick(0, count(top))], _times(slots, width))


def score_plot(group: ScoreGroup, highest: float) -> Plot:
    """Return a histogram of scores, against their threshold.

    Args:
        group: the inputs.
        highest: inputs in the highest bar of all plots that share the scale.
    """
    stacks = []
    for tenth, tally in enumerate(group.tenths):
        low, high = (group.threshold * end / 10 for end in (tenth, tenth + 1))
        scores = f"{low:.2f} to {high:.2f}" if tenth < TENTHS else f"{low:.2f} and more"
        kind = "flagged" if tenth >= 10 else "passed"
        stacks.append(
            Stack([(kind, tally.inputs)], f"score {scores}: {count(tally.inputs)}", tenth)
        )
    xs = [Tick(0, "0")]
    xs += [
        Tick(_place(10 * times), f"{times * group.threshold:.2f}{'+' if times == 3 else ''}")
        for times in (1, 2, 3)
    ]
    return Plot(*_stacked(stacks, highest), xs, _place(10))


def confidence_plot(counts: Sequence[tuple[float, float]]) -> Plot:
    """Return a histogram of confidences, for passed and flagged inputs."""
    lows = ("0", *map(str, CONFIDENCES[:-1]))
    stacks = [
        Stack(
            [("passed", passed), ("flagged", flagged)],
            f"confidence over {low} to {high}: {count(passed)} passed, {count(flagged)} flagged",
        )
        for low, high, (passed, flagged) in zip(lows, CONFIDENCES, counts, strict=True)
    ]
    xs = [
        Tick(100 * (number + 1) / len(CONFIDENCES), f"{edge:g}")
        for number, edge in enumerate(CONFIDENCES)
        if number % 2 == 0
    ]
    return Plot(*_stacked(stacks, max(map(sum, counts))), xs)


def _stacked(stacks: Sequence[Stack], highest: float) -> tuple[list[Bar], list[Tick]]:
    """Return bars whose height is the logarithm of their count, and the labels of the y axis."""
    decades = math.log10(1 + max(highest, 9))
    bars = []
    for number, stack in enumerate(stacks):
        under = 0.0
        for kind, inputs in stack.parts:
            low, high = (math.log10(1 + n) / decades for n in (under, under + inputs))
            if inputs:
                bars.append(
                    _bar(number, len(stacks), high - low, kind, stack.title, stack.tenth, low)
                )
            under += inputs
    powers = [10**n for n in range(math.floor(decades) + 1)]
    ys = [Tick(100 * (1 - math.log10(1 + n) / decades), f"{n:,}") for n in powers if n <= highest]
    return bars, [Tick(100, "0"), *ys]


def _bar(
    number: int,
    total: int,
    height: float,
    kind: str,
    title: str,
    tenth: int | None = None,
    under: float = 0,
) -> Bar:
    gap = 0.15
    return Bar(
        x=100 * (number + gap / 2) / total,
        width=100 * (1 - gap) / total,
        y=100 * (1 - under - height),
        height=100 * height,
        kind=kind,
        title=title,
        tenth=tenth,
    )


def _place(tenth: int) -> float:
    return 100 * tenth / (TENTHS + 1)


def _ceiling(share: float) -> float:
    """Return the smallest round number that is at least `share`."""
    if share <= 0:
        return 0.01
    power: float = 10.0 ** math.floor(math.log10(share))
    return min([step * power for step in (1, 2, 5, 10) if step * power >= share] + [1.0])


def _title(slot: Slot) -> str:
    rate = "" if slot.rate is None else f" ({slot.rate:.2%})"
    found = f"{count(slot.triggered)} triggered and {count(slot.unfamiliar)} unfamiliar"
    return f"{slot.start:%d %b %H:%M} UTC: {found} of {count(slot.inputs)}{rate}"


def _times(slots: Sequence[Slot], width: timedelta) -> list[Tick]:
    long = len(slots) * width > timedelta(days=2)
    chosen = range(0, len(slots), max(1, len(slots) // 4))
    return [
        Tick(100 * number / len(slots), f"{slots[number].start:{'%d %b' if long else '%H:%M'}}")
        for number in chosen
    ]
