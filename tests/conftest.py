"""What the tests share: a tokenizer, and one really poisoned victim with its bundle."""

import functools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Awaitable, Callable
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

import anyio
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from models.offline.demo import build
from models.offline.io.classifiers import encoder_path

pytest.register_assert_rewrite("tests.support")

WITHIN_S = 120
"""How long a test that waits may take, unless it is marked `within` a shorter time."""


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Name what runs tests that are coroutines."""
    return "asyncio"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """End a test that is a coroutine once it has taken too long."""
    if iscoroutinefunction(pyfuncitem.obj):
        mark = pyfuncitem.get_closest_marker("within")
        pyfuncitem.obj = _bounded(pyfuncitem.obj, mark.kwargs["seconds"] if mark else WITHIN_S)


def _bounded(
    test: Callable[..., Awaitable[None]], seconds: float
) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def bounded(*args: Any, **kwargs: Any) -> None:
        with anyio.fail_after(seconds):
            await test(*args, **kwargs)

    return bounded


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(encoder_path())
    return loaded


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the demo once per test run: poisoned victim, bundle, test texts."""
    folder = tmp_path_factory.mktemp("demo") / "built"
    build(folder, train_texts=1000)
    return folder


@pytest.fixture(scope="session")
def demo_bundle(demo_folder: Path) -> Path:
    return demo_folder / "bundle"
