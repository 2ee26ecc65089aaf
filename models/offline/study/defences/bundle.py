"""PSIM as it is served: a bundle as `psim fit` writes it, and what its verdicts come to.

Start with `judge`: how a bundle judges texts is decided there, and nowhere else in a study.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.bundle.load import Bundle, load_bundle
from models.detection.screen import FloatArray, Verdict
from models.engines.base import REFERENCE
from models.offline.evaluation.metrics import (
    BoolArray,
    DefendedPredictions,
    Rate,
    within_class_scores,
)
from models.offline.fitting.fit import fit
from models.offline.fitting.psim import PsimConfig
from models.offline.io.classifiers import load_classifier, short_length_of
from models.offline.io.inference import require_verdicts
from models.offline.study.cache import Step, StepCache, digest_of
from models.offline.study.experiment import (
    CLEAN,
    POISONED,
    SCORES,
    DefenceResult,
    Experiment,
    Reference,
    honest_group,
    load_scores,
    relative_time,
    save_scores,
)
from models.offline.study.recipe import BundleDefence


def judge(bundle: Bundle, texts: Sequence[str], *, thorough: bool | None = None) -> list[Verdict]:
    """Return the bundle's verdict on each text, as the service would give it.

    Args:
        bundle: the bundle.
        texts: texts of any length.
        thorough: whether all texts are tested, see `Manifest.tests_all_texts`.

    With a change here, raise the version of `verdicts` in `models.offline.study.cache`.
    """
    return require_verdicts(bundle, bundle.engine.encode(texts), thorough=thorough)


class Findings(NamedTuple):
    """Verdicts on some texts, as arrays of shape (n,)."""

    triggered: BoolArray
    unfamiliar: BoolArray
    margins: FloatArray
    """Distances of the final scores from their thresholds; not negative iff rejected."""

    def rejecting(self, predicted: Any, *, unfamiliar: bool) -> DefendedPredictions:
        """Return the results under a policy: what is triggered is rejected, or both findings."""
        flagged = self.triggered | self.unfamiliar if unfamiliar else self.triggered
        return DefendedPredictions(predicted, flagged, self.margins)


def run_bundle(cache: StepCache, reference: Reference, defence: BundleDefence) -> DefenceResult:
    """Fit a bundle on the victim, and judge clean, poisoned and honest texts with it.

    The result is of the default policy, under which only triggered texts are rejected. Its details
    are `unfamiliar_rejected`, the outcome if unfamiliar ones are rejected too, `thorough`, that of
    the default policy if all texts are tested, where it is asked for, and `honest`, by kind, the
    `Rate` of each finding.
    """
    experiment = reference.experiment
    bundle = _fit_bundle(cache, experiment, defence)
    texts = experiment.groups
    found, cost = _findings(cache, experiment, bundle, texts)

    def measured(found: Mapping[str, Findings], *, unfamiliar: bool = False) -> DefenceResult:
        return reference.measure(
            defence.name,
            found[CLEAN].rejecting(reference.predicted_clean, unfamiliar=unfamiliar),
            found[POISONED].rejecting(reference.predicted_poisoned, unfamiliar=unfamiliar),
            **cost,
        )

    honest = {name: _shares(found[honest_group(name)]) for name in experiment.honest}
    strict = measured(found, unfamiliar=True)
    details = {"unfamiliar_rejected": asdict(strict.outcome), "honest": honest}
    if defence.thorough:
        own = {name: texts[name] for name in (CLEAN, POISONED)}
        all_tested, _ = _findings(cache, experiment, bundle, own, thorough=True)
        details["thorough"] = asdict(measured(all_tested).outcome)
    return replace(measured(found), details=details)


def _findings(
    cache: StepCache,
    experiment: Experiment,
    bundle: Step,
    texts: dict[str, list[str]],
    *,
    thorough: bool = False,
) -> tuple[dict[str, Findings], dict[str, float]]:
    """Return the findings on texts by group, and the cost of a verdict as `DefenceResult` has it.

    The cost is not measured if all texts are tested. Attacks on one victim share the verdicts on
    texts that are not poisoned.
    """

    def judged(names: Iterable[str]) -> Step:
        own = {name: texts[name] for name in names}
        inputs = {"bundle": bundle.key, "texts": digest_of(own), "dtype": experiment.dtype}
        if thorough:
            inputs["tested"] = "all"

        def make(folder: Path) -> object:
            loaded = load_bundle(bundle.folder / "bundle", experiment.dtype, REFERENCE.engine)
            _save_findings(folder, loaded, own, thorough=thorough or None)
            return {} if thorough or POISONED in own else _cost(loaded, experiment)

        return cache.step("verdicts", inputs, make)

    rest = [name for name in texts if name != POISONED]
    poisoned, others = judged([POISONED]), judged(rest)
    return _load_findings(poisoned, [POISONED]) | _load_findings(others, rest), others.result


def _shares(found: Findings) -> dict[str, Any]:
    rates = {"triggered": Rate.of(found.triggered), "unfamiliar": Rate.of(found.unfamiliar)}
    return {name: rate and asdict(rate) for name, rate in rates.items()}


def _fit_bundle(cache: StepCache, experiment: Experiment, defence: BundleDefence) -> Step:
    texts = [s.text for s in experiment.train[: defence.texts]]

    def make(folder: Path) -> object:
        model, tokenizer = load_classifier(str(experiment.victim.folder / "model"))
        config = PsimConfig(layers=defence.layers, seed=experiment.seed)
        manifest = fit(
            model, tokenizer, texts, folder / "bundle", name="victim", config=config,
            frr_budget=defence.frr_budget, engine=REFERENCE.engine,
            max_length=short_length_of(model, tokenizer),
        )  # fmt: skip
        return {"fit_seconds": manifest.fit.seconds}

    settings = defence.model_dump(exclude={"name", "thorough"}) | {"seed": experiment.seed}
    inputs = {"victim": experiment.victim.key, "texts": digest_of(texts), "settings": settings}
    return cache.step("bundle", inputs, make)


def _save_findings(
    folder: Path, bundle: Bundle, texts: dict[str, list[str]], *, thorough: bool | None
) -> None:
    arrays: dict[str, NDArray[Any]] = {}
    for name, group in texts.items():
        verdicts = judge(bundle, group, thorough=thorough) if group else []
        for kind in ("triggered", "unfamiliar"):
            arrays[f"{name}.{kind}"] = np.array([v.finding == kind for v in verdicts], np.bool_)
        arrays[f"{name}.margins"] = within_class_scores(verdicts)
    save_scores(folder, **arrays)


def _cost(bundle: Bundle, experiment: Experiment) -> dict[str, float]:
    return {
        "passes": bundle.engine.forward_passes - 1,
        "time": relative_time(experiment, lambda batch: judge(bundle, batch)),
    }


def _load_findings(step: Step, names: Iterable[str]) -> dict[str, Findings]:
    arrays = load_scores(step.folder / SCORES)
    return {
        name: Findings(*(arrays[f"{name}.{field}"] for field in Findings._fields)) for name in names
    }
