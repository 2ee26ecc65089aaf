"""Loading a bundle: manifest, engine and screen, all of them checked.

A bundle is untrusted input. It is loaded from a private copy, so that what was checked is what is
served. No library reads a file that `models.bundle.verify` has not checked, and nothing is ever
unpickled.
"""

import math
import os.path
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays

from models.bundle.layout import CARRIERS, READINGS, outcome_names
from models.bundle.manifest import (
    Calibration,
    CarrierTexts,
    GroupRecord,
    Manifest,
    OverrideGroupRecord,
)
from models.bundle.verify import WeightTotals, checked_copy, read_manifest
from models.detection.calibrate import (
    OverrideOutcomes,
    calibrate,
    calibrate_override,
    parity,
)
from models.detection.conformal import ThresholdGroup
from models.detection.override import OverrideGeometry, OverrideGroup, OverrideTest
from models.detection.screen import FloatArray, Screen
from models.engines.base import REFERENCE, Engine, Runtime
from models.engines.pytorch import load_tokenizer
from models.engines.registry import is_installed, is_worth_using, make_engine, runs_here
from models.errors import BundleError, CalibrationError, PsimError, ScreenError

OverrideGroups = tuple[list[OverrideGroup], list[OverrideGroup]]
"""Of the override test on suspicious texts, and on others; empty if there is no test."""


@dataclass(frozen=True)
class Bundle:
    """A checked and loaded bundle, ready to screen and classify."""

    manifest: Manifest
    digest: str
    """SHA-256 of `manifest.json`, which in turn holds the hash of every other file."""
    engine: Engine
    screen: Screen
    override: OverrideTest | None = None
    """The second stage; None if the bundle has no carriers."""
    carriers: Sequence[str] = ()
    """Clean texts of which the victim is sure; they are the owner's own."""


def load_bundle(
    path: Path,
    dtype: str | None = None,
    engine: str | None = None,
    key: Path | None = None,
    *,
    apart: bool = False,
) -> Bundle:
    """Check every file of the bundle, load it, and try it on one text.

    Args:
        path: folder of the bundle, or a link to it.
        dtype: floating-point type to compute in, such as `float32`; None leaves it to the bundle.
        engine: name of the engine, such as `torch`; None leaves it to the bundle, see `choose`.
        key: file of the public key that the bundle must be signed with; None skips the check.
        apart: whether another process traces the model, if OpenVINO is to run it. That saves memory
            of this one, and costs seconds.

    Raises:
        BundleError: the bundle is not as its manifest says, or it has no calibration for this
            dtype and engine.
    """
    # Whoever replaces a link to the bundle meanwhile gets all of the old one, or of the new one.
    path = Path(os.path.realpath(path))
    manifest, digest = read_manifest(path, key)
    calibration = choose(manifest, engine, dtype)
    with _refusal_of(path):
        with checked_copy(path, manifest) as (copy, totals):
            screen, groups = _load_screen(copy, manifest, calibration)
            if apart and calibration.engine == "openvino" and is_installed("openvino"):
                model = _trace_engine(copy, manifest, totals, calibration.dtype)
            else:
                model = _load_engine(copy, manifest, totals, calibration.runtime)
            carriers = _load_carriers(copy, manifest)
            override = _override_test(carriers, manifest, model, groups)
        texts = [text for of_class in carriers for text in of_class]
        bundle = Bundle(manifest, digest, model, screen, override, texts)
        _self_test(bundle)
    return bundle


@contextmanager
def _refusal_of(path: Path) -> Iterator[None]:
    """Raise whatever the block raises as `BundleError`."""
    try:
        yield
    except PsimError as error:
        raise BundleError(f"{path}: {error}") from error
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever a library makes of a forged file
        # Panics of libraries in Rust are no `Exception`; and a message may quote the file.
        raise BundleError(f"{path}: the model does not load: {str(error)[:500]!r}") from error


def choose(manifest: Manifest, engine: str | None, dtype: str | None) -> Calibration:
    """Return the calibration of the runtime to use; thresholds of another runtime never apply.

    The order of preference among those that match the request and run here: the bundle's default,
    one that agrees with the reference, the default's engine, `REFERENCE`, any other. A runtime that
    does not agree, or leaves a GPU idle, is used only on request.

    Raises:
        BundleError: none matches.
    """
    default = manifest.default

    def rank(own: Calibration) -> tuple[bool, ...]:
        return (
            own.runtime != default.runtime,
            not own.parity.agrees,
            own.engine != default.engine,
            own.runtime != REFERENCE,
        )

    matching = [
        own
        for own in sorted(manifest.calibrations, key=rank)
        if engine in (None, own.engine)
        and dtype in (None, own.dtype)
        and (engine or dtype or own.parity.agrees)
    ]
    if matching:  # if none of them runs here, loading says why
        usable = runs_here if engine else is_worth_using
        return next((own for own in matching if usable(own.runtime)), matching[0])
    requested = f"{engine or REFERENCE.engine}/{dtype or REFERENCE.dtype}"
    known = ", ".join(str(own.runtime) for own in manifest.calibrations)
    raise BundleError(
        f"no calibration for {requested}; the bundle has {known}. "
        "Run `psim fit` where it is installed"
    )


def _load_screen(
    path: Path, manifest: Manifest, chosen: Calibration
) -> tuple[Screen, OverrideGroups]:
    """Calibrate all runtimes again; the results must be those of the manifest.

    Returns the chosen runtime's screen, and the groups of its override test, if there is one.

    An altered threshold, or one that no text can reach, would let everything pass. And the chosen
    runtime must agree with the reference as well as the manifest claims.
    """
    layout, calibrations = manifest.layout, manifest.calibrations
    try:
        arrays = load_arrays(path / READINGS)
        readings = _readings(arrays, manifest)
        screens = {
            own.runtime: calibrate(
                readings[own.runtime], layout, own.frr_budget, views=manifest.views
            )
            for own in calibrations
        }
        reference, given = readings[REFERENCE], readings[chosen.runtime]
        judge = screens.get(REFERENCE) or calibrate(
            reference, layout, chosen.frr_budget, views=manifest.views
        )
        found = parity((judge, reference), (screens[chosen.runtime], given))
        groups = {own.runtime: _override_groups(arrays, manifest, own) for own in calibrations}
    except (KeyError, ValueError, SafetensorError, OSError, CalibrationError) as error:
        raise BundleError(f"{READINGS} does not hold the calibration") from error
    if not all(
        _agree(screens[own.runtime].groups, own.groups)
        and _agree(groups[own.runtime][0], own.override)
        and _agree(groups[own.runtime][1], own.thorough)
        for own in calibrations
    ):
        raise BundleError("a threshold is not what its calibration texts give")
    # Other processors may round a text or two at a threshold to the other side.
    if found.decisions_agree < chosen.parity.decisions_agree - 2.5 / len(reference):
        raise BundleError(f"{chosen.runtime} agrees less than the manifest says")
    return screens[chosen.runtime], groups[chosen.runtime]


def _readings(arrays: Mapping[str, FloatArray], manifest: Manifest) -> dict[Runtime, FloatArray]:
    """Return the readings of the calibration texts by runtime, the reference included.

    Raises:
        KeyError: there are none of a runtime.
        ValueError: they are not of the shape that the manifest gives.
    """
    runtimes = (REFERENCE, *(own.runtime for own in manifest.calibrations))
    readings: dict[Runtime, FloatArray] = {runtime: arrays[str(runtime)] for runtime in runtimes}
    distances = len(manifest.activations.layers) if manifest.activations else 0
    features = len(manifest.psim.checkpoints) + distances + manifest.attention
    shape = len(readings[REFERENCE]), features, len(manifest.classes)
    if any(array.dtype != np.float32 or array.shape != shape for array in readings.values()):
        raise ValueError(f"{READINGS}: arrays are not float32 of shape {shape}")
    return readings


def _override_groups(
    arrays: Mapping[str, FloatArray], manifest: Manifest, own: Calibration
) -> OverrideGroups:
    """Calibrate the override test of a runtime again.

    Raises:
        BundleError: there are outcomes although the bundle has no test.
        KeyError, ValueError: the outcomes are missing, or not of their shape.
        CalibrationError: they give no threshold.
    """
    modes = {mode: outcome_names(own.runtime, mode) for mode in ("suspicious", "thorough")}
    if manifest.override is None:
        if not all(arrays.keys().isdisjoint(names) for names in modes.values()):
            raise BundleError(f"{READINGS} has outcomes of override tests, the manifest has none")
        return [], []
    tested, groups = manifest.tested_views, []
    classes = [number for view in tested for number in view]
    for mode, names in modes.items():
        outcomes = OverrideOutcomes(*(_outcomes(arrays[name], classes) for name in names))
        groups.append(
            calibrate_override(outcomes, tested, own.frr_budget, thorough=mode == "thorough")
        )
    return groups[0], groups[1]


def _outcomes(outcomes: FloatArray, classes: Sequence[int]) -> FloatArray:
    if outcomes.dtype != np.float32 or outcomes.ndim != 2 or outcomes.shape[1] != 3:
        raise ValueError(f"{READINGS}: outcomes are not float32 of shape (n, 3)")
    if not np.isin(outcomes[:, 0], classes).all():
        raise ValueError(f"{READINGS}: outcomes are of classes that the bundle does not test")
    return outcomes


def _load_carriers(path: Path, manifest: Manifest) -> list[list[str]]:
    """Return the carriers of each class, as many as the manifest names; none without a test."""
    record = manifest.override
    if record is None:
        return []
    try:
        carriers = CarrierTexts.model_validate_json((path / CARRIERS).read_bytes()).carriers
    except (OSError, ValidationError):  # whose message would quote the texts
        raise BundleError(f"{CARRIERS} does not hold the carriers of the override test") from None
    if [len(own) for own in carriers] != record.carriers:
        raise BundleError(f"{CARRIERS} does not have as many carriers as the manifest names")
    return carriers


def _override_test(
    carriers: Sequence[Sequence[str]], manifest: Manifest, engine: Engine, groups: OverrideGroups
) -> OverrideTest | None:
    """Return the test, if there is one; check the carriers."""
    record, readable = manifest.override, engine.window_length
    if record is None:
        return None
    tokens = [[engine.token_ids(text) for text in own] for own in carriers]
    if not all(len(ids) for own in tokens for ids in own):
        raise BundleError(f"{CARRIERS} holds a text without a token")
    if record.window + 2 * record.carrier > readable:
        raise BundleError(f"the override test needs more than the {readable} tokens that are read")
    geometry = OverrideGeometry(record.window, record.carrier)
    suspicious, others = groups
    layout, views = manifest.layout, manifest.views
    return OverrideTest(tokens, geometry, layout, suspicious, views, others=others)


def _agree(
    found: Sequence[ThresholdGroup], recorded: Sequence[GroupRecord | OverrideGroupRecord]
) -> bool:
    """Return whether thresholds are the recorded ones, but for rounding on other processors."""
    expected = {tuple(group.classes): group.threshold for group in recorded}
    actual = {group.classes: group.threshold for group in found}
    return actual.keys() == expected.keys() and all(
        math.isclose(actual[own], expected[own], rel_tol=1e-4, abs_tol=1e-4) for own in actual
    )


def _load_engine(path: Path, manifest: Manifest, totals: WeightTotals, runtime: Runtime) -> Engine:
    # Not at the top: who has the model traced apart saves the memory of importing it.
    from models.bundle.weights import load_model

    return make_engine(runtime, *load_model(path, manifest, totals), manifest.max_length)


def _trace_engine(copy: Path, manifest: Manifest, totals: WeightTotals, dtype: str) -> Engine:
    from models.bundle.apart import trace_apart  # it imports an extra
    from models.engines.openvino import OpenVinoEngine

    traced = trace_apart(copy, manifest, totals)
    return OpenVinoEngine(traced, load_tokenizer(copy / "tokenizer"), manifest.max_length, dtype)


def _self_test(bundle: Bundle) -> None:
    batch = bundle.engine.encode(["self-test"])
    try:
        bundle.screen.judge(bundle.engine.screen(batch).readings[0])
    except ScreenError as error:
        raise BundleError(f"self-test failed: {error}") from error
    if not np.isfinite(bundle.engine.classify(batch)).all():
        raise BundleError("self-test failed: the classifier gave no finite probabilities")
