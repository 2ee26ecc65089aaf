"""Subcommand `psim scan`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from models.errors import DataError
from models.offline.cli.console import say, stdout
from models.offline.cli.options import Seed, TextColumn

app = typer.Typer()


@app.command("scan")
def scan_command(
    victim: Annotated[str, typer.Option(help="Folder or hub id of the classifier to search.")],
    texts: Annotated[
        str | None,
        typer.Option(
            help="Clean texts of its task; a small corpus of everyday English by default."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Model that an adapter is for, instead of the one it names.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file for the report; HTML goes beside it.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop searching after that.", min=0)] = None,
    fail_on: Annotated[
        Literal["suspicious"] | None, typer.Option(help="End with exit code 1 on that outcome.")
    ] = None,
    seed: Seed = 0,
    text_column: TextColumn = "text",
) -> None:
    """Search a classifier for words and phrases that force a class, before any traffic."""
    if out is not None and out.suffix == ".html":
        raise DataError(f"--out {out} is for JSON, and HTML goes beside it: choose another suffix")
    from models.offline.cli.scan_page import write_scan
    from models.offline.io.classifiers import load_classifier
    from models.offline.io.samples import load_samples
    from models.offline.scanning.report import scan_table
    from models.offline.scanning.scan import scan

    clean = load_samples(texts, text_column=text_column, label_column=None) if texts else []
    model, tokenizer = load_classifier(victim, base=base)
    name = Path(victim).name if Path(victim).exists() else victim
    own = [sample.text for sample in clean]
    report = scan(model, tokenizer, own, name=name, minutes=minutes, seed=seed)
    stdout.print(scan_table(report))
    if out is not None:
        say(f"wrote {out} and {write_scan(report, out)}")
    raise typer.Exit(1 if fail_on == report.outcome else 0)
