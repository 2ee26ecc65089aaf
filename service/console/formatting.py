"""How figures, times and texts are written on a page."""

import unicodedata
from datetime import UTC, datetime

from markupsafe import Markup, escape

UNSEEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Mn", "Me", "Zl", "Zp", "Zs"}
"""Categories of characters that cannot be seen, that turn others round, or stand on others."""
SIGNS = {" ": " ", "\n": "↵", "\t": "⇥"}
COMBINING = ("Mn", "Me")


def visible(text: str) -> Markup:
    """Return a text as HTML that shows each of its characters, and does nothing else."""
    return Markup("").join(_shown(text))


def _shown(text: str) -> list[Markup]:
    parts: list[Markup] = []
    plain: list[str] = []
    marks = 0
    for character in text:
        category = unicodedata.category(character)
        marks = marks + 1 if category in COMBINING else 0
        # Accents are letters' business; what piles up, or selects variants unseen, is not.
        seen = category not in UNSEEN or (0 < marks <= 2 and not _selects(character))
        sign = character if seen else SIGNS.get(character)
        if sign is not None:
            plain.append(sign)
            continue
        parts.append(escape("".join(plain)))
        plain = []
        name = unicodedata.name(character, "control character")
        code = f"U+{ord(character):04X}"
        parts.append(Markup('<span class="unseen" title="{}">{}</span>').format(name, code))
    return [*parts, escape("".join(plain))]


def _selects(character: str) -> bool:
    return "VARIATION SELECTOR" in unicodedata.name(character, "")


def percent(share: float) -> str:
    """Return a share in percent, small ones with more digits."""
    return f"{100 * share:.3g} %" if share < 0.01 else f"{share:.2%}".replace("%", " %")


def number(value: float) -> str:
    """Return a number with its thousands apart, and no more digits than it needs."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3g}"


def moment(time: datetime) -> str:
    """Return a time in UTC; every page says that it is."""
    return f"{time.astimezone(UTC):%d %b %Y %H:%M:%S}"
