"""An interrupted scan goes on where it was, and gives the same report."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from models.errors import DataError
from models.offline.scanning.report import read_report
from models.offline.scanning.state import ScanState, state_file
from tests.support.commands import psim
from tests.support.few_words import STEPS, read_few_words
from tests.support.paths import ROOT

NUMBER = TypeAdapter(float)


def content(out: Path) -> dict[str, Any]:
    """Return all of a report but for its times."""
    report = read_report(out).model_dump(mode="json")
    del report["created"], report["search"]["seconds"]
    return report


def test_a_killed_scan_goes_on_and_its_report_is_the_same(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_few_words(monkeypatch)
    out, whole = tmp_path / "scan.json", tmp_path / "whole.json"
    options = ["--victim", demo_folder / "victim", "--texts", demo_folder / "clean.jsonl", "--out"]
    command = [sys.executable, "-m", "tests.support.few_words", "scan", *map(str, [*options, out])]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    assert state_file(out).exists()
    continued = psim("scan", *options, out)
    assert continued.exit_code == 0, continued.output
    assert f"after {STEPS} steps" in " ".join(continued.stderr.split())
    assert not state_file(out).exists()
    assert "going on" not in psim("scan", *options, whole).stderr
    assert content(out) == content(whole)


def test_steps_are_remembered_for_the_same_scan_only(tmp_path: Path) -> None:
    file = tmp_path / "scan.json.state"
    first = ScanState(file, "one victim")
    assert first.step("a", NUMBER, lambda: 0.1) == 0.1
    with file.open("a") as torn:
        torn.write('{"step": "b", "res')
    again = ScanState(file, "one victim")
    assert again.step("a", NUMBER, lambda: 0.2) == 0.1
    assert again.step("b", NUMBER, lambda: 0.3) == 0.3
    assert ScanState(file, "one victim").steps == 2
    other = ScanState(file, "another victim")
    assert other.steps == 0
    assert other.step("a", NUMBER, lambda: 0.4) == 0.4
    other.forget()
    assert not file.exists()


def test_time_that_was_spent_before_an_interruption_counts(tmp_path: Path) -> None:
    file = tmp_path / "scan.json.state"
    ScanState(file, "one victim").step("a", NUMBER, lambda: 0.1)
    header, step = file.read_text().splitlines()
    file.write_text(f"{header}\n{json.dumps(json.loads(step) | {'seconds': 600})}\n")
    again = ScanState(file, "one victim")
    assert time.monotonic() - again.started >= 600


def test_a_report_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written: No such file or directory; choose"):
        ScanState(state_file(tmp_path / "missing" / "scan.json"), "one victim")
