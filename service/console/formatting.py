"""How numbers, times and texts are written on a page."""

import unicodedata
from datetime import UTC, datetime

from markupsafe import Markup, escape

INVISIBLE = {"Cc", "Cf", "Cn", "Co", "Cs", "Mn", "Me", "Zl", "Zp", "Zs"}
"""Categories of characters that are invisible, change the direction of others, or combine."""
SYMBOLS = {" ": " ", "\n": "↵", "\t": "⇥"}
COMBINING = ("Mn", "Me")


def visible(text: str) -> Markup:
    """Return a text as HTML that makes every character visible and none active."""
    return Markup("").join(_parts(text))


def _parts(text: str) -> list[Markup]:
    parts: list[Markup] = []
    plain: list[str] = []
    marks = 0
    for character in text:
        category = unicodedata.category(character)
        marks = marks + 1 if category in COMBINING else 0
        # One or two accents are normal; stacks of them and variation selectors hide content.
        seen = category not in INVISIBLE or (
            0 < marks <= 2 and not _is_variation_selector(character)
        )
        symbol = character if seen else SYMBOLS.get(character)
        if symbol is not None:
            plain.append(symbol)
            continue
        parts.append(escape("".join(plain)))
        plain = []
        name = unicodedata.name(character, "control character")
        code = f"U+{ord(character):04X}"
        parts.append(Markup('<span class="unseen" title="{}">{}</span>').format(name, code))
    return [*parts, escape("".join(plain))]


def _is_variation_selector(character: str) -> bool:
    return "VARIATION SELECTOR" in unicodedata.name(character, "")


def percent(share: float) -> str:
    """Return a share in percent; small ones get more digits."""
    return f"{100 * share:.3g} %" if share < 0.01 else f"{share:.2%}".replace("%", " %")


def number(value: float) -> str:
    """Return a number with thousands separators, and no more digits than needed."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3g}"


def count(value: float) -> str:
    """Return a number of inputs, which may be an estimate, with thousands separators."""
    return f"{value:,.0f}"


def moment(time: datetime) -> str:
    """Return a time in UTC, which every page states."""
    return f"{time.astimezone(UTC):%d %b %Y %H:%M:%S}"
