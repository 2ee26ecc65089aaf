"""A release, made in a copy of the project: all of it, or nothing."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.support.paths import ROOT

VERSION = "99.0.0"
NOBODY = {
    f"GIT_{who}_{what}": "nobody@example.org"
    for who in ("AUTHOR", "COMMITTER")
    for what in ("NAME", "EMAIL")
}
ALONE = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
IGNORED = shutil.ignore_patterns(
    ".git", ".venv", ".demo", ".*_cache", ".hypothesis", "build", "dist", "my-keys"
)


def run(folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    outer = {n: v for n, v in os.environ.items() if not n.startswith(("GIT_", "MAKE", "MFLAGS"))}
    environment = outer | NOBODY | ALONE
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def git(folder: Path, *arguments: str) -> str:
    done = run(folder, "git", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "A change")


def edit(folder: Path, name: str, pattern: str, by: str) -> None:
    file = folder / name
    text, times = re.subn(pattern, by, file.read_text(), count=1, flags=re.M)
    assert times == 1, name
    file.write_text(text)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project with a remote and something to release."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT, folder, ignore=IGNORED)
    git(tmp_path, "init", "--quiet", "--bare", "remote")
    git(folder, "init", "--quiet")
    git(folder, "remote", "add", "origin", str(tmp_path / "remote"))
    edit(folder, "CHANGELOG.md", r"^## .*unreleased$", "## Unreleased\n\n- A change.\n")
    commit(folder)
    return folder


def release(folder: Path, version: str = VERSION) -> "subprocess.CompletedProcess[str]":
    """Run the command, with the environment that is there."""
    ready = f"{sys.prefix}/.ready"
    make = ("make", "--silent", f"--old-file={ready}", f"VENV={sys.prefix}", "release")
    return run(folder, *make, f"VERSION={version}")


def test_one_command_makes_a_release_and_pushes_nothing(project: Path) -> None:
    before = re.search(r'^version = "(.*)"$', (project / "pyproject.toml").read_text(), re.M)
    assert before
    done = release(project)
    assert done.returncode == 0, done.stderr
    assert git(project, "status", "--porcelain") == ""
    assert git(project, "cat-file", "-t", f"v{VERSION}") == "tag"
    assert git(project, "rev-parse", f"v{VERSION}^{{}}") == git(project, "rev-parse", "HEAD")
    assert git(project, "ls-remote", "origin") == ""
    assert (
        f"## Unreleased\n\n## {VERSION} - {datetime.now(UTC).date()}\n\n- A change.\n"
        in (project / "CHANGELOG.md").read_text()
    )
    table = (project / "docs/upgrading.md").read_text()
    assert re.search(rf"^\| unreleased (\|.*\|.*\|) - \| - \|\n\| {VERSION} \1 ", table, re.M)
    wheel = f"dist/psim_gateway-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(project / wheel) as archive:
        metadata = archive.read(f"psim_gateway-{VERSION}.dist-info/METADATA").decode()
        assert "service/audit/migrations/env.py" in archive.namelist()
    assert f"\nVersion: {VERSION}\n" in metadata
    with tarfile.open(project / f"dist/psim_gateway-{VERSION}.tar.gz") as archive:
        changes = archive.extractfile(f"psim_gateway-{VERSION}/CHANGELOG.md")
        assert changes and f"## {VERSION} - " in changes.read().decode()
    named = "psim-[a-z]*[:-]|newTag: |--version |^version: |^appVersion: "
    left = run(project, "git", "grep", "-E", f"({named}){re.escape(before[1])}").stdout
    assert left == ""
    chart = (project / "deploy/helm/psim-gateway/Chart.yaml").read_text()
    assert f"\nversion: {VERSION}\nappVersion: {VERSION}\n" in chart
    assert f"psim-gateway:{VERSION}" in (project / "docker-compose.yml").read_text()
    assert f'image.version="{VERSION}"' in (project / "Dockerfile").read_text()


def test_the_next_release_follows(project: Path) -> None:
    assert release(project).returncode == 0
    assert "nothing in it" in release(project, "99.0.1").stderr
    edit(project, "CHANGELOG.md", r"^## Unreleased\n", "## Unreleased\n\n- Another change.\n")
    commit(project)
    assert "99.0.0 is released: there is a tag" in release(project).stderr
    assert "98.0.0 is below the current version, 99.0.0" in release(project, "98.0.0").stderr
    assert release(project, "99.0.1").returncode == 0
    assert git(project, "tag") == "v99.0.0\nv99.0.1"


@pytest.mark.parametrize(
    ("name", "pattern", "by", "version", "message"),
    [
        ("README.md", r"\Z", "\n", "99.0", "three numbers"),
        ("README.md", r"\Z", "\n", "", "three numbers"),
        ("README.md", r"\Z", "\n", "0.0.9", "below the current version"),
        ("CHANGELOG.md", r"^## Unreleased$", "## 98.0.0 - unreleased", VERSION, "as 98.0.0, not"),
        ("CHANGELOG.md", r"^## Unreleased$", "## 98.0.0 - 2026-11-27", VERSION, "no section"),
        ("docs/upgrading.md", r"^\| unreleased ", "| 98.0.0 ", VERSION, "no row 'unreleased'"),
        ("pyproject.toml", r"^readme = .*$", 'readme = "missing.md"', VERSION, "missing.md"),
    ],
)
def test_what_cannot_be_released_is_named_and_leaves_nothing(
    project: Path, name: str, pattern: str, by: str, version: str, message: str
) -> None:
    edit(project, name, pattern, by)
    commit(project)
    before = git(project, "rev-parse", "HEAD")
    done = release(project, version)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert git(project, "status", "--porcelain") == git(project, "tag") == ""
    assert git(project, "rev-parse", "HEAD") == before


def test_what_is_not_committed_is_named_and_kept(project: Path) -> None:
    (project / "service/new.py").write_text("")
    done = release(project)
    assert "commit or remove what is not committed:\n?? service/new.py" in done.stderr
    assert (project / "service/new.py").exists()
    assert git(project, "tag") == ""
