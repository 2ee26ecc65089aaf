"""Screening in your own Python process: `from psim import load`, see docs/python.md.

The names in `__all__` are the public interface, and no others. They are imported when they are
used, since the command `psim` lives here too and must not wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.detection.screen import Finding, Verdict
    from models.errors import BundleError, DataError, EngineError, PsimError, ScreenError
    from psim.drop_in import GuardPipeline, RejectedError, pipeline
    from psim.guard import Guard, GuardResult, LabelScore, load
    from service.schemas import Decision
else:
    _HOMES = {
        "models.detection.screen": "Finding Verdict",
        "models.errors": "BundleError DataError EngineError PsimError ScreenError",
        "psim.drop_in": "GuardPipeline RejectedError pipeline",
        "psim.guard": "Guard GuardResult LabelScore load",
        "service.schemas": "Decision",
    }
    _HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

    def __getattr__(name: str) -> object:
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOME_OF[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "BundleError",
    "DataError",
    "Decision",
    "EngineError",
    "Finding",
    "Guard",
    "GuardPipeline",
    "GuardResult",
    "LabelScore",
    "PsimError",
    "RejectedError",
    "ScreenError",
    "Verdict",
    "load",
    "pipeline",
]
