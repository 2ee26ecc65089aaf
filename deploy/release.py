"""`make release VERSION=x.y.z`: version, changelog, wheel, sdist and tag. It pushes nothing.

docs/upgrading.md says what each step is for.
"""

import re
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT, CHANGES, UPGRADING = "pyproject.toml", "CHANGELOG.md", "docs/upgrading.md"
HEADING = re.compile(r"^## (?:(\S+) - )?unreleased\n+(.*?)(?=^## |\Z)", re.M | re.S | re.I)
"""The changelog's section of what is not released, with the version that it may name."""
ROW = re.compile(r"(?<=\|---\|\n)\| unreleased \|([^|\n]*\|[^|\n]*\|).*\n")
"""The first row of the table of versions, with its schemas."""


class ReleaseError(Exception):
    """Something keeps the release from being made."""


def main(version: str) -> None:
    """Make a release; after an error before the commit, the tree is as it was."""
    before = tomllib.loads(read(PROJECT))["project"]["version"]
    check(version, before)
    try:
        set_version(before, version)
        open_next(version)
        run(sys.executable, "-m", "hatchling", "build")
        git("commit", "--quiet", "--all", "--message", f"Release {version}")
    except BaseException:
        git("restore", "--staged", "--worktree", ".")
        raise
    git("tag", "--annotate", f"v{version}", "--message", f"PSIM Gateway {version}")
    sys.stdout.write(
        f"{version} is committed, tagged as v{version} and built in dist/. Nothing was pushed: "
        f"look at it with git show, then git push --atomic REMOTE BRANCH v{version}\n"
    )


def check(version: str, before: str) -> None:
    """Raise `ReleaseError` if there is nothing to release, or not as this version."""
    if not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", version):
        raise ReleaseError("the version is three numbers: make release VERSION=1.2.3")
    if numbers(version) < numbers(before):
        raise ReleaseError(f"{version} is below the current version, {before}")
    if git("tag", "--list", f"v{version}"):
        raise ReleaseError(f"{version} is released: there is a tag v{version}")
    if changed := git("status", "--porcelain"):
        raise ReleaseError(f"commit or remove what is not committed:\n{changed}")
    section = HEADING.search(read(CHANGES))
    if not section or not section[2].strip():
        raise ReleaseError(f"{CHANGES} has no section of what is unreleased, or nothing in it")
    if section[1] not in (None, version):
        raise ReleaseError(f"{CHANGES} has what is unreleased as {section[1]}, not {version}")
    if not ROW.search(read(UPGRADING)):
        raise ReleaseError(f"the table of versions in {UPGRADING} begins with no row 'unreleased'")


def set_version(before: str, version: str) -> None:
    """Set the version of the project, its images and chart, and of the demo's folder."""
    write(PROJECT, read(PROJECT).replace(f'version = "{before}"', f'version = "{version}"', 1))
    named = re.compile(
        r"(psim-(?:gateway|fit):|psim-gateway-|newTag: |demo-|--version |^version: |^appVersion: "
        rf"|image\.version=\"){re.escape(before)}\b",
        re.M,
    )
    for name in git(
        "ls-files", "Dockerfile", "deploy", "docs/*.md", "docker-compose.yml"
    ).splitlines():
        text = read(name)
        if named.search(text):
            write(name, named.sub(rf"\g<1>{version}", text))


def open_next(version: str) -> None:
    """Date the changelog's section and name the table's row; open new ones above them."""
    today = datetime.now(UTC).date()
    heading = f"## Unreleased\n\n## {version} - {today}\n\n"
    write(CHANGES, HEADING.sub(lambda found: heading + found[2], read(CHANGES), count=1))

    def rows(found: re.Match[str]) -> str:
        renamed = found[0].replace(" unreleased ", f" {version} ", 1)
        return f"| unreleased |{found[1]} - | - |\n{renamed}"

    write(UPGRADING, ROW.sub(rows, read(UPGRADING), count=1))


def numbers(version: str) -> tuple[int, ...]:
    """Return a version in a form that compares."""
    return tuple(map(int, version.split(".")))


def read(name: str) -> str:
    """Return the text of a file."""
    return (ROOT / name).read_text(encoding="utf-8")


def write(name: str, text: str) -> None:
    """Replace the text of a file."""
    (ROOT / name).write_text(text, encoding="utf-8")


def git(*arguments: str) -> str:
    """Run git; return what it says."""
    return run("git", *arguments)


def run(*command: str) -> str:
    """Run a program in the project; return what it says.

    Raises:
        ReleaseError: it failed; the message has what it said.
    """
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise ReleaseError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ReleaseError as error:
        sys.exit(f"error: {error}")
