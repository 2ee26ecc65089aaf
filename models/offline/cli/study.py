"""Subcommands that repeat experiments: `psim study` and `psim assure`."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from models.errors import DataError
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

if TYPE_CHECKING:
    from models.offline.study.cache import StepCache
    from models.offline.study.grid import Cell
    from models.offline.study.plots import Row
    from models.offline.study.recipe import Recipe

app = typer.Typer()


@app.command("study")
def study_command(
    recipe: Annotated[Path, typer.Argument(help="TOML file that says what is varied.")],
    out: Results,
    data: Annotated[Path, typer.Option(help="Folder that the recipe's paths start from.")] = Path(),
    steps: Annotated[
        Path | None, typer.Option(help="Folder for what studies can share; OUT/steps by default.")
    ] = None,
    cells: Annotated[
        Path | None, typer.Option(help="Folder for the rows of done cells; OUT/cells by default.")
    ] = None,
    base: Annotated[
        list[str] | None, typer.Option(help="Base to run, in place of the recipe's; repeatable.")
    ] = None,
    only: Annotated[
        str, typer.Option(help="Pattern for the cells to run: 'mpnet/sst-2/*/lora'.")
    ] = "*",
    page: Annotated[
        Path | None, typer.Option(help="Markdown file for the page of a benchmark, or of scans.")
    ] = None,
    run: Annotated[bool, typer.Option(help="Run cells, or only report on those done.")] = True,
) -> None:
    """Run attacks x strategies x seeds and all defences on each; resumable."""
    check_results(out)
    from models.offline.study.cache import StepCache
    from models.offline.study.recipe import load_recipe
    from models.offline.study.run import CELLS, done_cells, run_study

    store, kept = StepCache(steps or out / "steps"), cells or out / CELLS
    loaded = load_recipe(recipe)
    chosen = loaded.with_bases(base) if base else loaded
    whole = loaded.with_bases([*loaded.all_bases, *(base or ())])
    if page is not None and not has_page(whole):
        raise DataError(f"--page {page}: the recipe has no scan, and no defence of kind bundle")
    try:
        if run:
            for _ in run_study(chosen, data, out, store, say, only, kept):
                pass
    finally:  # what is done can be read, whatever comes
        _say_cost(store)
        report_study(whole, done_cells(whole, kept), out, store.root, recipe, page)


def _say_cost(store: "StepCache") -> None:
    taken = timedelta(seconds=round(sum(store.seconds.values())))
    say(f"{len(store.seconds)} steps, which took {taken} when they were done")


def has_page(recipe: "Recipe") -> bool:
    """Return whether a recipe is a benchmark or scans victims, which have pages of their own."""
    return is_benchmark(recipe) or recipe.scan is not None


def is_benchmark(recipe: "Recipe") -> bool:
    """Return whether a recipe has a bundle to report on."""
    return any(defence.kind == "bundle" for defence in recipe.defences)


def report_study(
    recipe: "Recipe",
    done: "Sequence[tuple[Cell, Row | None]]",
    out: Path,
    steps: Path,
    file: Path,
    page: Path | None,
) -> None:
    """Write the reports on all cells that are done, in this run or an earlier one."""
    from models.offline.study.benchmark.page import write_benchmark
    from models.offline.study.benchmark.scans import write_scans
    from models.offline.study.report import write_study_report

    if not (rows := [row for _, row in done if row is not None]):
        say("no cell of the recipe is done: there is nothing to report on")
        return
    write_study_report(rows, out, steps, file.read_text(encoding="utf-8"))
    say(f"wrote {out}/report.html, report.md and rows.jsonl")
    if is_benchmark(recipe):
        write_benchmark(recipe, done, out, page)
        say(f"wrote {out}/benchmark.html and benchmark.md{f', and {page}' if page else ''}")
    if recipe.scan:
        page = None if is_benchmark(recipe) else page
        write_scans(done, out, page)
        say(f"wrote {out}/scans.html and scans.md{f', and {page}' if page else ''}")


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
