"""Comparison of defences on one experiment: on the same texts, with the same measures."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.detection.calibrate import calibrate
from models.detection.screen import Layout
from models.engines.pytorch import TorchEngine
from models.offline.evaluation.evaluate import ScreenedTexts
from models.offline.evaluation.metrics import (
    BoolArray,
    DefendedPredictions,
    Rate,
    classes_of,
    measure_outcome,
)
from models.offline.fitting.split import split_texts
from models.offline.io.classifiers import load_classifier, model_digest
from models.offline.io.inference import predict
from models.offline.study.ablations import train_variant
from models.offline.study.cache import Step, StepCache, digest_of
from models.offline.study.defences.activations import CleanTexts, StateDetector
from models.offline.study.defences.baselines import Onion, Strip
from models.offline.study.defences.bundle import run_bundle
from models.offline.study.defences.language_model import load_language_model, train_language_model
from models.offline.study.defences.rap import Rap
from models.offline.study.experiment import (
    CLEAN,
    POISONED,
    SCORES,
    DefenceResult,
    Experiment,
    Reference,
    bare_engine,
    honest_group,
    load_scores,
    predict_bare,
    relative_time,
    save_scores,
)
from models.offline.study.recipe import (
    BundleDefence,
    DetectorDefence,
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
            case DetectorDefence():
                results.append(_detector(cache, reference, defence))
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
    inputs: dict[str, object] = {"case": experiment.inputs, "source": source.key}
    inputs |= {"defence": settings, **experiment.honest_inputs}
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
        predicted = {CLEAN: reference.predicted_clean, POISONED: reference.predicted_poisoned}
        defended = {}
        for kind, group in experiment.groups.items():
            if group:
                own = readings[kind][:, :features]
                bare = predicted.get(kind, np.zeros(len(group), np.intp))
                screened = ScreenedTexts.of_first_stage(screen, own, bare)
                defended[kind] = screened.paper if rule == "paper" else screened.calibrated
        more = details | {"features": known.shape[1]} | _honest(experiment, defended)
        yield reference.measure(name, defended[CLEAN], defended[POISONED], *cost, **more)


def _honest(experiment: Experiment, defended: Mapping[str, DefendedPredictions]) -> dict[str, Any]:
    """Return `honest`, the `Rate` of rejected texts by kind of honest ones, if there are any."""
    rates = {
        name: found and _rejected(found.flagged)
        for name in experiment.honest
        for found in [defended.get(honest_group(name))]
    }
    return {"honest": rates} if rates else {}


def _rejected(flagged: BoolArray | None) -> dict[str, Any] | None:
    rate = None if flagged is None else Rate.of(flagged)
    return None if rate is None else {"rejected": asdict(rate)}


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
        **{kind: group for kind, group in experiment.groups.items() if group},
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

    def fit() -> Fitted:
        lm = load_language_model(source)
        onion = Onion.fit(lm, experiment.dev, experiment.classify, experiment.labels)
        return Fitted(lambda texts: onion.defend(texts, experiment.classify), onion.passes)

    return _baseline(cache, reference, defence.name, "onion", {"language_model": key}, fit)


def _strip(cache: StepCache, reference: Reference, defence: StripDefence) -> DefenceResult:
    experiment = reference.experiment

    def fit() -> Fitted:
        strip = Strip.fit(
            [s.text for s in experiment.train],
            [s.text for s in experiment.dev],
            experiment.classify,
            defence.frr_budget,
            copies=defence.copies,
            seed=experiment.seed,
        )
        return Fitted(lambda texts: strip.defend(texts, experiment.classify), strip.passes)

    settings = defence.model_dump(exclude={"name"})
    return _baseline(cache, reference, defence.name, "strip", settings, fit)


def _detector(cache: StepCache, reference: Reference, defence: DetectorDefence) -> DefenceResult:
    experiment = reference.experiment

    def fit() -> Fitted:
        source = experiment.train if defence.clean == "train" else experiment.dev
        clean = CleanTexts.split(source[: defence.texts], experiment.seed)
        if defence.kind == "rap":
            trainer = bare_engine(experiment.victim, "float32")
            held_back = [s.text for s in clean.held_back]
            rap = Rap.train(trainer, clean.known, experiment.labels)
            rap = rap.calibrated(experiment.engine, held_back, defence.frr_budget)
            return Fitted(lambda texts: rap.defend(texts, experiment.engine), rap.passes)
        read, labels = experiment.read_once, experiment.labels
        detector = StateDetector.fit(defence.kind, clean, read, labels, defence.frr_budget)
        return Fitted(
            lambda texts: detector.defend(texts, read),
            detector.passes,
            lambda texts: detector.defend(texts, experiment.read),
        )

    settings = defence.model_dump(exclude={"name"})
    return _baseline(cache, reference, defence.name, defence.kind, settings, fit)


class Fitted(NamedTuple):
    """A baseline that is ready to run."""

    defend: Callable[[Sequence[str]], DefendedPredictions]
    passes: Callable[[Sequence[str]], float]
    """Forward passes per text in addition to the victim's own, on average."""
    timed: Callable[[Sequence[str]], DefendedPredictions] | None = None
    """The same as `defend`, without anything that it remembers."""


def _baseline(
    cache: StepCache,
    reference: Reference,
    name: str,
    kind: str,
    settings: dict[str, object],
    fit: Callable[[], Fitted],
) -> DefenceResult:
    """Fit a baseline, run it on all test texts, and measure it."""
    experiment = reference.experiment
    groups = experiment.groups
    inputs: dict[str, object] = {"case": experiment.inputs, "defence": settings}
    if kind == "onion":  # rejects nothing, and would read honest texts for minutes
        groups = {key: groups[key] for key in (CLEAN, POISONED)}
    else:
        inputs |= experiment.honest_inputs
    step = cache.step(kind, inputs, lambda folder: _run_baseline(folder, experiment, groups, fit()))
    scores = load_scores(step.folder / SCORES)
    defended = {
        group: DefendedPredictions(
            scores[f"{group}_predicted"], scores.get(f"{group}_flagged"), scores[f"{group}_scores"]
        )
        for group, texts in groups.items()
        if texts
    }
    cost = step.result["passes"], step.result["time"]
    more = _honest(experiment, defended)
    return reference.measure(name, defended[CLEAN], defended[POISONED], *cost, **more)


def _run_baseline(
    folder: Path, experiment: Experiment, groups: Mapping[str, list[str]], fitted: Fitted
) -> object:
    """Save the predictions of a baseline on groups of texts; return its cost."""
    arrays = {}
    for kind, texts in groups.items():
        if texts:
            for field, values in vars(fitted.defend(texts)).items():
                if values is not None:
                    arrays[f"{kind}_{field}"] = values
    save_scores(folder, **arrays)
    ratio = relative_time(experiment, fitted.timed or fitted.defend)
    # A baseline also classifies the text, which the time of the victim already includes.
    return {"passes": fitted.passes(groups[CLEAN]), "time": ratio - 1}


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
