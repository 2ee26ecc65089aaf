"""How far PSIM tells poisoned from clean texts at each step of its training, by setting.

Why the defaults are what they are: a plot of the AUROC (within-class score, poisoned texts on which
the backdoor fires) and of the clean confidence that is left, and the same as JSON. Choose settings
on dev texts, never on the test set.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from models.engines.pytorch import TorchEngine
from models.guarded import guard
from models.offline.calibrate import calibrate, predict
from models.offline.data import load_samples
from models.offline.fit import adapter_config, split_texts
from models.offline.measures import within_class_scores
from models.offline.psim import PsimConfig, train_psim
from models.offline.victim import load_classifier
from models.screen import Screen


@dataclass
class Trajectory:
    """One training run; lists are parallel."""

    setting: str
    steps: list[int] = field(default_factory=list)
    clean_confidence: list[float] = field(default_factory=list)
    auroc: list[float] = field(default_factory=list)


def run(
    victim: str, texts: list[str], clean: list[str], poisoned: list[str], target: str,
    rate: float, queries: bool, steps: int,
) -> Trajectory:  # fmt: skip
    torch.manual_seed(0)
    model: Any
    model, tokenizer = load_classifier(victim)
    psim = PsimConfig(
        learning_rate=rate, max_steps=steps, check_every=20, keep_at=(-1.0,),
        adapter="query-value" if queries else "value",
    )  # fmt: skip
    target_index = model.config.label2id[target]
    guarded = guard(model, adapter_config(model, psim))
    engine = TorchEngine(guarded, tokenizer, 128)
    split = split_texts(texts, 0)
    sets = [engine.encode(t) for t in (split.calibrate[:600], clean, poisoned)]
    fires = predict(engine, sets[2], classifier=True).argmax(1) == target_index
    result = Trajectory(f"{'queries and values' if queries else 'values'}, rate {rate:g}")

    def look(step: int, confidence: float) -> None:
        calibration, *scored = (predict(engine, s) for s in sets)
        screen = Screen(calibrate(calibration, 0.01))
        scores = [within_class_scores([screen.judge(row) for row in rows]) for rows in scored]
        scores[1] = scores[1][fires]
        truth = np.repeat([0, 1], [len(s) for s in scores])
        result.steps.append(step)
        result.clean_confidence.append(confidence)
        result.auroc.append(float(roc_auc_score(truth, np.concatenate(scores))))
        print(
            f"{result.setting}: step {step}, clean {confidence:.3f}, AUROC {result.auroc[-1]:.4f}"
        )

    encoded = engine.encode(split.train), engine.encode(split.held_out)
    train_psim(guarded, *encoded, psim, int(tokenizer.pad_token_id or 0), look)
    return result


def plot(trajectories: list[Trajectory]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("auroc", "clean_confidence"), strict=True):
        for trajectory in trajectories:
            axes.plot(trajectory.steps, getattr(trajectory, name), label=trajectory.setting)
        axes.set(xlabel="step", title=name.replace("_", " ").replace("auroc", "AUROC"))
        axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main(
    victim: str,
    texts: Annotated[str, typer.Option(help="Clean texts to fit on.")],
    clean: Annotated[str, typer.Option(help="Clean dev texts.")],
    poisoned: Annotated[str, typer.Option(help="Poisoned dev texts.")],
    target_label: str,
    out: Annotated[Path, typer.Option(help="PNG; JSON goes beside it.")],
    steps: int = 240,
    size: Annotated[int, typer.Option(help="Dev texts of either kind.")] = 300,
) -> None:
    read = [[s.text for s in load_samples(source)] for source in (texts, clean, poisoned)]
    fit, clean_texts, poisoned_texts = read[0], read[1][:size], read[2][:size]
    settings = [(1e-4, False), (5e-4, False), (2e-3, False), (1e-4, True), (2e-3, True)]
    trajectories = [
        run(victim, fit, clean_texts, poisoned_texts, target_label, rate, queries, steps)
        for rate, queries in settings
    ]
    plot(trajectories).savefig(out, dpi=110)
    out.with_suffix(".json").write_text(json.dumps([vars(t) for t in trajectories], indent=1))


if __name__ == "__main__":
    typer.run(main)
