"""Subcommands that screen texts: `psim screen` and `psim triggers`."""

import json
import sys
from dataclasses import asdict
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from models.engines.base import DtypeName, EngineName
from models.errors import DataError
from models.offline.cli.console import say, stdout
from models.offline.cli.options import Dtype, Engine, TextColumn, Thorough

app = typer.Typer()


Files = Annotated[
    list[str],
    typer.Argument(
        help="JSONL, JSON, CSV, TSV or Parquet, also .gz and .zst; - reads JSONL from stdin. With "
        "--on ray: several, globs too."
    ),
]
Place = Annotated[
    Literal["here", "ray"], typer.Option(help="Screen in this process, or on Ray Data.")
]
OutTables = Annotated[
    Path | None,
    typer.Option(help="With --on ray: folder for Parquet; named again, it is gone on with."),
]
Workers = Annotated[
    int | None, typer.Option(help="With --on ray: how many hold the bundle.", min=1)
]
EngineOrRay = Annotated[
    Literal[EngineName, "ray"] | None,
    typer.Option(
        help="What to compute by; the bundle's choice by default, also with ray: --on ray."
    ),
]


@app.command("screen")
def screen_command(
    files: Files,
    bundle: Annotated[Path, typer.Option(help="Bundle to screen with.")],
    on: Place = "here",
    out: OutTables = None,
    workers: Workers = None,
    part_rows: Annotated[int, typer.Option(help="With --on ray: rows of a part.", min=1)] = 50_000,
    text_column: TextColumn = "text",
    dtype: Dtype = None,
    engine: EngineOrRay = None,
    thorough: Thorough = None,
) -> None:
    """Screen a file or a stream, one verdict per row, in order, on stdout; or many large files."""
    if engine == "ray":
        on, engine = "ray", None
    if (on == "ray") != (out is not None):
        raise DataError("--on ray needs --out, the folder for its results, and nothing else does")
    if out is None:
        if len(files) > 1:
            raise DataError("several files need --on ray")
        failed = screen_rows(Path(files[0]), bundle, text_column, dtype, engine, thorough=thorough)
        if failed:
            say(f"{failed} rows could not be screened; their output has an error")
    else:
        from models.offline.screening.bulk import screen_files

        totals = screen_files(
            files, bundle, out, text_column=text_column, part_rows=part_rows, workers=workers,
            dtype=dtype, engine=engine, thorough=thorough, say=say,
        )  # fmt: skip
        failed = totals.failed
        say(
            f"{totals.rows} rows, of which {totals.triggered} are triggered, {totals.unfamiliar} "
            f"are unfamiliar and {failed} could not be screened; wrote {out}"
        )
    raise typer.Exit(1 if failed else 0)


def screen_rows(
    file: Path,
    bundle: Path,
    text_column: str,
    dtype: DtypeName | None,
    engine: EngineName | None,
    *,
    thorough: bool | None,
) -> int:
    """Screen a file, or stdin, to stdout; return how many rows could not be screened."""
    from tqdm import tqdm

    from models.bundle.load import load_bundle
    from models.offline.io.files import format_of
    from models.offline.io.samples import read_lines, read_rows
    from models.offline.screening.stream import screen_file

    if str(file) == "-":
        unit, records = "line", read_lines("stdin", cast(BufferedReader, sys.stdin.buffer))
    else:
        unit, records = format_of(file).unit, read_rows(file, text_column)
    loaded = load_bundle(bundle, dtype, engine)
    # No bar between verdicts on a terminal, and none where nobody would see it.
    watched = tqdm(records, unit=" rows", disable=sys.stdout.isatty() or None)
    return screen_file(loaded, watched, sys.stdout, text_column, unit=unit, thorough=thorough)


@app.command("triggers")
def triggers_command(
    texts: Annotated[str, typer.Argument(help="Traffic: JSONL, JSON, CSV, TSV or Parquet.")],
    bundle: Annotated[Path, typer.Option(help="Bundle to screen it with.")],
    out: Annotated[Path | None, typer.Option(help="JSON file for the phrases.")] = None,
    most: Annotated[int, typer.Option(help="Phrases to show.", min=1)] = 10,
    text_column: TextColumn = "text",
    dtype: Dtype = None,
    engine: Engine = None,
) -> None:
    """Screen traffic, and say what the flagged texts have in common that the others have not."""
    if out is not None and out.exists():
        raise DataError(f"{out} exists already; choose another --out")
    from models.bundle.load import load_bundle
    from models.detection.screen import Finding
    from models.offline.io.samples import load_samples
    from models.offline.screening.stream import split_by_finding
    from models.offline.screening.triggers import common_phrases, phrase_table

    samples = load_samples(
        texts, text_column=text_column, label_column=None, drop_empty=True, say=say
    )
    found = split_by_finding(load_bundle(bundle, dtype, engine), [s.text for s in samples])
    triggered, unfamiliar, passed = found[Finding.TRIGGERED], found[Finding.UNFAMILIAR], found[None]
    phrases = common_phrases([*triggered, *unfamiliar], passed, most)
    stdout.print(phrase_table(phrases, len(triggered), len(unfamiliar), len(passed)))
    if out is not None:
        counts = {"flagged": len(triggered) + len(unfamiliar), "passed": len(passed)}
        counts |= {"triggered": len(triggered), "unfamiliar": len(unfamiliar)}
        report = counts | {"phrases": [asdict(p) for p in phrases]}
        out.write_text(json.dumps(report, indent=1), encoding="utf-8")
        say(f"wrote {out}")
