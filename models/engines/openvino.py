"""The guarded module run by OpenVINO on the CPU, about twice as fast as PyTorch.

The graph is traced from the bundle's weights when the bundle is loaded; OpenVINO files are never
read. Once it is traced, the module is not needed any more, so a service has another process trace
it (`models.bundle.apart`). The distances of the activation detector stay with PyTorch, in float32
whatever the graph's precision is.
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.jit._trace import TracerWarning
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from models.engines.pytorch import ModuleEngine
from models.errors import EngineError
from models.network.activations import Activations, Run, to_readings
from models.network.outputs import label_probabilities

if TYPE_CHECKING:  # importing these takes memory that a service can do without
    from models.network.guarded import Guarded
    from models.network.trunk import Inputs

# Importing OpenVINO would report to its maker, unless this package is missing.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
import openvino  # noqa: E402

GRAPH, ACTIVATIONS = "graph.xml", "activations.safetensors"
FILES = (GRAPH, "graph.bin", ACTIVATIONS)
"""Files of a traced module."""
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
INPUTS = "input_ids", "attention_mask"
MAX_ROWS, LENGTH_STEP, STEPS = 8, 8, 8
"""OpenVINO keeps code and buffers for each input shape, a megabyte or more. So shapes are few:
batches of 8, 4, 2 and 1 rows (more at once are no faster, and sorted texts need less padding), and
lengths rounded up to multiples of 8, a step that doubles after every eight of them."""
EXAMPLE = {
    "input_ids": torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}
"""Example for tracing; the graph must not depend on its lengths and padding."""


@dataclass(frozen=True)
class Traced:
    """A traced module: everything that is needed to run it."""

    graph: Any
    """`Guarded.run` as an OpenVINO model, not compiled."""
    activations: Activations | None
    multi_label: bool

    def save(self, folder: Path) -> None:
        """Write `FILES` into a folder of our own."""
        openvino.save_model(self.graph, folder / GRAPH, compress_to_fp16=False)
        if self.activations:
            tensors = {"whitening": self.activations.whitening, "means": self.activations.means}
            save_file(tensors, folder / ACTIVATIONS)

    @staticmethod
    def load(folder: Path, *, multi_label: bool) -> "Traced":
        """Return what was saved; the files are not needed afterwards."""
        core, file = openvino.Core(), folder / ACTIVATIONS
        core.set_property({"ENABLE_MMAP": False})
        activations = Activations(**load_file(file)) if file.stat().st_size else None
        return Traced(core.read_model(folder / GRAPH), activations, multi_label)


def trace(guarded: "Guarded") -> Traced:
    """Trace a module, which is moved to the CPU and not needed afterwards.

    Args:
        guarded: the module in float32, with trained adapters.

    Raises:
        EngineError: the module is not traceable.
    """
    if not guarded.is_traceable:
        raise EngineError(
            f"OpenVINO cannot run this {guarded.config.model_type} model, since its last layer "
            "runs as a whole; use the engine torch"
        )
    graph = converted(_Run(guarded.cpu().eval()), EXAMPLE)
    return Traced(graph, guarded.activations, guarded.multi_label)


class OpenVinoEngine(ModuleEngine):
    """Runs a traced module as an OpenVINO graph.

    Args:
        traced: the module.
        tokenizer: the victim's tokenizer, with a padding token.
        max_length: tokens per text, special tokens included.
        dtype: `float32` or `bfloat16`.

    Raises:
        EngineError: the processor does not compute in `dtype`.
    """

    name = "openvino"

    def __init__(
        self,
        traced: Traced,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        dtype: str = "float32",
    ) -> None:
        self.dtype = dtype
        graph = GuardedGraph(traced, dtype, max_length)
        super().__init__(graph, tokenizer, max_length, torch.device("cpu"))


class GuardedGraph:
    """Stand-in for a `Guarded`."""

    forward_passes = 1.0

    def __init__(self, traced: Traced, dtype: str, max_length: int) -> None:
        if dtype == "bfloat16" and not computes_bfloat16():
            raise EngineError("this processor does not compute in bfloat16; use float32")
        self._run = compiled(traced.graph, dtype)
        self._activations, self._max_length = traced.activations, max_length
        self._multi_label = traced.multi_label

    def screen(self, inputs: "Inputs") -> tuple[torch.Tensor, torch.Tensor]:
        """See `Guarded.screen`."""
        parts = [call(self._run, *part) for part in parts_of(inputs, self._max_length)]
        logits, own, peak, *states = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        run = Run(logits, own, peak, states)
        readings = to_readings(run, self._activations, multi_label=self._multi_label)
        return readings, label_probabilities(own, multi_label=self._multi_label)

    def classify(self, inputs: "Inputs") -> torch.Tensor:
        """See `Guarded.classify`; costs what screening costs."""
        return self.screen(inputs)[1]


class _Run(nn.Module):
    def __init__(self, guarded: "Guarded") -> None:
        super().__init__()
        self.guarded = guarded

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        logits, own, peak, states = self.guarded.run(inputs)
        return logits, own, peak, *states


def computes_bfloat16() -> bool:
    """Return whether the processor computes in bfloat16; OpenVINO would fall back silently."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def converted(module: nn.Module, example: Any) -> Any:
    """Trace a module with example inputs; return an OpenVINO model."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(ERROR)  # transformers warns about attributes that tracing reads
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Warnings about shapes of the example; the tests compare graphs on other shapes.
            warnings.simplefilter("ignore", TracerWarning)
            # DeBERTa makes a tensor of a size, which is one already while it is traced.
            warnings.filterwarnings("ignore", "To copy construct from a tensor", UserWarning)
            # torch.export, the successor, cannot follow the exception that ends the trunk.
            warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
            return openvino.convert_model(module, example_input=example)
    finally:
        logging.set_verbosity(verbosity)


def compiled(graph: Any, dtype: str) -> Any:
    """Return an OpenVINO model ready to compute in `dtype`."""
    settings = {
        # float32 must be set: processors with bfloat16 would use that by default.
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Replicas on one machine would all be pinned to the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    return openvino.Core().compile_model(graph, "CPU", settings)


def parts_of(inputs: "Inputs", max_length: int) -> Iterator[list[torch.Tensor]]:
    """Yield `INPUTS` in parts, rows in order, of one of few shapes (see `MAX_ROWS`).

    Padding is masked, so it may be token 0 whatever the tokenizer's is. But it takes positions, so
    no part is longer than `max_length`.
    """
    lengths, start = inputs["attention_mask"].sum(1).tolist(), 0
    while left := len(lengths) - start:
        rows = slice(start, start + min(MAX_ROWS, 1 << (left.bit_length() - 1)))
        length = min(rounded(max(lengths[rows])), max_length)
        padding = length - inputs["input_ids"].shape[1]  # a negative one cuts
        yield [nn.functional.pad(inputs[name][rows], (0, padding)) for name in INPUTS]
        start = rows.stop


def rounded(length: int) -> int:
    """Round up to a multiple of 8 up to 64, of 16 up to 128, and so on."""
    step = LENGTH_STEP
    while length > STEPS * step:
        step *= 2
    return -(-length // step) * step


def call(model: Any, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
    """Run a graph; return its outputs."""
    arrays = [np.ascontiguousarray(tensor.numpy()) for tensor in inputs]
    outputs = model(arrays, share_inputs=True, share_outputs=False)
    return [torch.from_numpy(array) for array in outputs.values()]
