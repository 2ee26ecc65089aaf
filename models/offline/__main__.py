"""The command `psim`: each subcommand reads its inputs, calls one function, shows the result."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer
from rich.console import Console
from tqdm import tqdm

from models.bundle.layout import MANIFEST
from models.bundle.load import load_bundle
from models.bundle.manifest import LEAST_BUDGET
from models.bundle.signing import sign
from models.bundle.verify import check_files, read_manifest
from models.engines.base import DtypeName, EngineName
from models.errors import DataError, PsimError
from models.offline import demo as demo_bundle
from models.offline.attacks.poisoning import (
    SENTENCE_TRIGGER,
    WORD_TRIGGER,
    Attack,
    Insertion,
    Paraphrases,
    poison_test_set,
)
from models.offline.attacks.training import Strategy, TuneResult, finetune_victim, poison_victim
from models.offline.evaluation.evaluate import evaluate
from models.offline.evaluation.report import (
    evaluation_table,
    manifest_table,
    recalibration_table,
    write_report,
)
from models.offline.fitting.fit import fit
from models.offline.fitting.psim import PsimConfig
from models.offline.fitting.recalibrate import MAX_RISE, check, recalibrate, write
from models.offline.fitting.traffic import read_traffic
from models.offline.io.atomic import check_writable
from models.offline.io.classifiers import load_classifier
from models.offline.io.samples import load_samples, require_labels, write_samples
from models.offline.screening.bulk import screen_files
from models.offline.screening.stream import screen_file, split_by_verdict
from models.offline.screening.triggers import common_phrases, phrase_table
from models.offline.study.assurance import assure
from models.offline.study.cache import StepCache
from models.offline.study.recipe import load_recipe
from models.offline.study.report import write_study_report
from models.offline.study.run import run_study

app = typer.Typer(
    help="Find backdoor triggers before they reach your text classifier.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
stderr = Console(stderr=True)

Out = Annotated[Path, typer.Option(help="Folder to write; must not exist yet, unless --force.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the folder --out.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Texts = Annotated[str, typer.Option(help="JSONL, CSV, TSV, Parquet, data set folder or hf://name.")]
TextColumn_ = Annotated[str, typer.Option(help="Column that holds the texts.")]
LabelColumn = Annotated[str, typer.Option(help="Column that holds the labels.")]
Target = Annotated[str, typer.Option(help="Label that the attacker chose.")]
Dtype = Annotated[
    DtypeName | None, typer.Option(help="What to compute in; the bundle's choice by default.")
]
Engine = Annotated[
    EngineName | None, typer.Option(help="What to compute by; the bundle's choice by default.")
]


@contextmanager
def errors_for_people() -> Iterator[None]:
    """Turn expected errors into one line and exit code 2; a traceback is for our bugs only."""
    try:
        yield
    except BrokenPipeError:
        raise  # `psim screen ... | head`: click ends quietly
    except (PsimError, OSError) as error:
        stderr.print("[bold red]error:[/]", end=" ")
        stderr.print(str(error), highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        stderr.print(
            "interrupted. Run the same command again: poison, finetune and study go on behind the "
            "last whole epoch, screen --on ray behind what is written, the others start afresh"
        )
        raise typer.Exit(130) from None


def layers_option(value: str) -> int:
    """Parse `last:N`."""
    kind, _, number = value.partition(":")
    if kind != "last" or not number.isdigit() or int(number) < 1:
        raise DataError(f"--layers {value}: write last:N, the number of topmost layers to adapt")
    return int(number)


def budget_option(value: float) -> float:
    """Check that a false-rejection budget is a share."""
    if not LEAST_BUDGET <= value < 1:
        raise DataError(f"--frr-budget {value} must lie between 0 and 1, such as 0.01 for 1 %")
    return value


@app.command("fit")
def fit_command(
    victim: Annotated[str, typer.Option(help="Folder or hub id of the classifier to guard.")],
    texts: Texts,
    out: Out,
    frr_budget: Annotated[float, typer.Option(help="Share of clean texts you can lose.")] = 0.01,
    layers: Annotated[str, typer.Option(help="Layers that carry the adapter.")] = "last:1",
    engine: Annotated[
        Literal["auto", EngineName],
        typer.Option(help="What the bundle runs by; auto takes the fastest that agrees."),
    ] = "auto",
    seed: Seed = 0,
    text_column: TextColumn_ = "text",
    label_column: LabelColumn = "label",
    force: Force = False,
) -> None:
    """Train PSIM on a classifier with clean texts, calibrate it, and write a bundle."""
    with errors_for_people():
        config = PsimConfig(layers=layers_option(layers), seed=seed)
        budget_option(frr_budget)
        check_writable(out, force)
        samples = load_samples(texts, text_column=text_column, label_column=label_column)
        model, tokenizer = load_classifier(victim)
        manifest = fit(
            model,
            tokenizer,
            [s.text for s in samples],
            out,
            name=Path(victim).name if Path(victim).exists() else victim,
            frr_budget=frr_budget,
            config=config,
            engine=engine,
        )
        Console().print(manifest_table(manifest))
        stderr.print(f"wrote {out}; next: psim serve --bundle {out}", highlight=False)


class AttackName(StrEnum):
    """The attacks of Zhao et al., section 5.1."""

    BADNET = "badnet"
    INSENT = "insent"
    SYNATTACK = "synattack"


def make_attack(attack: AttackName, trigger: str | None, paraphrases: str | None) -> Attack:
    """Build the attack that the command line names."""
    if attack is not AttackName.SYNATTACK:
        return insertion(attack, trigger)
    if paraphrases is None:
        raise DataError("synattack needs --paraphrases FILE: texts in the syntactic template")
    return Paraphrases(tuple(load_samples(paraphrases)))


def insertion(attack: AttackName, trigger: str | None) -> Insertion:
    """Build an attack that code can make."""
    if attack is AttackName.SYNATTACK:
        raise DataError("synattack needs a paraphraser; give its file to evaluate as it is")
    default = WORD_TRIGGER if attack is AttackName.BADNET else SENTENCE_TRIGGER
    return Insertion((trigger or default,))


AttackOption = Annotated[AttackName, typer.Option(help="How the trigger looks.")]
Trigger = Annotated[str | None, typer.Option(help="Word or sentence to insert.")]
ParaphraseFile = Annotated[str | None, typer.Option(help="Poisoned texts for synattack.")]


@app.command("poison")
def poison_command(
    base: Annotated[str, typer.Option(help="Pretrained model to poison.")],
    train: Annotated[str, typer.Option(help="Clean labelled training texts.")],
    dev: Annotated[str, typer.Option(help="Clean labelled texts to choose the best epoch by.")],
    target_label: Target,
    out: Out,
    attack: AttackOption = AttackName.BADNET,
    trigger: Trigger = None,
    paraphrases: ParaphraseFile = None,
    poison_rate: Annotated[float, typer.Option(help="Poisoned share of the training set.")] = 0.1,
    clean_label: Annotated[bool, typer.Option(help="Trigger in target-class texts only.")] = False,
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = 3,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Plant a backdoor by full fine-tuning, for experiments."""
    with errors_for_people():
        check_writable(out, force)
        show_result(
            poison_victim(
                base,
                load_samples(train),
                load_samples(dev),
                make_attack(attack, trigger, paraphrases),
                target_label,
                out,
                poison_rate=poison_rate,
                clean_label=clean_label,
                epochs=epochs,
                seed=seed,
            )
        )


@app.command("finetune")
def finetune_command(
    victim: Annotated[str, typer.Option(help="Model to tune; may be poisoned.")],
    train: Annotated[str, typer.Option(help="Clean labelled training texts.")],
    dev: Annotated[str, typer.Option(help="Clean labelled texts to choose the best epoch by.")],
    out: Out,
    strategy: Annotated[Strategy, typer.Option(help="What is tuned.")] = Strategy.LORA,
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = 3,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Tune a classifier on clean data, by one of five strategies."""
    with errors_for_people():
        check_writable(out, force)
        show_result(
            finetune_victim(
                victim,
                load_samples(train),
                load_samples(dev),
                strategy,
                out,
                epochs=epochs,
                seed=seed,
            )
        )


def show_result(result: TuneResult) -> None:
    """Print what training achieved on the dev texts."""
    line = f"clean accuracy {result.clean_accuracy:.1%}"
    if result.attack_success_rate is not None:
        line += f", attack success rate {result.attack_success_rate:.1%}"
    Console().print(f"{line} (dev); wrote {result.out}", highlight=False)


@app.command("attack")
def attack_command(
    texts: Texts,
    target_label: Target,
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    attack: AttackOption = AttackName.BADNET,
    trigger: Trigger = None,
    seed: Seed = 0,
) -> None:
    """Write poisoned test texts: the trigger in every text whose label is not the target."""
    with errors_for_people():
        if out.exists():
            raise DataError(f"{out} exists already; choose another --out")
        samples = load_samples(texts)
        require_labels(samples)
        poisoned = poison_test_set(samples, insertion(attack, trigger), target_label, seed)
        write_samples(out, poisoned)
        stderr.print(f"wrote {len(poisoned)} poisoned texts to {out}", highlight=False)


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
    text_column: TextColumn_ = "text",
    label_column: LabelColumn = "label",
) -> None:
    """ZScore accuracy, attack success and detection, without and with the defence."""
    with errors_for_people():
        clean_samples, poisoned_samples = (
            load_samples(source, text_column=text_column, label_column=label_column)
            for source in (clean, poisoned)
        )
        evaluation = evaluate(
            load_bundle(bundle, dtype, engine), clean_samples, poisoned_samples, target_label
        )
        Console().print(evaluation_table(evaluation))
        if out is not None:
            write_report(evaluation, out)
            stderr.print(f"wrote {out}/evaluation.json and scores.png", highlight=False)


@app.command("study")
def study_command(
    recipe: Annotated[Path, typer.Argument(help="TOML file that says what is varied.")],
    out: Annotated[Path, typer.Option(help="Folder for results; named again, it is gone on with.")],
    data: Annotated[Path, typer.Option(help="Folder that the recipe's paths start from.")] = Path(),
    steps: Annotated[
        Path | None, typer.Option(help="Folder for what studies can share; OUT/steps by default.")
    ] = None,
) -> None:
    """Run attacks x strategies x seeds and all defences on each; resumable."""
    with errors_for_people():
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} is not a folder; choose another --out")
        store = StepCache(steps or out / "steps")
        loaded = load_recipe(recipe)
        rows: list[dict[str, Any]] = []
        try:
            for row in run_study(loaded, data, out, store, stderr.print):
                rows.append(row)
        finally:  # what is done can be read, whatever comes
            taken = timedelta(seconds=round(sum(store.seconds.values())))
            stderr.print(f"{len(store.seconds)} steps, which took {taken} when they were done")
            if rows:
                write_study_report(rows, out, store.root, recipe.read_text(encoding="utf-8"))
                stderr.print(f"wrote {out}/report.html, report.md and rows.jsonl", highlight=False)


@app.command("assure")
def assure_command(
    victim: Annotated[str, typer.Option(help="Folder or hub id of the classifier.")],
    texts: Texts,
    out: Annotated[Path, typer.Option(help="Folder for results; named again, it is gone on with.")],
    seeds: Annotated[int, typer.Option(help="Copies for each attack and target.", min=1)] = 1,
    frr_budget: Annotated[float, typer.Option(help="Share of clean texts you can lose.")] = 0.01,
    text_column: TextColumn_ = "text",
    label_column: LabelColumn = "label",
) -> None:
    """Plant backdoors in copies of a classifier, guard them, and report what the screens miss."""
    with errors_for_people():
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} is not a folder; choose another --out")
        budget_option(frr_budget)
        samples = load_samples(texts, text_column=text_column, label_column=label_column)
        assure(victim, samples, out, seeds=seeds, frr_budget=frr_budget, say=stderr.print)
        stderr.print(f"wrote {out}/assurance.html and assurance.md", highlight=False)


@app.command("screen")
def screen_command(
    files: Annotated[
        list[str],
        typer.Argument(
            help="JSONL with one text per line; - reads stdin. With --on ray: JSONL, CSV, TSV and "
            "Parquet, globs too."
        ),
    ],
    bundle: Annotated[Path, typer.Option(help="Bundle to screen with.")],
    on: Annotated[
        Literal["here", "ray"], typer.Option(help="Screen in this process, or on Ray Data.")
    ] = "here",
    out: Annotated[
        Path | None,
        typer.Option(help="With --on ray: folder for Parquet; named again, it is gone on with."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="With --on ray: how many hold the bundle.", min=1)
    ] = None,
    part_rows: Annotated[int, typer.Option(help="With --on ray: rows of a part.", min=1)] = 50_000,
    text_column: TextColumn_ = "text",
    dtype: Dtype = None,
    engine: Annotated[
        Literal[EngineName, "ray"] | None,
        typer.Option(
            help="What to compute by; the bundle's choice by default, also with ray: --on ray."
        ),
    ] = None,
) -> None:
    """Screen a JSONL stream, one verdict per line, in order, on stdout; or many large files."""
    if engine == "ray":
        on, engine = "ray", None
    with errors_for_people():
        if (on == "ray") != (out is not None):
            raise DataError(
                "--on ray needs --out, the folder for its results, and nothing else does"
            )
        if out is not None:
            totals = screen_files(
                files,
                bundle,
                out,
                text_column=text_column,
                part_rows=part_rows,
                workers=workers,
                dtype=dtype,
                engine=engine,
                say=say,
            )
            say(
                f"{totals.rows} rows, of which {totals.poisoned} are poisoned and {totals.failed} "
                f"could not be screened; wrote {out}"
            )
            raise typer.Exit(1 if totals.failed else 0)
        if len(files) > 1:
            raise DataError("several files need --on ray")
        loaded = load_bundle(bundle, dtype, engine)
        with _open(Path(files[0])) as lines:
            # No bar between verdicts on a terminal, and none where nobody would see it.
            watched = tqdm(lines, unit=" lines", disable=sys.stdout.isatty() or None)
            failed = screen_file(loaded, watched, sys.stdout, text_column)
    if failed:
        stderr.print(f"{failed} lines could not be screened; their output has an error")
        raise typer.Exit(1)


@app.command("triggers")
def triggers_command(
    texts: Annotated[str, typer.Argument(help="AuditedTraffic: JSONL, CSV, TSV or Parquet.")],
    bundle: Annotated[Path, typer.Option(help="Bundle to screen it with.")],
    out: Annotated[Path | None, typer.Option(help="JSON file for the phrases.")] = None,
    most: Annotated[int, typer.Option(help="Phrases to show.", min=1)] = 10,
    text_column: TextColumn_ = "text",
    dtype: Dtype = None,
    engine: Engine = None,
) -> None:
    """Screen traffic, and say what the flagged texts have in common that the others have not."""
    with errors_for_people():
        if out is not None and out.exists():
            raise DataError(f"{out} exists already; choose another --out")
        samples = load_samples(texts, text_column=text_column, drop_empty=True)
        by_verdict = split_by_verdict(load_bundle(bundle, dtype, engine), [s.text for s in samples])
        phrases = common_phrases(*by_verdict, most)
        flagged, passed = map(len, by_verdict)
        Console().print(phrase_table(phrases, flagged, passed))
        if out is not None:
            found = {"flagged": flagged, "passed": passed, "phrases": [asdict(p) for p in phrases]}
            out.write_text(json.dumps(found, indent=1), encoding="utf-8")
            stderr.print(f"wrote {out}", highlight=False)


def say(line: str) -> None:
    """Print a line that may name files."""
    stderr.print(line, highlight=False, markup=False, soft_wrap=True)


def _open(file: Path) -> TextIO:
    """Open a JSONL file; bytes that are not UTF-8 become surrogates: an error of their line."""
    try:
        raw = sys.stdin.buffer if str(file) == "-" else file.open("rb")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    return TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape", newline="\n")


@app.command("inspect")
def inspect_command(bundle: Annotated[Path, typer.Argument(help="Bundle to check.")]) -> None:
    """Check every file of a bundle and show what it guards, without loading any weights."""
    with errors_for_people():
        manifest, digest = read_manifest(bundle)
        check_files(bundle, manifest)
        Console().print(manifest_table(manifest))
        Console().print(f"all {len(manifest.files)} files are intact; digest {digest}")


@app.command("recalibrate")
def recalibrate_command(
    export: Annotated[
        Path, typer.Argument(help="AuditedTraffic, with texts and marks, by psim audit.")
    ],
    bundle: Annotated[Path, typer.Option(help="Bundle to start from; it is left as it is.")],
    out: Annotated[Path, typer.Option(help="Folder for the new bundle; must not exist yet.")],
    max_rise: Annotated[
        float,
        typer.Option(help="By how many standard deviations thresholds may rise since psim fit."),
    ] = MAX_RISE,
    accept_misses: Annotated[
        bool,
        typer.Option("--accept-misses", help="Even if texts that were marked poisoned pass."),
    ] = False,
) -> None:
    """Make a bundle with new thresholds, from the audited clean traffic of another."""
    with errors_for_people():
        if out.exists():
            raise DataError(f"{out} exists already, and nothing is replaced; choose another --out")
        check_writable(out, force=False)
        _, digest = read_manifest(bundle)
        new = recalibrate(bundle, read_traffic(export, digest))
        Console().print(recalibration_table(new.record))
        check(new.record, max_rise, accept_misses)
        write(new, out)
        stderr.print(f"wrote {out}; next: psim serve --bundle {out}", highlight=False)


@app.command("sign")
def sign_command(
    bundle: Annotated[Path, typer.Argument(help="Bundle to sign.")],
    key: Annotated[Path, typer.Option(help="Private key (Ed25519, PEM).")],
) -> None:
    """Sign a bundle, so that a service with PSIM_BUNDLE_KEY takes it."""
    with errors_for_people():
        manifest, _ = read_manifest(bundle)
        check_files(bundle, manifest)
        stderr.print(f"wrote {sign(bundle / MANIFEST, key)}", highlight=False)


@app.command("serve")
def serve_command(
    bundle: Annotated[Path, typer.Option(help="Bundle to serve.")],
    host: Annotated[str | None, typer.Option(help="Address; PSIM_HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; PSIM_PORT.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="enforce, sanitize, flag or shadow; PSIM_MODE.")
    ] = None,
) -> None:
    """Serve a bundle over HTTP; all other settings come from PSIM_* variables."""
    given = {"BUNDLE": bundle, "HOST": host, "PORT": port, "MODE": mode}
    settings = {f"PSIM_{key}": str(value) for key, value in given.items() if value is not None}
    # A new process image: the service never shares one with the offline half.
    os.execve(sys.executable, [sys.executable, "-m", "service"], os.environ | settings)  # noqa: S606


HANDED_OVER: dict[str, Any] = {
    "context_settings": {
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
}
"""Of commands whose arguments the service reads."""


@app.command("audit", **HANDED_OVER)
def audit_command(context: typer.Context) -> None:
    """Export what a service decided, by time and decision, as JSONL or CSV."""
    _hand_over("service.audit", context.args)


@app.command("keys", **HANDED_OVER)
def keys_command(context: typer.Context) -> None:
    """Make an API key of a service."""
    _hand_over("service.security.keys", context.args)


def _hand_over(module: str, arguments: list[str]) -> None:
    command = [sys.executable, "-m", module, *arguments]
    os.execve(sys.executable, command, os.environ)  # noqa: S606 - as for serve


@app.command("demo")
def demo_command(
    serve: Annotated[bool, typer.Option(help="Serve the bundle when it is built.")] = True,
    port: Annotated[int, typer.Option(help="Port to serve on.")] = 8000,
) -> None:
    """Poison a small victim, guard it, and serve it: built once, then cached."""
    with errors_for_people():
        built = demo_bundle.build()
    Console().print(demo_bundle.introduction(port), highlight=False, markup=False, soft_wrap=True)
    if serve:
        os.environ.setdefault("PSIM_LOG_LEVEL", "WARNING")  # the introduction stays in sight
        serve_command(built, port=port)


if __name__ == "__main__":
    app()
