"""Settings: a mistyped variable must not be ignored, and threads follow the container."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import PsimError
from service.lifecycle.models_file import settings_by_model
from service.settings import (
    OTHER_VERSIONS,
    Settings,
    ignored_variables,
    load_settings,
    unknown_variables,
    usable_cpus,
)


def test_a_mistyped_variable_is_named_with_what_was_meant() -> None:
    complaints = unknown_variables(["PSIM_MODE", "PSIM_MOED", "PATH"])
    assert complaints == ["PSIM_MOED is not a setting; did you mean PSIM_MODE?"]


@pytest.mark.parametrize(("old", "new"), OTHER_VERSIONS.items())
def test_a_name_of_a_past_version_leads_to_the_one_that_replaces_it(old: str, new: str) -> None:
    assert ignored_variables([old]) == [
        f"{old} is not a setting of this version, which ignores it: set {new}"
    ]
    assert unknown_variables([new]) == []


def test_names_of_other_versions_are_ignored_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OTHER_VERSIONS, "PSIM_TENANTS", None)
    for name, value in {"PSIM_BUNDLE": "/b", "PSIM_TENANTS": "x", "psim_candidate": "/c"}.items():
        monkeypatch.setenv(name, value)
    assert load_settings().challenger is None
    assert ignored_variables(os.environ) == [
        "PSIM_TENANTS is not a setting of this version, which ignores it: a newer one has it",
        "psim_candidate is not a setting of this version, which ignores it: set PSIM_CHALLENGER",
    ]
    monkeypatch.setenv("PSIM_CANDIDATES", "/c")
    with pytest.raises(PsimError, match=r"^PSIM_CANDIDATES is not a setting; did you mean PSIM_CH"):
        load_settings()


def test_every_setting_is_known() -> None:
    assert not unknown_variables(f"PSIM_{name.upper()}" for name in Settings.model_fields)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("max 100000", None), ("150000 100000", 2), ("50000 100000", 1), ("nonsense", None)],
)
def test_threads_follow_the_cgroup_quota(
    tmp_path: Path, content: str, expected: int | None
) -> None:
    (tmp_path / "cpu.max").write_text(content)
    cpus = len(os.sched_getaffinity(0))
    assert usable_cpus(tmp_path / "cpu.max") == (cpus if expected is None else min(cpus, expected))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "PSIM_BUNDLE"),
        ({"PSIM_MODELS": "/nowhere", "PSIM_BUNDLE": "/bundle"}, "/nowhere: No such file"),
        ({"PSIM_MODELS": "/nowhere", "PSIM_MODEL": "x"}, "PSIM_MODEL is the name of one model"),
        ({"PSIM_BUNDLE": "/nowhere", "PSIM_FAILOPEN": "1"}, "did you mean PSIM_FAIL_OPEN"),
    ],
)
def test_bad_settings_are_named(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PSIM_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PsimError, match=message):
        settings_by_model(load_settings())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PSIM_BUNDLE": "/nowhere", "PSIM_MODE": "lenient"}, "PSIM_MODE"),
        ({"PSIM_BUNDLE": "/nowhere"}, "/nowhere is not a bundle"),
    ],
    ids=["the settings themselves", "what they name"],
)
def test_bad_settings_are_one_clear_line_and_exit_code_2(
    environment: dict[str, str], message: str
) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PSIM_")}
    done = subprocess.run(
        [sys.executable, "-m", "service"], env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_process_warns_once_of_a_name_of_another_version_and_goes_on() -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PSIM_")}
    settings = {"PSIM_BUNDLE": "/nowhere", "PSIM_CANDIDATE": "/secret"}
    done = subprocess.run(
        [sys.executable, "-m", "service"], env=clean | settings, capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert output.count("PSIM_CANDIDATE is not a setting of this version") == 1
    assert "secret" not in output
    assert "error: /nowhere is not a bundle" in output
