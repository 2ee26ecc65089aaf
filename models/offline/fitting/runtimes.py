"""Measuring and calibrating every runtime that a bundle can use, and choosing its default."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.bundle.manifest import Calibration, RuntimeRecord
from models.detection.calibrate import Calibrated, calibrate
from models.detection.screen import FloatArray
from models.engines.base import REFERENCE, RUNTIMES, Encoding, Engine, Runtime
from models.engines.pytorch import TorchEngine
from models.engines.registry import is_installed, make_engine, runs_here
from models.errors import EngineError
from models.network.guarded import Guarded
from models.offline.io.inference import predict, texts_per_second

AUTO = "auto"
"""Any engine, in place of an engine's name."""


@dataclass(frozen=True)
class Measurement:
    """Output and speed of one runtime on some texts."""

    readings: FloatArray
    """Shape (n, V, C)."""
    texts_per_s: float


def check_installed(engine: str) -> None:
    """Raise `EngineError` if an engine is not installed."""
    if engine != AUTO and not is_installed(engine):
        raise EngineError(
            f"the engine {engine} is not installed: pip install 'psim-gateway[{engine}]'"
        )


def measure_runtimes(
    trained: TorchEngine, engine: str, texts: Sequence[str]
) -> dict[Runtime, Measurement]:
    """Measure PyTorch and an engine, or all engines, in every dtype that runs here.

    The last runtime converts the module in place: save its weights before.

    Args:
        trained: PyTorch in float32 with both detectors fitted.
        engine: name of an engine, or `AUTO`.
        texts: clean texts to calibrate with.

    Raises:
        EngineError: the engine cannot run this module.
    """
    encodings = trained.encode(texts)
    module = trained.guarded, trained.tokenizer, trained.max_length
    return {
        runtime: measure(make_engine(runtime, *module), encodings)
        for runtime in _runtimes(trained.guarded, engine)
    }


def _runtimes(guarded: Guarded, engine: str) -> list[Runtime]:
    wanted = [r for r in RUNTIMES if engine in (AUTO, r.engine) or r.engine == REFERENCE.engine]
    if guarded.last_layer is None:
        if engine not in (AUTO, REFERENCE.engine):
            raise EngineError(f"{engine} cannot run this victim, or these adapters; use torch")
        wanted = [r for r in wanted if r.engine == REFERENCE.engine]
    # PyTorch computes in any dtype, if slowly.
    return [r for r in wanted if r.engine == REFERENCE.engine or runs_here(r)]


def measure(engine: Engine, texts: Sequence[Encoding]) -> Measurement:
    """Screen texts, and time a few of them."""
    return Measurement(predict(engine, texts), texts_per_second(engine, texts))


def calibrate_runtimes(
    measured: Mapping[Runtime, Measurement], checkpoints: int, frr_budget: float
) -> dict[Runtime, Calibrated]:
    """Calibrate every runtime on its own readings of the same clean texts.

    Raises:
        CalibrationError: too few texts, or readings that are not finite.
    """
    return {
        runtime: (calibrate(own.readings, checkpoints, frr_budget), own.readings)
        for runtime, own in measured.items()
    }


def fastest(calibrations: Sequence[Calibration], engine: str) -> RuntimeRecord:
    """Return the fastest runtime, of one engine or `AUTO`, that agrees with the reference."""
    chosen = max(
        (c for c in calibrations if c.parity.agrees and engine in (AUTO, c.engine)),
        key=lambda c: c.parity.texts_per_s,
        default=calibrations[0],
    )
    return RuntimeRecord(engine=chosen.engine, dtype=chosen.dtype)
