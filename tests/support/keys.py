"""A gateway that wants keys, and a key of each kind."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from service.security.keys.file import Scope, hash_of
from tests.support.requests import CLEAN, client_of

KEY = {scope: f"psim_{scope}-" + "x" * 40 for scope in Scope}
"""A key for each scope."""
FEW, BLIND = "psim_few-" + "y" * 40, "psim_blind-" + "z" * 40
"""A key for ten inputs a day, and one that is told decisions only."""


def keys_file(folder: Path) -> Path:
    """Write a file of keys that has them all."""
    entries = [f'[keys.{s}]\nsha256 = "{hash_of(key)}"\nscopes = ["{s}"]' for s, key in KEY.items()]
    entries += [
        f'[keys.few]\nsha256 = "{hash_of(FEW)}"\nscopes = ["classify"]\nrate = "10/day"',
        f'[keys.blind]\nsha256 = "{hash_of(BLIND)}"\nscopes = ["classify"]\nscores = false',
    ]
    path = folder / "keys.toml"
    path.write_text("\n".join(entries))
    return path


def bearer(key: str) -> dict[str, str]:
    """Return the header that shows a key."""
    return {"authorization": f"Bearer {key}"}


@asynccontextmanager
async def guarded(folder: Path, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of a gateway that wants keys."""
    async with client_of(keys=keys_file(folder), admin=True, **changes) as client:
        yield client


async def classify(client: httpx.AsyncClient, texts: int, key: str = FEW) -> httpx.Response:
    """Ask for some texts with a key."""
    return await client.post("/classify", json={"inputs": [CLEAN] * texts}, headers=bearer(key))
