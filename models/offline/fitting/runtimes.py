"""Measuring and calibrating every runtime that a bundle can use, and choosing its default."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.bundle.manifest import Calibration, RuntimeRecord
from models.bundle.save import outcome_arrays
from models.detection.calibrate import (
    Calibrated,
    OverrideOutcomes,
    calibrate,
    calibrate_override,
)
from models.detection.conformal import min_calibration_size
from models.detection.override import OverrideGroup, OverrideTest, first_stage_evidence
from models.detection.screen import FloatArray, Layout, Screen, Verdict
from models.detection.views import Views
from models.engines.base import REFERENCE, RUNTIMES, Encoding, Engine, Runtime
from models.engines.pytorch import TorchEngine
from models.engines.registry import is_installed, is_worth_using, make_engine, runs_here
from models.errors import EngineError
from models.offline.fitting.unfamiliar import harmless_texts
from models.offline.io.inference import predict, run_tests, texts_per_second

TESTED, HARMLESS = 400, 300
"""Clean calibration texts that go through the override test, as many of each class, unless a small
budget needs more; and harmless texts of each kind."""
AUTO = "auto"
"""Any engine, in place of an engine's name."""


@dataclass(frozen=True)
class RuntimeMeasurement:
    """Output and speed of one runtime on some texts."""

    readings: FloatArray
    """Shape (n, V, C)."""
    texts_per_s: float
    outcomes: "Outcomes | None" = None
    """None without an override test. They may be those of another runtime."""


class Outcomes(NamedTuple):
    """Outcomes of override tests, by which texts are tested."""

    suspicious: OverrideOutcomes
    thorough: OverrideOutcomes


@dataclass(frozen=True)
class CalibratedRuntime:
    """Both stages of one runtime, calibrated on its own readings."""

    screen: Calibrated
    override: Sequence[OverrideGroup] = ()
    """Of suspicious texts; empty without an override test."""
    thorough: Sequence[OverrideGroup] = ()
    """Of texts that the first stage does not suspect, calibrated on texts of both kinds."""


def installed(engine: str) -> str:
    """Return an engine's name, or `AUTO`; raise `EngineError` if the engine is not installed."""
    if engine != AUTO and not is_installed(engine):
        raise EngineError(
            f"the engine {engine} is not installed: pip install 'psim-gateway[{engine}]'"
        )
    return engine


def measure_runtimes(
    trained: TorchEngine,
    engine: str,
    texts: Sequence[str],
    test: OverrideTest | None,
    frr_budget: float,
) -> dict[Runtime, RuntimeMeasurement]:
    """Measure PyTorch and an engine, or all engines, in every dtype that runs here.

    The last runtime converts the module in place: save its weights before.

    Args:
        trained: PyTorch in float32 with both detectors fitted.
        engine: name of an engine, or `AUTO`.
        texts: clean texts to calibrate with.
        test: the override test, if there is one.
        frr_budget: share of clean texts that each stage may reject.

    Raises:
        EngineError: the engine cannot run this module.
    """
    module = trained.guarded, trained.tokenizer, trained.max_length
    runtimes = _runtimes(trained, engine)
    tests = {quickest(runtimes): test}
    return with_shared_outcomes(
        {
            runtime: measure(make_engine(runtime, *module), texts, tests.get(runtime), frr_budget)
            for runtime in runtimes
        }
    )


def quickest(runtimes: Collection[Runtime]) -> Runtime:
    """Return the runtime that should run the override tests for all others."""
    here = [runtime for runtime in runtimes if runs_here(runtime)]
    return max(here, key=lambda own: (own.dtype == "bfloat16", own.engine != REFERENCE.engine))


def with_shared_outcomes(
    measured: Mapping[Runtime, RuntimeMeasurement],
) -> dict[Runtime, RuntimeMeasurement]:
    """Give all runtimes the outcomes of the one that ran the override tests.

    What a text keeps hardly hangs on rounding (docs/method.md), and the tests take longer than
    everything else that is measured.
    """
    outcomes = next((own.outcomes for own in measured.values() if own.outcomes), None)
    return {runtime: replace(own, outcomes=outcomes) for runtime, own in measured.items()}


def _runtimes(trained: TorchEngine, engine: str) -> list[Runtime]:
    wanted = [r for r in RUNTIMES if engine in (AUTO, r.engine) or r.engine == REFERENCE.engine]
    if not trained.guarded.is_traceable:
        if engine not in (AUTO, REFERENCE.engine):
            raise EngineError(f"{engine} cannot run this victim, or these adapters; use torch")
        wanted = [r for r in wanted if r.engine == REFERENCE.engine]
    # PyTorch computes in any dtype, if slowly.
    usable = is_worth_using if engine == AUTO else runs_here
    return [r for r in wanted if r.engine == REFERENCE.engine or usable(r)]


def measure(
    engine: Engine,
    texts: Sequence[str],
    test: OverrideTest | None,
    frr_budget: float,
    clean: Sequence[str] | None = None,
) -> RuntimeMeasurement:
    """Screen texts, time a few of them, and run override tests.

    Args:
        engine: the runtime.
        texts: texts to screen.
        test: the override test, without thresholds, if there is one.
        frr_budget: for which the test is to be calibrated.
        clean: those that are clean, and come first; all of `texts` by default.
    """
    encodings = engine.encode(texts)
    readings = predict(engine, encodings)
    outcomes = None
    if test is not None:
        clean = texts if clean is None else clean
        screened = encodings[: len(clean)], readings[: len(clean)]
        outcomes = _outcomes(engine, test, clean, screened, frr_budget)
    return RuntimeMeasurement(readings, texts_per_second(engine, encodings), outcomes)


def _outcomes(
    engine: Engine,
    test: OverrideTest,
    clean: Sequence[str],
    screened: tuple[Sequence[Encoding], FloatArray],
    frr_budget: float,
) -> Outcomes:
    """Run override tests for both modes.

    Of the clean texts, suspicious ones are tested for one mode, and a sample for the other.
    """
    screen = calibrate(screened[1], test.layout, frr_budget, views=test.views)
    classes = max(map(len, test.tested))
    sample = max(TESTED // classes, min_calibration_size(frr_budget / len(test.tested)))
    own = _run(engine, test, screen, *screened, sample)
    harmless = engine.encode(harmless_texts(clean, HARMLESS, seed=0))
    others = _run(engine, test, screen, harmless, predict(engine, harmless))
    return Outcomes(
        suspicious=OverrideOutcomes(own.if_suspicious, others.if_suspicious),
        thorough=OverrideOutcomes(own.outcomes[own.sampled], others.outcomes),
    )


@dataclass(frozen=True)
class _Tested:
    outcomes: FloatArray
    """See `OverrideOutcomes`; in one view after the other, shape (n, 3)."""
    suspicious: NDArray[np.bool_]
    sampled: NDArray[np.bool_]
    """Which of them were tested even if they are not suspicious."""

    @property
    def if_suspicious(self) -> FloatArray:
        """The outcomes if only suspicious texts are tested."""
        known = self.outcomes.copy()
        known[~self.suspicious, 2] = 0
        return known


def _run(
    engine: Engine,
    test: OverrideTest,
    screen: Screen,
    encodings: Sequence[Encoding],
    readings: FloatArray,
    sample: int | None = None,
) -> _Tested:
    """Test suspicious texts, and the first `sample` of each class, or all, in every view."""
    verdicts = [screen.verdicts(row) for row in readings]
    views = [
        _run_view(engine, test, encodings, [own[view] for own in verdicts], sample)
        for view in range(len(screen.views))
    ]
    return _Tested(
        np.concatenate([own.outcomes for own in views]),
        np.concatenate([own.suspicious for own in views]),
        np.concatenate([own.sampled for own in views]),
    )


def _run_view(
    engine: Engine,
    test: OverrideTest,
    encodings: Sequence[Encoding],
    verdicts: Sequence[Verdict],
    sample: int | None,
) -> _Tested:
    able = [n for n, verdict in enumerate(verdicts) if test.can_test(verdict.predicted)]
    known = [(verdicts[n].predicted, first_stage_evidence(verdicts[n]), 0) for n in able]
    outcomes = np.array(known, np.float32).reshape(-1, 3)
    due = np.array([verdicts[n].suspected for n in able], np.bool_)
    sampled = _first_of_each(outcomes[:, 0], len(able) if sample is None else sample)
    tested = np.flatnonzero(sampled | due)
    asked = [(engine.content(encodings[able[row]]), verdicts[able[row]]) for row in tested]
    outcomes[tested, 2] = run_tests(engine, test, asked)
    return _Tested(outcomes, due, sampled)


def _first_of_each(classes: FloatArray, count: int) -> NDArray[np.bool_]:
    """Return which rows are among the first so many of their class."""
    first = np.zeros(len(classes), np.bool_)
    for own in np.unique(classes):
        first[np.flatnonzero(classes == own)[:count]] = True
    return first


def calibrate_runtimes(
    measured: Mapping[Runtime, RuntimeMeasurement],
    layout: Layout,
    frr_budget: float,
    views: Views,
    tested: Views,
) -> dict[Runtime, CalibratedRuntime]:
    """Calibrate every runtime on its own readings of the same clean texts.

    Args:
        measured: runtimes by name.
        layout: which readings are whose.
        frr_budget: share of clean texts that each stage may reject.
        views: of the victim.
        tested: those that the override test looks at.

    Raises:
        CalibrationError: too few texts, or readings that are not finite.
    """
    calibrated = {}
    for runtime, own in measured.items():
        screen = calibrate(own.readings, layout, frr_budget, views=views)
        groups = [
            calibrate_override(outcomes, tested, frr_budget, thorough=mode == "thorough")
            for mode, outcomes in (own.outcomes._asdict() if own.outcomes else {}).items()
        ]
        calibrated[runtime] = CalibratedRuntime((screen, own.readings), *groups)
    return calibrated


def fastest(calibrations: Sequence[Calibration], engine: str) -> RuntimeRecord:
    """Return the fastest runtime, of one engine or `AUTO`, that agrees with the reference."""
    chosen = max(
        (c for c in calibrations if c.parity.agrees and engine in (AUTO, c.engine)),
        key=lambda c: c.parity.texts_per_s,
        default=calibrations[0],
    )
    return RuntimeRecord(engine=chosen.engine, dtype=chosen.dtype)


def measured_arrays(measured: Mapping[Runtime, RuntimeMeasurement]) -> dict[str, FloatArray]:
    """Return what a bundle keeps of the measurements, by name."""
    arrays = {str(runtime): own.readings for runtime, own in measured.items()}
    for runtime, own in measured.items():
        if own.outcomes:
            for tested, outcomes in own.outcomes._asdict().items():
                arrays |= outcome_arrays(runtime, tested, outcomes)
    return arrays
