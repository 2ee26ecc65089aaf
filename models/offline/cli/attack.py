"""Subcommands of experiments: `psim poison`, `psim finetune` and `psim attack`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from models.errors import DataError
from models.offline.attacks.strategy import Strategy
from models.offline.cli.console import say, stdout
from models.offline.cli.options import Force, Out, Seed, Target, Texts

if TYPE_CHECKING:
    from models.offline.attacks.poisoning import Attack, Insertion
    from models.offline.attacks.training import TuneResult

app = typer.Typer()


class AttackName(StrEnum):
    """The attacks of Zhao et al., section 5.1."""

    BADNET = "badnet"
    INSENT = "insent"
    SYNATTACK = "synattack"


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
    from models.offline.attacks.training import poison_victim
    from models.offline.io.atomic import check_writable
    from models.offline.io.samples import load_samples

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
    from models.offline.attacks.training import finetune_victim
    from models.offline.io.atomic import check_writable
    from models.offline.io.samples import load_samples

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
    from models.offline.attacks.poisoning import poison_test_set
    from models.offline.io.samples import load_samples, require_labels, write_samples

    if out.exists():
        raise DataError(f"{out} exists already; choose another --out")
    samples = load_samples(texts)
    require_labels(samples)
    poisoned = poison_test_set(samples, insertion(attack, trigger), target_label, seed)
    write_samples(out, poisoned)
    say(f"wrote {len(poisoned)} poisoned texts to {out}")


def make_attack(attack: AttackName, trigger: str | None, paraphrases: str | None) -> "Attack":
    """Build the attack that the command line names."""
    from models.offline.attacks.poisoning import Paraphrases
    from models.offline.io.samples import load_samples

    if attack is not AttackName.SYNATTACK:
        return insertion(attack, trigger)
    if paraphrases is None:
        raise DataError("synattack needs --paraphrases FILE: texts in the syntactic template")
    return Paraphrases(tuple(load_samples(paraphrases)))


def insertion(attack: AttackName, trigger: str | None) -> "Insertion":
    """Build an attack that code can make."""
    from models.offline.attacks.poisoning import SENTENCE_TRIGGER, WORD_TRIGGER, Insertion

    if attack is AttackName.SYNATTACK:
        raise DataError("synattack needs a paraphraser; give its file to evaluate as it is")
    default = WORD_TRIGGER if attack is AttackName.BADNET else SENTENCE_TRIGGER
    return Insertion((trigger or default,))


def show_result(result: "TuneResult") -> None:
    """Print what training achieved on the dev texts."""
    line = f"clean accuracy {result.clean_accuracy:.1%}"
    if result.attack_success_rate is not None:
        line += f", attack success rate {result.attack_success_rate:.1%}"
    stdout.print(f"{line} (dev); wrote {result.out}", highlight=False)
