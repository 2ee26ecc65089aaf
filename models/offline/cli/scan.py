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
        Path | None,
        typer.Option(
            help="JSON file for the report; HTML goes beside it. Run the same command again to go "
            "on with a scan that was interrupted."
        ),
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
    from models.offline.io.samples import load_samples

    clean = load_samples(texts, text_column=text_column, label_column=None) if texts else []
    outcome = _scan(victim, base, [sample.text for sample in clean], out, minutes, seed)
    raise typer.Exit(1 if fail_on == outcome else 0)


def _scan(
    victim: str,
    base: str | None,
    texts: list[str],
    out: Path | None,
    minutes: float | None,
    seed: int,
) -> str:
    """Scan, print and write the report, and return its outcome."""
    from models.offline.cli.scan_page import write_scan
    from models.offline.io.classifiers import load_classifier
    from models.offline.scanning.report import scan_table
    from models.offline.scanning.scan import scan
    from models.offline.scanning.state import state_of

    model, tokenizer = load_classifier(victim, base=base)
    name = Path(victim).name if Path(victim).exists() else victim
    state = state_of(out, model, texts, minutes, seed)
    if state.steps:
        say(f"going on with an interrupted scan, after {state.steps} steps")
    report = scan(model, tokenizer, texts, name=name, minutes=minutes, seed=seed, state=state)
    stdout.print(scan_table(report))
    if out is not None:
        say(f"wrote {out} and {write_scan(report, out)}")
    state.forget()
    return report.outcome
