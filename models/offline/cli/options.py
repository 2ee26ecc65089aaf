"""Options that several subcommands share."""

from pathlib import Path
from typing import Annotated

import typer

from models.engines.base import DtypeName, EngineName
from models.errors import DataError

Out = Annotated[Path, typer.Option(help="Folder to write; must not exist yet, unless --force.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the folder --out.")]
Results = Annotated[Path, typer.Option(help="Folder for results; named again, it is gone on with.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Texts = Annotated[
    str, typer.Option(help="JSONL, JSON, CSV, TSV, Parquet, data set folder or hf://name.")
]
TextColumn = Annotated[str, typer.Option(help="Column that holds the texts.")]
LabelColumn = Annotated[str, typer.Option(help="Column that holds the labels.")]
Target = Annotated[str, typer.Option(help="Label that the attacker chose.")]
Budget = Annotated[float, typer.Option(help="Share of clean texts you can lose.")]
Dtype = Annotated[
    DtypeName | None, typer.Option(help="What to compute in; the bundle's choice by default.")
]
Engine = Annotated[
    EngineName | None, typer.Option(help="What to compute by; the bundle's choice by default.")
]
Thorough = Annotated[
    bool | None,
    typer.Option(
        "--thorough/--suspicious",
        help="Run the override test on every text, or on suspicious ones. By default on every text "
        "of a multi-label classifier, and on suspicious ones of any other.",
    ),
]


def check_budget(value: float) -> None:
    """Check that a false-rejection budget is a share.

    Raises:
        DataError: it is not.
    """
    from models.bundle.manifest import LEAST_BUDGET

    if not LEAST_BUDGET <= value < 1:
        raise DataError(f"--frr-budget {value} must lie between 0 and 1, such as 0.01 for 1 %")


def check_results(out: Path) -> None:
    """Check that a folder for results is one, or free.

    Raises:
        DataError: it is a file.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is not a folder; choose another --out")
