"""Subcommands that repeat experiments: `psim study` and `psim assure`."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from models.offline.cli.console import say
from models.offline.cli.options import (
    Budget,
    LabelColumn,
    Results,
    TextColumn,
    Texts,
    check_budget,
    check_results,
)

app = typer.Typer()


@app.command("study")
def study_command(
    recipe: Annotated[Path, typer.Argument(help="TOML file that says what is varied.")],
    out: Results,
    data: Annotated[Path, typer.Option(help="Folder that the recipe's paths start from.")] = Path(),
    steps: Annotated[
        Path | None, typer.Option(help="Folder for what studies can share; OUT/steps by default.")
    ] = None,
) -> None:
    """Run attacks x strategies x seeds and all defences on each; resumable."""
    check_results(out)
    from models.offline.study.cache import StepCache
    from models.offline.study.recipe import load_recipe
    from models.offline.study.report import write_study_report
    from models.offline.study.run import run_study

    store = StepCache(steps or out / "steps")
    loaded = load_recipe(recipe)
    rows: list[dict[str, Any]] = []
    try:
        for row in run_study(loaded, data, out, store, say):
            rows.append(row)
    finally:  # what is done can be read, whatever comes
        taken = timedelta(seconds=round(sum(store.seconds.values())))
        say(f"{len(store.seconds)} steps, which took {taken} when they were done")
        if rows:
            write_study_report(rows, out, store.root, recipe.read_text(encoding="utf-8"))
            say(f"wrote {out}/report.html, report.md and rows.jsonl")


@app.command("assure")
def assure_command(
    victim: Annotated[str, typer.Option(help="Folder or hub id of the classifier.")],
    texts: Texts,
    out: Results,
    seeds: Annotated[int, typer.Option(help="Copies for each attack and target.", min=1)] = 1,
    frr_budget: Budget = 0.01,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
) -> None:
    """Plant backdoors in copies of a classifier, guard them, and report what the screens miss."""
    check_results(out)
    check_budget(frr_budget)
    from models.offline.io.samples import load_samples
    from models.offline.study.assurance import assure

    samples = load_samples(texts, text_column=text_column, label_column=label_column)
    assure(victim, samples, out, seeds=seeds, frr_budget=frr_budget, say=say)
    say(f"wrote {out}/assurance.html and assurance.md")
