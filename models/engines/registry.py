"""Which engines there are, what they can run here, and making one."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple

from models.errors import EngineError

if TYPE_CHECKING:  # engines are imported when they are made: names of them must cost nothing
    from transformers import PreTrainedTokenizerBase

    from models.engines.pytorch import ModuleEngine
    from models.network.guarded import Guarded

EngineName = Literal["torch", "openvino"]
DtypeName = Literal["float32", "bfloat16"]


class Runtime(NamedTuple):
    """An engine and the floating-point type that it computes in."""

    engine: EngineName
    dtype: DtypeName

    def __str__(self) -> str:
        return f"{self.engine}/{self.dtype}"


REFERENCE = Runtime("torch", "float32")
"""What the others are compared with, and what every bundle can be run by."""
RUNTIMES = (
    REFERENCE,
    Runtime("openvino", "float32"),
    Runtime("openvino", "bfloat16"),
    Runtime("torch", "bfloat16"),
)
"""All there are. Only the last one converts the module in place, so that they can follow each
other on one module."""


def is_installed(engine: str) -> bool:
    """Return whether the package behind an engine is there."""
    return find_spec(engine) is not None


def runs_here(runtime: Runtime) -> bool:
    """Return whether a runtime is installed, and its dtype one that the device computes in."""
    if not is_installed(runtime.engine):
        return False
    if runtime.dtype == "float32":
        return True
    if runtime.engine == "torch":
        from models.engines.pytorch import best_device, has_bfloat16

        return has_bfloat16(best_device())
    from models.engines.openvino import computes_bfloat16

    return computes_bfloat16()


def make_engine(
    runtime: Runtime, guarded: "Guarded", tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> "ModuleEngine":
    """Return an engine that runs a module, which must be in float32.

    Raises:
        EngineError: the engine is not installed, or cannot run this module here.
    """
    if runtime.engine == "torch":
        from models.engines.pytorch import TorchEngine

        return TorchEngine(guarded, tokenizer, max_length, runtime.dtype)
    if not is_installed(runtime.engine):
        raise EngineError(
            f"the engine {runtime.engine} is not installed: pip install "
            f"'psim-gateway[{runtime.engine}]', or use the engine torch"
        )
    from models.engines.openvino import OpenVinoEngine

    return OpenVinoEngine(guarded, tokenizer, max_length, runtime.dtype)
