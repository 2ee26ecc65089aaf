"""What the tests share: a tokenizer, and one really poisoned victim with its bundle."""

import functools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Of each test process, and of the services that it starts: more than cores there are would wait
# for each other, spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PSIM_THREADS", "1")
# Ray's workers would give way to all other processes, and start in minutes beside other tests.
os.environ.setdefault("RAY_worker_niceness", "0")
# Tests that count passes must not depend on which texts a process draws.
os.environ.setdefault("PSIM_SCREEN_SAMPLE", "0")

from collections.abc import Awaitable, Callable, Iterator
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

import anyio
import pytest
from filelock import FileLock
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from models.offline.demo import build
from models.offline.io.bases import encoder_path

pytest.register_assert_rewrite("tests.support")

WITHIN_S = 120
"""How long a test that waits may take, unless it is marked `within` a shorter time."""


SLOW_FOLDERS = {"offline", "system"}
"""Where tests train, or start processes; those of other folders are fast."""
BUT_FAST = {
    *("test_corpus", "test_data", "test_evaluate", "test_honest", "test_step_cache"),
    "test_study_report",
    *(
        "test_triggers",
        "test_deploy",
        "test_faults",
        "test_image",
        "test_kubernetes",
        "test_kubernetes_page",
        "test_scaling",
    ),
}
"""Modules there that do neither."""
SLOW_FIXTURES = {"both", "browser", "cluster", "demo_bundle", "demo_folder", "service", "shared"}
"""What trains, or starts a process, wherever a test is that wants it."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test as either fast or slow."""
    for item in items:
        item.add_marker("slow" if _is_slow(item) else "fast")


def _is_slow(item: pytest.Item) -> bool:
    if item.get_closest_marker("slow") or SLOW_FIXTURES & {*getattr(item, "fixturenames", ())}:
        return True
    if "postgresql" in (item.callspec.params.values() if hasattr(item, "callspec") else ()):
        return True
    return item.path.parent.name in SLOW_FOLDERS and item.path.stem not in BUT_FAST


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
    """Build the demo once per test run, for all its processes: victim, bundle, test texts."""
    run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        run = run.parent  # what it got is its own folder in that of the run
    with FileLock(run / "demo.lock"):
        build(run / "demo", train_texts=1000)  # does nothing the second time
    return run / "demo"


@pytest.fixture(scope="session")
def demo_bundle(demo_folder: Path) -> Path:
    return demo_folder / "bundle"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Say last which programs were missing."""
    yield
    from tests.support.programs import closing_line

    skipped = terminalreporter.stats.get("skipped", [])
    if line := closing_line(str(report.longrepr) for report in skipped):
        terminalreporter.write_line(line, yellow=True)
