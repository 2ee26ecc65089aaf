"""Changing JSON where it is JSON: to bytes alone, most changes would only make it malformed."""

import json
import random
from typing import Any

import atheris

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 10**12, 10**400, 1e308, 0.5),
    *("", " ", "hunter2", "\ud800", "\0", "\u202e", "../../x", "a" * 300),
    *([], {}, [[]], [None], {"": 0}),
]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change a value, a key or the length of a list in the JSON behind the first byte, or bytes."""
    rng = random.Random(seed)
    try:
        value = json.loads(data[1:])
    except (ValueError, RecursionError):
        value = None
    if value is None or rng.random() < 0.4:
        return bytes(atheris.Mutate(data, max_size))
    changed = json.dumps(_changed(value, rng)).encode()
    return (data[:1] + changed)[:max_size]


def _changed(value: Any, rng: random.Random) -> Any:
    inside = isinstance(value, dict | list) and value and rng.random() < 0.8
    if not inside:
        return rng.choice([*ODD, [value], {"inputs": value}])
    if isinstance(value, list):
        place = rng.randrange(len(value))
        first, one, rest = value[:place], value[place], value[place + 1 :]
        return rng.choice([[*first, _changed(one, rng), *rest], [*first, *rest], [*value, one]])
    key = rng.choice([*value])
    others = {k: v for k, v in value.items() if k != key}
    word = rng.choice([o for o in [*ODD, *value] if isinstance(o, str)])
    more = [others, {**others, word: value[key]}, {**value, word: rng.choice(ODD)}]
    return rng.choice([{**value, key: _changed(value[key], rng)}, *more])
