"""Subcommand `psim evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from models.offline.cli.console import say, stdout
from models.offline.cli.options import Dtype, Engine, LabelColumn, Target, TextColumn, Thorough

app = typer.Typer()


@app.command("evaluate")
def evaluate_command(
    bundle: Annotated[Path, typer.Option(help="Bundle to evaluate.")],
    clean: Annotated[str, typer.Option(help="Clean test texts, labelled.")],
    poisoned: Annotated[
        str,
        typer.Option(help="Poisoned texts only: with their true labels, or all with the target."),
    ],
    target_label: Target,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON and plot.")] = None,
    dtype: Dtype = None,
    engine: Engine = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    thorough: Thorough = None,
) -> None:
    """Measure accuracy, attack success and detection, without and with the defence."""
    from models.bundle.load import load_bundle
    from models.offline.evaluation.evaluate import evaluate
    from models.offline.evaluation.report import evaluation_table, write_report
    from models.offline.io.samples import load_samples

    clean_samples, poisoned_samples = (
        load_samples(source, text_column=text_column, label_column=label_column)
        for source in (clean, poisoned)
    )
    loaded = load_bundle(bundle, dtype, engine)
    evaluation = evaluate(loaded, clean_samples, poisoned_samples, target_label, thorough=thorough)
    stdout.print(evaluation_table(evaluation))
    if out is not None:
        write_report(evaluation, out)
        say(f"wrote {out}/evaluation.json and scores.png")
