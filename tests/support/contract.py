"""The contract over HTTP: tests that whatever answers in place of the application must pass too."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from tests.support import requests


def modules() -> list[ModuleType]:
    """Return the modules that have such tests; they are imported by name only here."""
    names = "test_api", "test_protocols"
    return [importlib.import_module(f"tests.http.{name}") for name in names]


def contract() -> dict[str, Any]:
    """Return the tests, by their names."""
    return {
        name: test
        for module in modules()
        for name, test in vars(module).items()
        if name.startswith("test_") and over_http(test)
    }


def over_http(test: object) -> bool:
    """Whether a test asks by HTTP only, and looks at nothing in the process that answers."""
    source = inspect.getsource(test) if inspect.isfunction(test) else ""
    return bool(re.search(r"\b(ask|client_of)\(", source)) and not re.search(
        r"FakeEngine|monkeypatch|caplog|request_ids", source
    )


@contextmanager
def asking(client_of: Callable[..., Any]) -> Iterator[None]:
    """Have the tests ask clients of another kind until the block ends."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (requests, *modules()):
            patch.setattr(module, "client_of", client_of)
        yield
