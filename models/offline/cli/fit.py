"""Subcommand `psim fit`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from models.engines.base import EngineName
from models.errors import DataError
from models.offline.cli.console import say, stdout
from models.offline.cli.options import (
    Budget,
    Force,
    Out,
    Seed,
    TextColumn,
    Texts,
    check_budget,
)

app = typer.Typer()

FitEngine = Annotated[
    Literal["auto", EngineName],
    typer.Option(help="What the bundle runs by; auto takes the fastest that agrees."),
]
BaseModel = Annotated[
    str | None, typer.Option(help="Model that an adapter is for, instead of the one it names.")
]
CarrierFile = Annotated[
    str | None,
    typer.Option(
        help="Clean texts that the override test may use, and the bundle may hold; some of --texts "
        "by default."
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        help="Tokens that are read of a text, special ones included; by default as many as the "
        "victim and memory allow, 8192 at most."
    ),
]


@app.command("fit")
def fit_command(
    victim: Annotated[str, typer.Option(help="Folder or hub id of the classifier to guard.")],
    texts: Texts,
    out: Out,
    base: BaseModel = None,
    frr_budget: Budget = 0.01,
    layers: Annotated[str, typer.Option(help="Layers that carry the adapter.")] = "last:1",
    engine: FitEngine = "auto",
    carriers: CarrierFile = None,
    max_length: MaxLength = None,
    seed: Seed = 0,
    text_column: TextColumn = "text",
    force: Force = False,
) -> None:
    """Train PSIM on a classifier with clean texts, calibrate it, and write a bundle."""
    top_layers = parse_layers(layers)
    check_budget(frr_budget)
    from models.offline.evaluation.bundle_report import manifest_table
    from models.offline.fitting.fit import fit
    from models.offline.fitting.psim import PsimConfig
    from models.offline.io.atomic import check_writable
    from models.offline.io.classifiers import load_classifier
    from models.offline.io.samples import load_samples

    check_writable(out, force)
    samples = load_samples(texts, text_column=text_column, label_column=None)
    given = load_samples(carriers, text_column=text_column, label_column=None) if carriers else []
    manifest = fit(
        *load_classifier(victim, base=base),
        [s.text for s in samples],
        out,
        name=Path(victim).name if Path(victim).exists() else victim,
        frr_budget=frr_budget,
        config=PsimConfig(layers=top_layers, seed=seed),
        engine=engine,
        carriers=[s.text for s in given],
        max_length=max_length,
    )
    stdout.print(manifest_table(manifest))
    say(f"wrote {out}; next: psim serve --bundle {out}")


def parse_layers(value: str) -> int:
    """Parse `last:N`.

    Raises:
        DataError: it is something else.
    """
    kind, _, number = value.partition(":")
    if kind != "last" or not number.isdigit() or int(number) < 1:
        raise DataError(f"--layers {value}: write last:N, the number of topmost layers to adapt")
    return int(number)
