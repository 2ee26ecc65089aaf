"""Engines that are installed, and the runtimes that work on this machine."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from models.engines.base import Runtime
from models.engines.pytorch import ModuleEngine, TorchEngine, best_device, has_bfloat16
from models.errors import EngineError

if TYPE_CHECKING:  # importing it takes memory that not every process needs
    from models.network.guarded import Guarded


def is_installed(engine: str) -> bool:
    """Return whether the package of an engine is installed."""
    return find_spec(engine) is not None


def runs_here(runtime: Runtime) -> bool:
    """Return whether a runtime is installed, and the device computes in its dtype."""
    if not is_installed(runtime.engine):
        return False
    if runtime.dtype == "float32":
        return True
    if runtime.engine == "torch":
        return has_bfloat16(best_device())
    from models.engines.openvino import computes_bfloat16

    return computes_bfloat16()


def is_worth_using(runtime: Runtime) -> bool:
    """Return whether a runtime runs here and uses the best device: OpenVINO knows no CUDA."""
    return runs_here(runtime) and (best_device().type == "cpu" or runtime.engine == "torch")


def make_engine(
    runtime: Runtime, guarded: "Guarded", tokenizer: PreTrainedTokenizerBase, max_length: int
) -> ModuleEngine:
    """Return an engine for a module with trained adapters, which must be in float32.

    Raises:
        EngineError: the engine is not installed, or cannot run this module here.
    """
    guarded.reuse_untrained()
    if runtime.engine == "torch":
        return TorchEngine(guarded, tokenizer, max_length, runtime.dtype)
    if not is_installed(runtime.engine):
        raise EngineError(
            f"the engine {runtime.engine} is not installed: pip install "
            f"'psim-gateway[{runtime.engine}]', or use the engine torch"
        )
    # Not at the top: it is an extra, and importing it takes memory.
    from models.engines.openvino import OpenVinoEngine, trace

    return OpenVinoEngine(trace(guarded), tokenizer, max_length, runtime.dtype)
