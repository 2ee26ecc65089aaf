"""Comparison of defences on one experiment: on the same texts, with the same measures."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from models.detection.calibrate import calibrate
from models.detection.screen import Layout
from models.engines.pytorch import TorchEngine
from models.offline.evaluation.evaluate import ScreenedTexts
from models.offline.evaluation.metrics import DefendedPredictions, classes_of, measure_outcome
from models.offline.fitting.split import split_texts
from models.offline.io.classifiers import load_classifier, model_digest
from models.offline.io.inference import predict
from models.offline.study.ablations import train_variant
from models.offline.study.cache import Step, StepCache, digest_of
from models.offline.study.defences.baselines import Onion, Strip
from models.offline.study.defences.bundle import run_bundle
from models.offline.study.defences.language_model import load_language_model, train_language_model
from models.offline.study.experiment import (
    SCORES,
    DefenceResult,
    Experiment,
    Reference,
    load_scores,
    predict_bare,
    relative_time,
    save_scores,
)
from models.offline.study.recipe import (
    BundleDefence,
    OnionDefence,
    ParaphraseDefence,
    PsimDefence,
    Recipe,
    StripDefence,
)

CONFIDENCE_ONLY = ("confidence", "pooled", "paper")
"""Rules that leave the second screen out."""
LM_TEXTS = 3000
"""Clean texts that ONION's language model is trained on, if the recipe names no model."""


def compare_defences(cache: StepCache, recipe: Recipe, experiment: Experiment) -> dict[str, Any]:
    """Run all defences of a recipe on an experiment.

    Returns:
        `published`: outcome of the attack before the victim was tuned; `defences`: results by name;
        `bare`: path, relative to the root of the cache, of the file with true classes, targets and
        bare predictions.
    """
    bare = predict_bare(cache, experiment, experiment.victim)
    reference = Reference.load(experiment, bare)
    published = Reference.load(experiment, predict_bare(cache, experiment, experiment.published))
    results = [DefenceResult("none", reference.undefended, 0.0, 1.0, {})]
    for defence in recipe.defences:
        match defence:
            case PsimDefence():
                results += _psim(cache, reference, defence)
            case OnionDefence():
                results.append(_onion(cache, reference, defence))
            case StripDefence():
                results.append(_strip(cache, reference, defence))
            case BundleDefence():
                results.append(run_bundle(cache, reference, defence))
            case ParaphraseDefence():
                results += (_paraphrase(cache, reference, name) for name in experiment.paraphrased)
    return {
        "published": asdict(published.undefended),
        "defences": {result.name: result.as_row() for result in results},
        "bare": str((bare.folder / SCORES).relative_to(cache.root)),
    }


def _psim(cache: StepCache, reference: Reference, defence: PsimDefence) -> Iterator[DefenceResult]:
    """Fit PSIM once, and yield the result of each rule for thresholds."""
    experiment = reference.experiment
    source = experiment.victim if defence.on == "victim" else experiment.published
    settings = defence.model_dump(exclude={"name", "rules", "frr_budget"})
    # The key `case` is an old name of experiments; another one would change the digests of steps.
    inputs = {"case": experiment.inputs, "source": source.key, "defence": settings}
    step = cache.step("psim", inputs, lambda folder: _fit_psim(folder, experiment, source, defence))
    readings = load_scores(step.folder / SCORES)
    details = {**step.result, "scores": str((step.folder / SCORES).relative_to(cache.root))}
    cost = details.pop("passes"), details.pop("time")
    whole = Layout(len(details["checkpoints"]), details["attention"])
    for rule, name in zip(defence.rules, defence.names, strict=True):
        layout = Layout(whole.checkpoints) if rule in CONFIDENCE_ONLY else whole
        features = layout.checkpoints if rule in CONFIDENCE_ONLY else None
        known = readings["dev" if rule == "dev" else "known"][:, :features]
        screen = calibrate(known, layout, defence.frr_budget, by_class=rule != "pooled")
        screened = [
            ScreenedTexts.of_first_stage(screen, readings[kind][:, :features], predicted)
            for kind, predicted in (
                ("clean", reference.predicted_clean),
                ("poisoned", reference.predicted_poisoned),
            )
        ]
        clean, poisoned = (t.paper if rule == "paper" else t.calibrated for t in screened)
        yield reference.measure(name, clean, poisoned, *cost, features=known.shape[1], **details)


def _fit_psim(folder: Path, experiment: Experiment, source: Step, defence: PsimDefence) -> object:
    started = time.perf_counter()
    model, tokenizer = load_classifier(str(source.folder / "model"))
    split = split_texts([s.text for s in experiment.train[: defence.texts]], experiment.seed)
    variant = replace(defence.config, seed=experiment.seed)
    engine, training = train_variant(model, tokenizer, split, variant)
    engine = TorchEngine(engine.guarded, tokenizer, engine.max_length, experiment.dtype)
    seconds = time.perf_counter() - started
    texts = {
        "known": split.calibrate,
        "dev": [s.text for s in experiment.dev],
        "clean": [s.text for s in experiment.clean],
        "poisoned": experiment.poisoned,
    }
    readings = {kind: predict(engine, engine.encode(group)) for kind, group in texts.items()}
    save_scores(folder, **readings)
    return {
        "steps": training.steps,
        "checkpoints": training.checkpoints,
        "attention": engine.guarded.layout.attention,
        "stopped_because": training.stopped_because,
        "fit_seconds": seconds,
        "passes": engine.forward_passes - 1,
        "time": relative_time(experiment, lambda batch: predict(engine, engine.encode(batch))),
    }


def _onion(cache: StepCache, reference: Reference, defence: OnionDefence) -> DefenceResult:
    experiment = reference.experiment
    if defence.language_model is None:
        texts = [s.text for s in experiment.train[:LM_TEXTS]]
        step = cache.step(
            "language-model",
            {"texts": digest_of(texts)},
            lambda folder: train_language_model(texts, folder / "model").name,
        )
        source, key = str(step.folder / "model"), step.key
    else:
        source, key = defence.language_model, model_digest(defence.language_model)

    def fit() -> Onion:
        lm = load_language_model(source)
        return Onion.fit(lm, experiment.dev, experiment.classify, experiment.labels)

    return _baseline(cache, reference, defence.name, "onion", {"language_model": key}, fit)


def _strip(cache: StepCache, reference: Reference, defence: StripDefence) -> DefenceResult:
    experiment = reference.experiment

    def fit() -> Strip:
        return Strip.fit(
            [s.text for s in experiment.train],
            [s.text for s in experiment.dev],
            experiment.classify,
            defence.frr_budget,
            copies=defence.copies,
            seed=experiment.seed,
        )

    settings = defence.model_dump(exclude={"name"})
    return _baseline(cache, reference, defence.name, "strip", settings, fit)


def _baseline(
    cache: StepCache,
    reference: Reference,
    name: str,
    kind: str,
    settings: dict[str, object],
    fit: Callable[[], Onion | Strip],
) -> DefenceResult:
    """Fit a baseline, run it on all test texts, and measure it."""
    experiment = reference.experiment
    inputs = {"case": experiment.inputs, "defence": settings}
    step = cache.step(kind, inputs, lambda folder: _run_baseline(folder, experiment, fit()))
    scores = load_scores(step.folder / SCORES)
    clean, poisoned = (
        DefendedPredictions(
            scores[f"{kind}_predicted"], scores.get(f"{kind}_flagged"), scores[f"{kind}_scores"]
        )
        for kind in ("clean", "poisoned")
    )
    return reference.measure(name, clean, poisoned, step.result["passes"], step.result["time"])


def _run_baseline(folder: Path, experiment: Experiment, defence: Onion | Strip) -> object:
    """Save the predictions of a baseline on all test texts; return its cost."""
    clean = [s.text for s in experiment.clean]
    arrays = {}
    for kind, texts in (("clean", clean), ("poisoned", experiment.poisoned)):
        for field, values in vars(defence.defend(texts, experiment.classify)).items():
            if values is not None:
                arrays[f"{kind}_{field}"] = values
    save_scores(folder, **arrays)
    ratio = relative_time(experiment, lambda batch: defence.defend(batch, experiment.classify))
    # A baseline also classifies the text, which the time of the victim already includes.
    return {"passes": defence.passes(clean), "time": ratio - 1}


def _paraphrase(cache: StepCache, reference: Reference, name: str) -> DefenceResult:
    """Classify the paraphrased test texts; the cost of the paraphraser is unknown."""
    experiment, (clean, poisoned) = reference.experiment, reference.experiment.paraphrased[name]

    def make(folder: Path) -> object:
        save_scores(
            folder,
            clean=experiment.classify([s.text for s in clean]).argmax(1),
            poisoned=experiment.classify([s.text for s in poisoned]).argmax(1),
        )
        return {}

    inputs = {"case": experiment.inputs, "rewritten": digest_of([clean, poisoned])}
    scores = load_scores(cache.step("paraphrase", inputs, make).folder / SCORES)
    truth, target = classes_of(clean, experiment.labels), int(reference.targets[0])
    outcome = measure_outcome(
        DefendedPredictions(scores["clean"], None),
        truth,
        DefendedPredictions(scores["poisoned"], None),
        target,
    )
    return DefenceResult(name, outcome, None, None, {})
