"""How far PSIM tells poisoned from clean texts at each step of its training.

Why there are several checkpoints: a plot of the AUROC (score against clean texts of the same class,
poisoned texts on which the backdoor fires) of the adapter at each step, beside that of the
checkpoints that `psim fit` would have kept so far, the most extreme of which speaks; and the same
as JSON. Choose settings on dev texts, never on the test set.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure

from models.detection.calibrate import calibrate
from models.detection.screen import FloatArray, Layout
from models.engines.pytorch import TorchEngine
from models.offline.evaluation.metrics import auroc, within_class_scores
from models.offline.fitting.psim import retention, train_psim
from models.offline.fitting.split import split_texts
from models.offline.io.classifiers import load_classifier
from models.offline.io.inference import predict
from models.offline.io.samples import load_samples
from models.offline.study.ablations import PsimVariant, with_variant

EVERY, CALIBRATION_TEXTS, MAX_LENGTH = PsimVariant().check_every, 800, 128


@dataclass
class Look:
    """PSIM's probabilities at one step, shape (n, 1, C) each; or up to it, shape (n, K, C)."""

    step: int
    retention: float
    known: FloatArray
    clean: FloatArray
    poisoned: FloatArray

    @property
    def auroc(self) -> float:
        screen = calibrate(self.known, Layout(self.known.shape[1]), 0.01)
        scores = [
            within_class_scores([screen.judge(row) for row in rows])
            for rows in (self.clean, self.poisoned)
        ]
        return auroc(*scores) or 0.0


def looks_at(
    victim: str, texts: list[str], clean: list[str], poisoned: list[str], target: str,
    config: PsimVariant,
) -> list[Look]:  # fmt: skip
    torch.manual_seed(config.seed)
    model: Any
    model, tokenizer = load_classifier(victim)
    target_index = model.config.label2id[target]
    guarded = with_variant(model, config)
    engine = TorchEngine(guarded, tokenizer, MAX_LENGTH)
    split = split_texts(texts, config.seed)
    known, *sets = (
        engine.encode(t) for t in (split.calibrate[:CALIBRATION_TEXTS], clean, poisoned)
    )
    fires = predict(engine, sets[1], classifier=True).argmax(1) == target_index
    sets[1] = [text for text, fired in zip(sets[1], fires, strict=True) if fired]
    looks: list[Look] = []
    start: list[float] = []

    def look(step: int, confidence: float) -> None:
        start.append(confidence)
        left = retention(confidence, start[0], model.config.num_labels)
        # Not the peak of attention, which training does not change.
        seen = (predict(engine, s)[:, : len(guarded.checkpoints)] for s in (known, *sets))
        looks.append(Look(step, left, *seen))
        print(f"step {step}, clean retention {left:.2f}, AUROC {looks[-1].auroc:.4f}")

    encoded = engine.encode(split.train), engine.encode(split.held_out)
    train_psim(guarded, *encoded, config, int(tokenizer.pad_token_id or 0), look)
    return looks


def kept_so_far(looks: list[Look]) -> list[Look]:
    """Return what the checkpoints kept so far say at each step."""
    result = []
    for number, look in enumerate(looks):
        first = [
            next((n for n in range(number + 1) if looks[n].retention <= share), None)
            for share in PsimVariant().keep_at
        ]
        kept = [looks[n] for n in first if n is not None]
        stacked = (
            np.concatenate([getattr(k, kind) for k in kept], axis=1)
            for kind in ("known", "clean", "poisoned")
        )
        result.append(Look(look.step, look.retention, *stacked))
    return result


def plot(curves: dict[str, list[float]], steps: list[int]) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for (name, values), style in zip(curves.items(), ("-", "-", "--"), strict=True):
        axes.plot(steps, values, style, label=name)
    axes.set(xlabel="step", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main(
    victim: str,
    target_label: str,
    texts: Annotated[str, typer.Option(help="Clean texts to fit on.")],
    clean: Annotated[str, typer.Option(help="Clean dev texts.")],
    poisoned: Annotated[str, typer.Option(help="Poisoned dev texts.")],
    out: Annotated[Path, typer.Option(help="PNG; JSON goes beside it.")],
    rate: float = PsimVariant().learning_rate,
    values_only: Annotated[bool, typer.Option(help="Leave the queries alone.")] = False,
    steps: int = 200,
    size: Annotated[int, typer.Option(help="Dev texts of either kind.")] = 300,
) -> None:
    read = [
        [s.text for s in load_samples(source, drop_empty=True)]
        for source in (texts, clean, poisoned)
    ]
    config = PsimVariant(
        learning_rate=rate, max_steps=steps, check_every=EVERY, keep_at=(-1.0,),
        adapter="value" if values_only else "query-value",
    )  # fmt: skip
    looks = looks_at(victim, read[0], read[1][:size], read[2][:size], target_label, config)
    curves = {
        "AUROC of the adapter at this step": [look.auroc for look in looks],
        "AUROC of the checkpoints kept so far": [look.auroc for look in kept_so_far(looks)],
        "share of the clean texts' confidence that is left": [look.retention for look in looks],
    }
    taken = [look.step for look in looks]
    plot(curves, taken).savefig(out, dpi=110)
    out.with_suffix(".json").write_text(json.dumps({"step": taken} | curves, indent=1))


if __name__ == "__main__":
    typer.run(main)
