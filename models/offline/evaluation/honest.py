"""Honest traffic that is unlike the texts a screen was fitted on, made from clean texts.

None of it carries a trigger, so whatever the screen rejects of it is a false alarm. Every function
is pure: the same texts and seed give the same result.
"""

import random
from collections.abc import Callable, Sequence
from importlib import resources

from models.offline.fitting.unfamiliar import cut, fragment, joins

LETTER_ERRORS = 0.05
"""Share of letters with a typing error."""


def honest_sets(texts: Sequence[str], size: int, seed: int) -> dict[str, list[str]]:
    """Return honest texts of every kind by its name, distinct, and at most `size` of each.

    Args:
        texts: clean texts of the victim's own task.
        size: number of texts of each kind; there are fewer where there is no more material.
        seed: of everything random.
    """
    rng = random.Random(seed)
    shuffled = rng.sample(list(texts), len(texts))
    made = {
        "1-4 words": [cut(text, rng) for text in shuffled],
        "fragments": [fragment(text, rng) for text in shuffled],
        "joined texts": joins(shuffled, rng),
        "typing errors": [misspell(text, rng) for text in shuffled],
        "upper case": [text.upper() for text in shuffled],
        "other languages": rng.sample(other_languages(), len(other_languages())),
        "code and digits": code_and_digits(size, rng),
    }
    return {name: list(dict.fromkeys(found))[:size] for name, found in made.items()}


def misspell(text: str, rng: random.Random, rate: float = LETTER_ERRORS) -> str:
    """Return a text with typing errors: letters are swapped with the next one, dropped or doubled.

    Args:
        text: what is to be typed.
        rng: source of the errors.
        rate: share of letters with an error; there is at least one error where there is a letter.
    """
    letters = [at for at, character in enumerate(text) if character.isalpha()]
    wrong = set(rng.sample(letters, min(len(letters), max(1, round(rate * len(letters))))))
    typed, at = "", 0
    while at < len(text):
        one, two = text[at], text[at : at + 2]
        # Swapping two equal letters would be no error.
        kinds = ["drop", "double"] + ["swap"] * (two.isalpha() and len(set(two)) == 2)
        kind = rng.choice(kinds) if at in wrong else "none"
        typed += {"none": one, "drop": "", "double": one * 2, "swap": two[::-1]}[kind]
        at += 2 if kind == "swap" else 1
    return typed if typed.strip() else text * 2  # the only letter was dropped


def other_languages() -> list[str]:
    """Return everyday sentences in German, French and Spanish."""
    content = (resources.files(__package__) / "languages.txt").read_text(encoding="utf-8")
    return [line.partition("\t")[2] for line in content.splitlines()]


def code_and_digits(n: int, rng: random.Random) -> list[str]:
    """Return n distinct texts that are no prose: lines of code, numbers, addresses, identifiers."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[rng.choice(_NO_PROSE)(rng)] = None
    return list(found)


NAMES = "count total user order item price index buffer node result path score offset".split()
VERBS = "get set load parse update remove find merge check send".split()
TYPES = "int float str bool bytes".split()
HEX = "0123456789abcdef"


def _number(rng: random.Random) -> str:
    return str(rng.randint(0, 10 ** rng.randint(1, 9)))


def _digits(rng: random.Random, groups: Sequence[int], separator: str) -> str:
    return separator.join(str(rng.randrange(10**n)).zfill(n) for n in groups)


def _numbers(rng: random.Random) -> str:
    return rng.choice([" ", ", ", "; "]).join(_number(rng) for _ in range(rng.randint(1, 8)))


def _identifier(rng: random.Random) -> str:
    return rng.choice(
        [
            "+" + _digits(rng, (2, 3, 3, 4), " "),
            _digits(rng, (4, 2, 2), "-"),
            ".".join(str(rng.randrange(256)) for _ in range(4)),
            "".join(rng.choices(HEX, k=rng.choice([8, 32, 40]))),
            f"ORD-{_digits(rng, (6,), '')}/{rng.choice('ABCDEF')}",
            f"v{rng.randrange(9)}.{rng.randrange(30)}.{rng.randrange(12)}",
            f"{rng.randint(1, 9999)}.{_digits(rng, (2,), '')} EUR",
        ]
    )


def _python(rng: random.Random) -> str:
    verb, name, other = rng.choice(VERBS), *rng.sample(NAMES, 2)
    return rng.choice(
        [
            f"def {verb}_{name}({other}: {rng.choice(TYPES)}) -> None:",
            f"{name} = [{other}.{verb}() for {other} in self.{name}s if {other} > {_number(rng)}]",
            f"for {name} in range({_number(rng)}): {other} += {name}",
            f"return {verb}_{name}({other}={_number(rng)})",
            f'raise ValueError(f"{name} {{{other}}}")',
        ]
    )


def _other_code(rng: random.Random) -> str:
    verb, name, other = rng.choice(VERBS), *rng.sample(NAMES, 2)
    return rng.choice(
        [
            f"SELECT {name}, {other} FROM {other}s WHERE {name} >= {_number(rng)} LIMIT 10;",  # noqa: S608 - never run
            f'{{"{name}": {_number(rng)}, "{other}": null, "{verb}": [true, false]}}',
            f"if ({name} != NULL) {{ {verb}_{other}(&{name}, {_number(rng)}); }}",
            f'<div class="{name}"><a href="/{verb}?{other}={_number(rng)}">#</a></div>',
            f"curl -s localhost:{_digits(rng, (4,), '')}/{verb}/{name} | grep {other}",
            f"git {verb} --{name} {''.join(rng.choices(HEX, k=7))} && make {other}",
            f"const {name} = await {verb}({other}, {{ timeout: {_number(rng)} }});",
        ]
    )


_NO_PROSE: tuple[Callable[[random.Random], str], ...] = (
    _numbers,
    _identifier,
    _python,
    _other_code,
)
