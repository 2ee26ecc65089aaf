"""Pages in Markdown and HTML at once: each block holds both forms."""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

STYLE = """
body { max-width: 80rem; margin: 2rem auto; padding: 0 1rem; background: #fff; color: #222;
  font: 16px/1.5 system-ui, sans-serif; }
p { max-width: 50rem; }
img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ccc; text-align: right; }
th { background: #f2f2f2; vertical-align: bottom; }
th:first-child, th[scope=row] { text-align: left; }
"""


class Block(NamedTuple):
    """A part of the page, in both formats."""

    markdown: str
    html: str


def write_page(blocks: Sequence[Block], title: str, out: Path, name: str = "report") -> None:
    """Write `NAME.md` and the self-contained `NAME.html`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text("\n".join(b.markdown for b in blocks), encoding="utf-8")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f"{''.join(b.html for b in blocks)}</body></html>\n"
    )
    (out / f"{name}.html").write_text(page, encoding="utf-8")


def table(header: list[str], lines: list[list[str]], names: int = 1) -> Block:
    """Return a table whose first `names` columns are row headers."""
    written = [header, ["---"] * names + ["--:"] * (len(header) - names), *lines]
    markdown = "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in written)
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = "".join(
        "<tr>"
        + "".join(f'<th scope="row">{html.escape(cell)}</th>' for cell in line[:names])
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in line[names:])
        + "</tr>\n"
        for line in lines
    )
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return Block(f"{markdown}\n", f'<div class="wide">{table}</div>\n')


def heading(level: int, text: str) -> Block:
    """Return a heading; level 1 is the title of the page."""
    name = f"h{level}"
    return Block(f"{'#' * level} {_escape(text)}\n", f"<{name}>{html.escape(text)}</{name}>\n")


def paragraph(text: str) -> Block:
    """Return a paragraph."""
    return Block(f"{_escape(text)}\n", f"<p>{html.escape(text)}</p>\n")


def code(text: str) -> Block:
    """Return preformatted text."""
    return Block(f"```\n{text.rstrip()}\n```\n", f"<pre>{html.escape(text)}</pre>\n")


def picture(out: Path, name: str, figure: Figure, alt: str) -> Block:
    """Write a figure to `out/plots/name`, and return it with its alternative text."""
    path = out / "plots" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    data = base64.b64encode(path.read_bytes()).decode()
    source = f"data:image/png;base64,{data}"
    return Block(
        f"![{_escape(alt)}](plots/{name})\n",
        f'<div><img src="{source}" alt="{html.escape(alt)}"></div>\n',
    )


def _escape(text: str) -> str:
    """Escape text so that Markdown shows it literally."""
    return re.sub(r"([\\|*\[\]`])", r"\\\1", html.escape(text, quote=False))
