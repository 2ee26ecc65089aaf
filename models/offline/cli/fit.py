"""Subcommand `psim fit`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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

if TYPE_CHECKING:
    from torch import nn

    from models.bundle.manifest import Manifest

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


ScanFile = Annotated[
    Path | None,
    typer.Option(
        "--scan", help="Report of psim scan on this victim; the bundle is tried with its triggers."
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
    scan: ScanFile = None,
    seed: Seed = 0,
    text_column: TextColumn = "text",
    force: Force = False,
) -> None:
    """Train PSIM on a classifier with clean texts, calibrate it, and write a bundle."""
    top_layers = parse_layers(layers)
    check_budget(frr_budget)
    from models.offline.fitting.fit import fit
    from models.offline.fitting.psim import PsimConfig
    from models.offline.io.atomic import check_writable
    from models.offline.io.classifiers import load_classifier

    check_writable(out, force)
    clean, given = (_texts(file, text_column) for file in (texts, carriers))
    loaded = load_classifier(victim, base=base)
    triggers = _triggers(scan, loaded[0])
    manifest = fit(
        *loaded,
        clean,
        out,
        name=Path(victim).name if Path(victim).exists() else victim,
        frr_budget=frr_budget,
        config=PsimConfig(layers=top_layers, seed=seed),
        engine=engine,
        carriers=given,
        max_length=max_length,
    )
    _show(manifest, out, triggers, clean)
    say(f"wrote {out}; next: psim serve --bundle {out}")


def _texts(source: str | None, column: str) -> list[str]:
    from models.offline.io.samples import load_samples

    samples = load_samples(source, text_column=column, label_column=None) if source else []
    return [sample.text for sample in samples]


def _triggers(scan: Path | None, victim: "nn.Module") -> list[tuple[str, str]]:
    from models.detection.views import class_names
    from models.network.adapters import transformer_of
    from models.network.outputs import is_multi_label
    from models.offline.io.classifiers import labels_of
    from models.offline.scanning.report import triggers_for

    multi_label = is_multi_label(transformer_of(victim).config)
    return triggers_for(scan, class_names(labels_of(victim), multi_label=multi_label))


def _show(
    manifest: "Manifest", out: Path, triggers: list[tuple[str, str]], clean: list[str]
) -> None:
    """Try the bundle with known triggers, if there are any, and print what it is."""
    from models.offline.evaluation.bundle_report import manifest_table
    from models.offline.io.known_triggers import record_triggers

    tried = record_triggers(out, triggers, clean) if triggers else manifest
    stdout.print(manifest_table(tried))


def parse_layers(value: str) -> int:
    """Parse `last:N`.

    Raises:
        DataError: it is something else.
    """
    kind, _, number = value.partition(":")
    if kind != "last" or not number.isdigit() or int(number) < 1:
        raise DataError(f"--layers {value}: write last:N, the number of topmost layers to adapt")
    return int(number)
