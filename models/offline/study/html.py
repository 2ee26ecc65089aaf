"""Report pages, as Markdown and as one self-contained HTML file, from a list of blocks."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

TEMPLATES = Environment(
    loader=PackageLoader("models.offline.study"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title of the page."""

    kind: ClassVar = "heading"
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text."""

    kind: ClassVar = "paragraph"
    text: str


@dataclass(frozen=True)
class Table:
    """A table whose first `names` columns are row headers."""

    kind: ClassVar = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1


@dataclass(frozen=True)
class Code:
    """Preformatted text."""

    kind: ClassVar = "code"
    text: str


@dataclass(frozen=True)
class Picture:
    """A picture, which the Markdown page links to and the HTML page contains."""

    kind: ClassVar = "picture"
    name: str
    """Path that the Markdown page links to, relative to the page."""
    png: bytes
    alt: str

    @property
    def url(self) -> str:
        """The picture as a data URL."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


Block = Heading | Paragraph | Table | Code | Picture


def write_page(blocks: Sequence[Block], title: str, out: Path, name: str = "report") -> None:
    """Write `NAME.md` and the self-contained `NAME.html`."""
    out.mkdir(parents=True, exist_ok=True)
    write_markdown(blocks, out / f"{name}.md")
    write_html(blocks, title, out / f"{name}.html")


def write_html(blocks: Sequence[Block], title: str, page: Path) -> None:
    """Write a page as self-contained HTML only."""
    content = TEMPLATES.get_template("report.html").render(title=title, blocks=blocks)
    page.write_text(content, encoding="utf-8")


def write_markdown(blocks: Sequence[Block], page: Path) -> None:
    """Write a page as Markdown only, into a folder that is made if it is not there."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(map(_markdown, blocks)), encoding="utf-8")


def save_picture(figure: Figure, out: Path, name: str, alt: str, folder: str = "plots") -> Picture:
    """Save a figure as `out/folder/name` and return it with its alternative text."""
    path = out / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return Picture(f"{folder}/{name}", path.read_bytes(), alt)


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_escape(block.text)}\n"
        case Paragraph():
            return f"{_escape(block.text)}\n"
        case Table():
            alignment = ["---"] * block.names + ["--:"] * (len(block.header) - block.names)
            rows = [block.header, alignment, *block.rows]
            return "".join(f"| {' | '.join(map(_escape, row))} |\n" for row in rows)
        case Code():
            return f"```\n{block.text.rstrip()}\n```\n"
        case Picture():
            return f"![{_escape(block.alt)}]({block.name})\n"


def _escape(text: str) -> str:
    """Escape text so that Markdown shows it literally."""
    return re.sub(r"([\\|*\[\]`])", r"\\\1", html.escape(text, quote=False))
