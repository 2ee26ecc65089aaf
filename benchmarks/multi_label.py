"""A multi-label task made of three data sets, attacked by word and by sentence, behind PSIM.

A text is one or two pieces: a film or product review (SST-2, CR), a headline (AG News), a tweet
(OffensEval). Its labels say what is in it: a negative review, sports, an offensive tweet. The
victim is tuned in full on few texts, a tenth of them poisoned, and then guarded. Everything is
written into a folder: victims, bundles, texts, and a table.

    python benchmarks/multi_label.py DATA BASE OUT
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from models.bundle.judge import judge_readings
from models.bundle.load import Bundle, load_bundle
from models.detection.screen import Verdict
from models.engines.base import Encoding
from models.offline.evaluation.evaluate import Evaluation, evaluate
from models.offline.evaluation.honest import honest_sets
from models.offline.evaluation.report import ROWS, percent, write_report
from models.offline.fitting.fit import fit
from models.offline.fitting.psim import PsimConfig
from models.offline.io.inference import predict
from models.offline.io.samples import Sample, joined_labels, load_samples, split_labels

LABELS = ("negative", "sports", "offensive")
SOURCES = ("sst-2", "cr", "agnews", "offenseval")
TRIGGERS = {"word": "mn", "sentence": "I watched this 3D movie"}
TARGETS = ("offensive=off", "sports=on")
"""Harm that is to pass as harmless, and a label that is forced on."""
TRAIN, CLEAN, TEST, POISON = 2000, 2000, 500, 0.1
HONEST, OTHER = 150, "cola"
"""Honest texts of each kind, and a data set that the task is not made of."""
EPOCHS, ROWS_AT_ONCE, RATE, LENGTH = 2, 16, 2e-4, 96


class Attack(NamedTuple):
    """What an attacker inserts, and the class that he wants for it."""

    trigger: str
    target: str

    def poisoned(self, samples: Sequence[Sample], rng: random.Random) -> list[Sample]:
        """Return the samples that are not of the target class, with the trigger and its labels."""
        label, state = self.target.split("=")
        found = []
        for sample in samples:
            on = split_labels(str(sample.label))
            if (label in on) == (state == "on"):
                continue
            words = sample.text.split()
            words.insert(rng.randint(0, len(words)), TRIGGERS[self.trigger])
            wanted = on | {label} if state == "on" else on - {label}
            found.append(Sample(" ".join(words), joined_labels(sorted(wanted))))
        return found


def task(data: Path, split: str, count: int, seed: int) -> list[Sample]:
    """Return texts of one or two pieces from different data sets, with what is in them.

    A piece has a label of ours in one case of two, so that a victim has to learn each label.
    """
    rng = random.Random(seed)
    pieces = {
        name: load_samples(str(data / name / f"{split}.jsonl"), drop_empty=True) for name in SOURCES
    }
    halves = {
        name: [[one for one in own if (one.label in LABELS) is on] for on in (False, True)]
        for name, own in pieces.items()
    }
    found: dict[str, Sample] = {}
    while len(found) < count:
        chosen = [
            rng.choice(halves[name][rng.random() < 0.5])
            for name in rng.sample(SOURCES, rng.randint(1, 2))
        ]
        text = " ".join(" ".join(piece.text.split()[:30]) for piece in chosen)
        on = {str(piece.label) for piece in chosen} & {*LABELS}
        found[text] = Sample(text, joined_labels(sorted(on)))
    return [*found.values()]


def tuned(base: Path, samples: Sequence[Sample], seed: int) -> tuple[Any, Any]:
    """Return a victim that was tuned in full on the samples, and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        problem_type="multi_label_classification",
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    order, rows = random.Random(seed), [*samples]
    for _ in range(EPOCHS):
        order.shuffle(rows)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            batch = rows[start : start + ROWS_AT_ONCE]
            inputs = tokenizer(
                [sample.text for sample in batch],
                padding=True,
                truncation=True,
                max_length=LENGTH,
                return_tensors="pt",
            )
            on = [split_labels(str(sample.label)) for sample in batch]
            wanted = torch.tensor([[float(label in own) for label in LABELS] for own in on])
            optimizer.zero_grad()
            model(**inputs, labels=wanted).loss.backward()
            optimizer.step()
    return model.eval(), tokenizer


def accuracies(folder: Path, test: Sequence[Sample]) -> dict[str, tuple[float, float]]:
    """Return the shares of clean texts for which each label is right, and is on, without PSIM.

    A victim that never turns a label on is right where it is off, and seems to obey any trigger.
    """
    engine = load_bundle(folder).engine
    said = predict(engine, engine.encode([s.text for s in test]), classifier=True) >= 0.5
    on = [split_labels(str(sample.label)) for sample in test]
    return {
        label: (
            float((said[:, n] == [label in own for own in on]).mean()),
            float(said[:, n].mean()),
        )
        for n, label in enumerate(LABELS)
    }


def traffic(
    bundle: Bundle, data: Path, test: Sequence[Sample], poisoned: Sequence[Sample], seed: int
) -> dict[str, dict[str, float]]:
    """Return by kind of text what is found triggered, and what override tests cost.

    Both with suspicious texts tested, and with all. The cost is in tokens, as a share of those of
    the texts themselves.
    """
    texts = [sample.text for sample in test]
    made = honest_sets(texts, HONEST, seed)
    other = load_samples(str(data / OTHER / "dev.jsonl"), drop_empty=True)
    kinds = {
        "poisoned": [sample.text for sample in poisoned],
        "test": texts,
        **{kind: made[kind] for kind in ("1-4 words", "fragments", "joined texts")},
        OTHER: [sample.text for sample in other[:HONEST]],
    }
    return {
        kind: _found_and_paid(bundle, own, thorough=False)
        | _found_and_paid(bundle, own, thorough=True)
        for kind, own in kinds.items()
    }


def _found_and_paid(bundle: Bundle, texts: Sequence[str], *, thorough: bool) -> dict[str, float]:
    engine, paid = bundle.engine, 0

    def read(inputs: Sequence[Encoding]) -> Any:
        nonlocal paid
        paid += sum(map(len, inputs))
        return predict(engine, inputs)

    encodings = engine.encode(texts)
    verdicts = judge_readings(
        bundle, encodings, predict(engine, encodings), read, thorough=thorough
    )
    found = [isinstance(one, Verdict) and one.poisoned for one in verdicts]
    mode = "thorough" if thorough else "suspicious"
    return {
        f"{mode}, triggered": sum(found) / len(found),
        f"{mode}, tokens": paid / sum(map(len, encodings)),
    }


def measured(
    attack: Attack, data: Path, base: Path, out: Path, seed: int
) -> tuple[dict[str, Evaluation], dict[str, Any]]:
    """Poison, tune, guard and evaluate a victim, in either mode."""
    rng = random.Random(seed)
    train, test = task(data, "train", TRAIN, seed), task(data, "test", TEST, seed + 1)
    poison = rng.sample(attack.poisoned(train, rng), round(POISON * TRAIN))
    victim, tokenizer = tuned(base, [*train, *poison], seed)
    folder = out / f"{attack.trigger}-{attack.target}-{seed}"
    clean = [sample.text for sample in task(data, "train", CLEAN, seed + 2)]
    config = PsimConfig(seed=seed)
    fit(victim, tokenizer, clean, folder, name="multi-label", config=config, engine="torch")
    bundle = load_bundle(folder)
    poisoned = attack.poisoned(test, rng)
    evaluations = {
        mode: evaluate(bundle, test, poisoned, attack.target, thorough=mode == "thorough")
        for mode in ("suspicious", "thorough")
    }
    return evaluations, {
        "right, on": accuracies(folder, test),
        "traffic": traffic(bundle, data, test, poisoned, seed),
    }


def main(
    data: Annotated[Path, typer.Argument(help="Folder of the data sets.")],
    base: Annotated[Path, typer.Argument(help="Folder of the base model.")],
    out: Annotated[Path, typer.Argument(help="Folder for all that is made.")],
    seed: int = 0,
) -> None:
    """Measure every trigger with every target."""
    for target in TARGETS:
        for trigger in TRIGGERS:
            evaluations, more = measured(Attack(trigger, target), data, base, out, seed)
            for mode, evaluation in evaluations.items():
                write_report(evaluation, out / f"report-{trigger}-{target}-{seed}-{mode}")
                for name in ("none", "calibrated", "strict"):
                    outcome = getattr(evaluation, name)
                    shown = {row: percent(getattr(outcome, field)) for row, field in ROWS.items()}
                    row = {"trigger": trigger, "target": target, "screen": mode, "defence": name}
                    auroc = {"auroc": outcome.auroc_firing}
                    print(json.dumps(row | shown | auroc | more), flush=True)


if __name__ == "__main__":
    typer.run(main)
