"""The table of versions in docs/upgrading.md."""

from typing import NamedTuple

from tests.support.paths import ROOT


class Version(NamedTuple):
    """A row of the table, the newest first."""

    version: str
    bundle: str
    audit: str
    settings: str
    metrics: str


_LINES = (ROOT / "docs/upgrading.md").read_text().splitlines()
_START = next(n for n, line in enumerate(_LINES) if line.startswith("| Version |"))
ROWS = [
    Version(*(cell.strip() for cell in line.strip("|").split("|")))
    for line in _LINES[_START + 2 : _LINES.index("", _START)]
]
