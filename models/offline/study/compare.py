"""Defences side by side on one victim: the same texts, the same measures, the same clock."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from models.detection.calibrate import calibrate
from models.engines.pytorch import TorchEngine
from models.offline.evaluation.evaluate import View
from models.offline.evaluation.metrics import Defended, classes_of, outcome
from models.offline.fitting.split import split_texts
from models.offline.io.classifiers import load_classifier, model_digest
from models.offline.io.inference import predict
from models.offline.study.ablations import train_variant
from models.offline.study.baselines import Onion, Strip
from models.offline.study.cache import Step, StepCache, digest_of
from models.offline.study.experiment import (
    SCORES,
    Arena,
    Case,
    Contender,
    alone,
    load_scores,
    relative_time,
    save_scores,
)
from models.offline.study.language_model import load_language_model, train_language_model
from models.offline.study.recipe import (
    OnionDefence,
    ParaphraseDefence,
    PsimDefence,
    Recipe,
    StripDefence,
)

CONFIDENCE_ONLY = ("confidence", "pooled", "paper")
LM_TEXTS = 3000
"""Clean texts that ONION's language model is trained on, where none is given."""


def contest(store: StepCache, recipe: Recipe, case: Case) -> dict[str, Any]:
    """Run all defences of a recipe on a case.

    Returns:
        `published`: what the attack did before the victim was tuned; `defences`: how each did, by
        name; `bare`: the file, below the store's root, of true classes and targets and of what
        the victim predicts without a defence.
    """
    bare = alone(store, case, case.victim)
    arena, published = Arena.load(case, bare), Arena.load(case, alone(store, case, case.published))
    entries = [Contender("none", arena.undefended, 0.0, 1.0, {})]
    for defence in recipe.defences:
        match defence:
            case PsimDefence():
                entries += _psim(store, arena, defence)
            case OnionDefence():
                entries.append(_onion(store, arena, defence))
            case StripDefence():
                entries.append(_strip(store, arena, defence))
            case ParaphraseDefence():
                entries += (_rewritten(store, arena, name) for name in case.paraphrased)
    return {
        "published": asdict(published.undefended),
        "defences": {entry.name: entry.as_row() for entry in entries},
        "bare": str((bare.folder / SCORES).relative_to(store.root)),
    }


def _psim(store: StepCache, arena: Arena, defence: PsimDefence) -> Iterator[Contender]:
    """Fit PSIM once, and judge by each of the rules for thresholds."""
    case = arena.case
    source = case.victim if defence.on == "victim" else case.published
    settings = defence.model_dump(exclude={"name", "rules", "frr_budget"})
    inputs = {"case": case.inputs, "source": source.key, "defence": settings}
    step = store.step("psim", inputs, lambda folder: _fit_psim(folder, case, source, defence))
    readings = load_scores(step.folder / SCORES)
    details = {**step.result, "scores": str((step.folder / SCORES).relative_to(store.root))}
    cost = details.pop("passes"), details.pop("time")
    checkpoints = len(details["checkpoints"])
    for rule, name in zip(defence.rules, defence.names, strict=True):
        # The rules that only look at confidences leave the second screen out.
        heard = checkpoints if rule in CONFIDENCE_ONLY else None
        known = readings["dev" if rule == "dev" else "known"][:, :heard]
        screen = calibrate(known, checkpoints, defence.frr_budget, by_class=rule != "pooled")
        views = [
            View(screen, readings[kind][:, :heard], predicted)
            for kind, predicted in (
                ("clean", arena.predicted_clean),
                ("poisoned", arena.predicted_poisoned),
            )
        ]
        clean, poisoned = (v.paper if rule == "paper" else v.calibrated for v in views)
        yield arena.entry(name, clean, poisoned, *cost, features=known.shape[1], **details)


def _fit_psim(folder: Path, case: Case, source: Step, defence: PsimDefence) -> object:
    started = time.perf_counter()
    model, tokenizer = load_classifier(str(source.folder / "model"))
    split = split_texts([s.text for s in case.train[: defence.texts]], case.seed)
    variant = replace(defence.config, seed=case.seed)
    engine, training = train_variant(model, tokenizer, split, variant)
    engine = TorchEngine(engine.guarded, tokenizer, engine.max_length, case.dtype)
    seconds = time.perf_counter() - started
    texts = {
        "known": split.calibrate,
        "dev": [s.text for s in case.dev],
        "clean": [s.text for s in case.clean],
        "poisoned": case.poisoned,
    }
    readings = {kind: predict(engine, engine.encode(own)) for kind, own in texts.items()}
    save_scores(folder, **readings)
    return {
        "steps": training.steps,
        "checkpoints": training.checkpoints,
        "stopped_because": training.stopped_because,
        "fit_seconds": seconds,
        "passes": engine.forward_passes - 1,
        "time": relative_time(case, lambda batch: predict(engine, engine.encode(batch))),
    }


def _onion(store: StepCache, arena: Arena, defence: OnionDefence) -> Contender:
    case = arena.case
    if defence.language_model is None:
        texts = [s.text for s in case.train[:LM_TEXTS]]
        step = store.step(
            "language-model",
            {"texts": digest_of(texts)},
            lambda folder: train_language_model(texts, folder / "model").name,
        )
        source, key = str(step.folder / "model"), step.key
    else:
        source, key = defence.language_model, model_digest(defence.language_model)

    def make(folder: Path) -> object:
        onion = Onion.fit(load_language_model(source), case.dev, case.classify, case.labels)
        return _run(folder, case, onion)

    return _baseline(store, arena, defence.name, "onion", {"language_model": key}, make)


def _strip(store: StepCache, arena: Arena, defence: StripDefence) -> Contender:
    case = arena.case

    def make(folder: Path) -> object:
        strip = Strip.fit(
            [s.text for s in case.train],
            [s.text for s in case.dev],
            case.classify,
            defence.frr_budget,
            copies=defence.copies,
            seed=case.seed,
        )
        return _run(folder, case, strip)

    settings = defence.model_dump(exclude={"name"})
    return _baseline(store, arena, defence.name, "strip", settings, make)


def _run(folder: Path, case: Case, defence: Onion | Strip) -> object:
    """Put all texts through a baseline; keep what it made of them."""
    arrays = {}
    for kind, texts in (("clean", [s.text for s in case.clean]), ("poisoned", case.poisoned)):
        for field, values in vars(defence.defend(texts, case.classify)).items():
            if values is not None:
                arrays[f"{kind}_{field}"] = values
    save_scores(folder, **arrays)
    return {
        "passes": defence.passes([s.text for s in case.clean]),
        # The defence includes the pass that classifies, which the time of the victim is already.
        "time": relative_time(case, lambda batch: defence.defend(batch, case.classify)) - 1,
    }


def _baseline(
    store: StepCache,
    arena: Arena,
    name: str,
    kind: str,
    settings: dict[str, object],
    make: Callable[[Path], object],
) -> Contender:
    step = store.step(kind, {"case": arena.case.inputs, "defence": settings}, make)
    scores = load_scores(step.folder / SCORES)
    clean, poisoned = (
        Defended(
            scores[f"{kind}_predicted"], scores.get(f"{kind}_flagged"), scores[f"{kind}_scores"]
        )
        for kind in ("clean", "poisoned")
    )
    return arena.entry(name, clean, poisoned, step.result["passes"], step.result["time"])


def _rewritten(store: StepCache, arena: Arena, name: str) -> Contender:
    """Classify what a paraphraser made of the test texts; what it cost is not known."""
    case, (clean, poisoned) = arena.case, arena.case.paraphrased[name]

    def make(folder: Path) -> object:
        save_scores(
            folder,
            clean=case.classify([s.text for s in clean]).argmax(1),
            poisoned=case.classify([s.text for s in poisoned]).argmax(1),
        )
        return {}

    inputs = {"case": case.inputs, "rewritten": digest_of([clean, poisoned])}
    scores = load_scores(store.step("paraphrase", inputs, make).folder / SCORES)
    views = Defended(scores["clean"], None), Defended(scores["poisoned"], None)
    truth, target = classes_of(clean, case.labels), int(arena.targets[0])
    return Contender(name, outcome(views[0], truth, views[1], target), None, None, {})
