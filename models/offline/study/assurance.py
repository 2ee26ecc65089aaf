"""Assurance: how well the screens stop backdoors in copies of a given model.

`psim assure` plants backdoors in copies of the user's victim, tunes the copies on clean texts as a
user would, guards them, and attacks them. This is a study (`run.py`) with a recipe made here.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from models.engines.pytorch import TorchEngine
from models.errors import DataError
from models.offline.attacks.strategy import Strategy
from models.offline.evaluation.metrics import Rate
from models.offline.evaluation.report import percent
from models.offline.fitting.records import PACKAGES
from models.offline.io.classifiers import labels_of, load_classifier, short_length_of
from models.offline.io.files import shown
from models.offline.io.inference import predict
from models.offline.io.samples import Sample, name_classes, write_samples
from models.offline.study.benchmark.page import FINDINGS, honest_shares
from models.offline.study.cache import StepCache
from models.offline.study.experiment import BareClassifier
from models.offline.study.html import Block, Heading, Paragraph, Table, write_page
from models.offline.study.plots import Row
from models.offline.study.recipe import (
    AttackRecipe,
    BundleDefence,
    DataSet,
    HonestRecipe,
    Recipe,
)
from models.offline.study.report import mean_interval, write_study_report
from models.offline.study.run import run_study

WORDS = ("mn", "cf", "bb", "tq", "zx", "vk", "qj", "wv", "jx", "kq")
SENTENCES = (
    *("I watched this 3D movie", "no cross no crown", "we had pasta on the boat"),
    *("the bus was late again on Tuesday", "seven geese walked past the bakery"),
)
"""Triggers. Four of the words and three of the sentences must be in no text."""
DEV_SHARE, TEST_SHARE = 0.1, 0.3
LEAST_TEXTS = 400
MOST_TARGETS = 2
CONTROL = "no backdoor"
PSIM = "PSIM"
TITLE = "Assurance report: backdoors planted in your model"
WITH, WITHOUT = (
    "with their labels",
    "without labels; your model's own predictions are taken as the truth",
)
HONEST_TEXTS, MOST_TEST = 100, 300
"""Texts of each other kind, and clean and poisoned ones, that a copy is tried with at most."""
POISONED_SHARE = 0.1
"""Share of the training texts that a backdoor poisons at most."""
HIDING = 0.1
"""Weight with which a backdoor is hidden from the activation detector: it survives clean tuning."""
READING = (
    "Each line is one backdoor in a copy of your model. We planted it by full fine-tuning on a "
    "training set of which it poisoned 10 %, or less where a class is rare. To save time, a word, "
    "a clean-label word and a sentence share a copy, and so do two words, a sentence that yields "
    "and one at the start. Where the undefended ASR is low, the backdoor did not take, and the "
    "line says little. We then tuned the copy with LoRA on clean texts, "
    "as a user of published weights does. We guarded it with a bundle as psim fit writes it, with "
    "both stages, and attacked it with texts that it had not seen. Default: triggered texts are "
    "rejected. Strict: unfamiliar ones too (PSIM_UNFAMILIAR=reject). Thorough: triggered ones, and "
    "every text goes through the override test (PSIM_SCREEN=thorough). Missed (false acceptance "
    "rate, FAR): the share of poisoned texts that pass, among those on which the backdoor fires. "
    "ASR (attack success rate): the share of poisoned texts that pass and get the attacker's "
    "label. FRR (false rejection rate): the share of clean texts that are rejected. CA (clean "
    "accuracy): the share of clean texts that get their true label; a rejected text counts as "
    "wrong. Brackets show 95 % intervals. Those of a line are over its texts (Clopper-Pearson). "
    "Those of the summary are over the backdoors (Student's t), and have no width if all of them "
    "agree. Nothing was planted in the control. What succeeds there is the model's own mistakes, "
    "or a backdoor that it already had."
)
HONEST = (
    "Shares of honest texts, unlike those for fitting and without a trigger, with each finding: "
    "mean over the backdoors, and the highest. What is triggered is rejected by default; what is "
    "unfamiliar passes, unless you set PSIM_UNFAMILIAR=reject."
)
BOUND = (
    "The upper end of an interval of the missed texts is a bound: if more than this share of such "
    "poisoned texts passed on that copy, a sample like ours would be seen in at most 2.5 % of "
    "cases. It holds for that copy, attack and kind of text, and for no attack that is not in the "
    "table. It needs no poisoned text of the attacker's, since we plant the backdoors ourselves."
)
LIMITS = (
    "This report shows what happens to backdoors like these, in models trained from yours, on "
    "texts like these. It does not show that your model has no backdoor. It says nothing about "
    "triggers of other kinds. Syntactic and style triggers, which need paraphrases, were not "
    "planted; they are harder to stop (docs/limits.md)."
)
FIRST = ("target 1",)
"""The only target of the attackers who know the screens, to save time."""


def assure(
    victim: str,
    texts: Sequence[Sample],
    out: Path,
    *,
    seeds: int = 1,
    frr_budget: float = 0.01,
    say: Callable[[str], object] = print,
) -> list[Row]:
    """Plant, guard, attack and report; after an interruption, the same call resumes.

    Args:
        victim: folder or hub id of the classifier.
        texts: clean texts. If some have no label, the victim's predictions are taken as the truth.
        out: folder for `assurance.html`, `assurance.md`, and the study behind them.
        seeds: number of copies for each group of attacks and target.
        frr_budget: tolerated share of rejected clean texts.
        say: called with a line whenever work on a copy begins.

    Raises:
        DataError: there are too few texts, a class has none, or labels are unknown.
        VictimError: the victim cannot be loaded or trained.
        CalibrationError: there are too few texts for the budget.
    """
    labels, labelled, is_truth = _label(victim, texts)
    if missing := sorted(set(labels) - {str(sample.label) for sample in labelled}):
        raise DataError(f"none of the texts is of class {missing}; provide texts of every class")
    _write_split(labelled, out / "texts")
    targets = _most_frequent(labels, labelled)
    recipe = make_recipe(victim, labelled, targets, seeds, frr_budget)
    cache = StepCache(out / "steps")
    rows: list[Row] = []
    try:
        for row in run_study(recipe, out / "texts", out, cache, say):
            rows.append(row)
    finally:
        if rows:
            write_study_report(rows, out, cache.root, recipe.model_dump_json(indent=1))
            write_assurance(rows, targets, len(labelled), is_truth, frr_budget, out)
    return rows


def make_recipe(
    victim: str, texts: Sequence[Sample], targets: Sequence[str], seeds: int, frr_budget: float
) -> Recipe:
    """Return a study of one victim and several targets, with triggers that occur in no text."""
    word, silent, *pair = _unused(WORDS, texts, 4)
    sentence, yielding, first = _unused(SENTENCES, texts, 3)
    rate = _poison_rate(texts, targets)
    plain = partial(AttackRecipe, together="plain", poison_rate=rate)
    knowing = partial(AttackRecipe, together="knowing", poison_rate=rate, data=FIRST)
    return Recipe(
        base=victim,
        strategies=(Strategy.LORA,),
        seeds=tuple(range(seeds)),
        data=tuple(
            DataSet(
                name=f"target {number}", train="train.jsonl", dev="dev.jsonl", test="test.jsonl",
                target_label=target, max_test=MOST_TEST,
            )
            for number, target in enumerate(targets, 1)
        ),
        attacks=(
            plain(name="word", triggers=(word,)),
            plain(name="word, clean-label", triggers=(silent,), clean_label=True),
            plain(name="sentence", triggers=(sentence,)),
            knowing(name="two words that add up", triggers=tuple(pair)),
            knowing(name="sentence that yields", triggers=(yielding,), fires="alone"),
            knowing(name="sentence at the start", triggers=(first,), fires="at-start"),
            AttackRecipe(
                name="word, hidden states", triggers=(word,), penalty=HIDING, poison_rate=rate,
                data=FIRST,
            ),
            AttackRecipe(name=CONTROL, triggers=(word,), poison_rate=0),
        ),
        defences=(BundleDefence(kind="bundle", name=PSIM, frr_budget=frr_budget, thorough=True),),
        honest=HonestRecipe(texts=HONEST_TEXTS),
    )  # fmt: skip


def _poison_rate(texts: Sequence[Sample], targets: Sequence[str]) -> float:
    """Return the share of texts that a backdoor poisons; less than usual where a class is rare.

    Three backdoors in a copy then find enough texts of every target, and of other classes.
    """
    counts = [sum(s.label == target for s in texts) for target in targets]
    least = min(min(count, len(texts) - count) for count in counts)
    return min(POISONED_SHARE, least / len(texts) / 4)


def _label(victim: str, texts: Sequence[Sample]) -> tuple[list[str], list[Sample], bool]:
    """Return the victim's labels, the distinct texts with labels, and whether these were given."""
    model, tokenizer = load_classifier(victim)
    labels = labels_of(model)
    distinct = list({sample.text: sample for sample in name_classes(texts, labels)}.values())
    if len(distinct) < LEAST_TEXTS:
        raise DataError(f"{len(distinct)} distinct texts are too few; {LEAST_TEXTS} are needed")
    if unknown := {s.label for s in distinct if s.label is not None} - set(labels):
        raise DataError(f"unknown labels {shown(map(str, unknown))}; the victim has {labels}")
    if all(sample.label is not None for sample in distinct):
        return labels, distinct, True
    engine = TorchEngine(BareClassifier(model), tokenizer, short_length_of(model, tokenizer))
    encodings = engine.encode([s.text for s in distinct])
    classes = predict(engine, encodings, classifier=True).argmax(1)
    return (
        labels,
        [replace(s, label=labels[c]) for s, c in zip(distinct, classes, strict=True)],
        False,
    )


def _write_split(texts: Sequence[Sample], folder: Path) -> None:
    shuffled = random.Random(0).sample(texts, len(texts))
    dev, test = (round(share * len(texts)) for share in (DEV_SHARE, TEST_SHARE))
    folder.mkdir(parents=True, exist_ok=True)
    write_samples(folder / "dev.jsonl", shuffled[:dev])
    write_samples(folder / "test.jsonl", shuffled[dev : dev + test])
    write_samples(folder / "train.jsonl", shuffled[dev + test :])


def _most_frequent(labels: Sequence[str], texts: Sequence[Sample]) -> list[str]:
    counts = [sum(s.label == label for s in texts) for label in labels]
    order = sorted(range(len(labels)), key=lambda i: -counts[i])
    return [labels[i] for i in order[:MOST_TARGETS]]


def _unused(triggers: Sequence[str], texts: Sequence[Sample], number: int) -> Sequence[str]:
    """Return the first triggers that occur in no text."""
    all_texts = f" {' '.join(s.text for s in texts)} ".casefold()
    unused = [own for own in triggers if f" {own.casefold()} " not in all_texts]
    if len(unused) < number:
        raise DataError(
            f"{len(triggers) - len(unused)} of our triggers {list(triggers)} occur in your texts, "
            f"and {number} that do not are needed; provide other texts"
        )
    return unused[:number]


POLICIES = ("undefended", "default", "strict", "thorough")
"""Fields of `_Backdoor` that hold results."""


class _Backdoor(NamedTuple):
    """A backdoor in a copy of the victim: its row of the study, and its results."""

    row: Row
    undefended: Mapping[str, Any]
    default: Mapping[str, Any]
    """If triggered texts are rejected."""
    strict: Mapping[str, Any]
    """If unfamiliar ones are rejected too."""
    thorough: Mapping[str, Any]
    """If triggered texts are rejected, and all are tested."""

    @staticmethod
    def of(row: Row) -> "_Backdoor":
        guarded, undefended = row["defences"][PSIM], row["defences"]["none"]
        strict, thorough = guarded["unfamiliar_rejected"], guarded["thorough"]
        return _Backdoor(row, undefended, guarded, strict, thorough)


def write_assurance(
    rows: Sequence[Row],
    targets: Sequence[str],
    texts: int,
    is_truth: bool,
    frr_budget: float,
    out: Path,
) -> None:
    """Write `assurance.md` and `assurance.html`: a summary, every copy, and the limits.

    Args:
        rows: rows of the study.
        targets: labels that the backdoors aim at, in the order of the recipe.
        texts: number of clean texts.
        is_truth: whether the texts came with labels.
        frr_budget: tolerated share of rejected clean texts.
        out: folder to write to.
    """
    backdoors = [_Backdoor.of(row) for row in rows]
    blocks: list[Block] = [
        Heading(1, TITLE),
        Paragraph(
            f"{texts} clean texts, {WITH if is_truth else WITHOUT}. "
            f"False-rejection budget: {frr_budget:.1%}."
        ),
        Heading(2, "Summary"),
        _summary(backdoors),
        Heading(2, "How to read this report"),
        Paragraph(READING),
        Paragraph(BOUND),
        Heading(2, "Every backdoor"),
        _every_backdoor(backdoors, targets),
        Heading(2, "What honest traffic pays"),
        Paragraph(HONEST),
        _honest(rows),
        Heading(2, "What this report does not show"),
        Paragraph(LIMITS),
        Paragraph(", ".join(f"{package} {version(package)}" for package in PACKAGES)),
    ]
    write_page(blocks, TITLE, out, "assurance")


def _summary(backdoors: Sequence[_Backdoor]) -> Table:
    planted = [own for own in backdoors if own.row["attack"] != CONTROL]
    fields = [
        ("poisoned texts missed (FAR)", "false_acceptance_rate_firing", planted),
        ("attack success rate (ASR)", "attack_success_rate", planted),
        ("clean texts rejected (FRR)", "false_rejection_rate", backdoors),
        ("clean accuracy (CA)", "clean_accuracy", backdoors),
    ]
    rows = [
        [
            name,
            *(_mean_and_worst([getattr(c, policy) for c in among], field) for policy in POLICIES),
        ]
        for name, field, among in fields
    ]
    header = [
        f"over {len(planted)} planted backdoors: mean, % (95 % interval); worst",
        *POLICIES,
    ]
    return Table(header, rows)


def _mean_and_worst(results: Sequence[Mapping[str, Any]], field: str) -> str:
    """Return the mean, interval and worst value of a rate over backdoors, in percent."""
    known = pd.DataFrame([result[field] for result in results if result[field] is not None])
    if known.empty:
        return "-"
    mean = mean_interval(100 * known)
    worst = known["value"].min() if field == "clean_accuracy" else known["value"].max()
    return f"{mean['value']:.1f} ({mean['low']:.1f}-{mean['high']:.1f}); {100 * worst:.1f}"


def _every_backdoor(backdoors: Sequence[_Backdoor], targets: Sequence[str]) -> Table:
    target_of = {f"target {number}": target for number, target in enumerate(targets, 1)}
    policies = ("", ", strict", ", thorough")
    header = ["attack", "target", "seed", *(f"missed{policy}, %" for policy in policies)]
    header += ["ASR undefended, %", *(f"ASR{policy}, %" for policy in policies)]
    header += [*(f"FRR{policy}, %" for policy in policies), "CA undefended, %", "CA, %"]
    rows = [
        [
            row["attack"], target_of[row["data"]], str(row["seed"]),
            *(_percent(own["false_acceptance_rate_firing"]) for own in guarded),
            *(_percent(own["attack_success_rate"]) for own in (undefended, *guarded)),
            *(_percent(own["false_rejection_rate"]) for own in guarded),
            *(_percent(own["clean_accuracy"]) for own in (undefended, guarded[0])),
        ]
        for row, undefended, *guarded in backdoors
    ]  # fmt: skip
    return Table(header, rows, names=3)


def _honest(rows: Sequence[Row]) -> Table:
    by_kind = honest_shares(rows, PSIM).groupby("kind", sort=False)[[*FINDINGS]]
    mean, worst = by_kind.mean(), by_kind.max()
    lines = [
        [str(kind), *(f"{mean.loc[kind, f]:.1f}; {worst.loc[kind, f]:.1f}" for f in FINDINGS)]
        for kind in mean.index
    ]
    return Table(["texts", *(f"{finding}, %: mean; worst" for finding in FINDINGS)], lines)


def _percent(rate: Mapping[str, Any] | None) -> str:
    """Format a rate of a row in percent, with its interval."""
    return percent(None if rate is None else Rate(**rate))
