"""The guarded module run by OpenVINO, on the CPU: about twice as fast as PyTorch there.

The graph is traced when a bundle is loaded, from the weights that the bundle holds; no file of
OpenVINO's is ever read. What the second screen makes of hidden states stays with PyTorch, in
float32 whatever the graph computes in.
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from logging import ERROR
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.jit._trace import TracerWarning
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from models.engines.pytorch import ModuleEngine
from models.errors import EngineError
from models.network.activations import to_readings
from models.network.guarded import Guarded
from models.network.trunk import Inputs

# Importing OpenVINO would report to its maker, unless this package is missing.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
import openvino  # noqa: E402

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
INPUTS = "input_ids", "attention_mask"
MOST_ROWS, LENGTH_STEP, STEPS = 8, 8, 8
"""OpenVINO keeps code and buffers for each shape that it meets, a megabyte or more. So it meets
few: batches of 8, 4, 2 and 1 rows (more at once are no faster, and sorted texts need less padding),
and lengths rounded up to multiples of 8, which double whenever there have been eight of them."""
EXAMPLE = {
    "input_ids": torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}
"""What the graph is traced with; lengths and padding must not be baked into it."""


class OpenVinoEngine(ModuleEngine):
    """Runs what `Guarded.run` does as a graph of OpenVINO; the module can be dropped then.

    Args:
        guarded: the module, on the CPU in float32; only read, and not needed afterwards.
        tokenizer: the victim's tokenizer, with a padding token.
        max_length: tokens per text, special tokens included.
        dtype: `float32` or `bfloat16`.

    Raises:
        EngineError: the module has no tail, or the processor does not compute in `dtype`.
    """

    name = "openvino"

    def __init__(
        self,
        guarded: Guarded,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        dtype: str = "float32",
    ) -> None:
        self.dtype = dtype
        graph = GuardedGraph(guarded, dtype, max_length)
        super().__init__(graph, tokenizer, max_length, torch.device("cpu"))


class GuardedGraph:
    """Stands for a `Guarded` with a tail."""

    passes = 1.0

    def __init__(self, guarded: Guarded, dtype: str, max_length: int) -> None:
        if guarded.last_layer is None:
            raise EngineError(
                f"OpenVINO cannot run this {guarded.config.model_type} model, since its last layer "
                "runs as a whole; use the engine torch"
            )
        if dtype == "bfloat16" and not computes_bfloat16():
            raise EngineError("this processor does not compute in bfloat16; use float32")
        guarded = guarded.cpu().eval()
        rows = torch.zeros(2, guarded.config.hidden_size)
        self._run = compiled(_Run(guarded), EXAMPLE, dtype)
        self._head = compiled(_Head(guarded), rows, dtype)
        self._activations, self._max_length = guarded.activations, max_length

    def screen(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Guarded.screen`."""
        parts = [call(self._run, *part) for part in parts_of(inputs, self._max_length)]
        logits, rows, *states = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return to_readings(logits, states, self._activations), rows

    def classify_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Guarded.classify_rows`."""
        (logits,) = call(self._head, rows)
        return logits.softmax(-1)

    def classify(self, inputs: Inputs) -> torch.Tensor:
        """See `Guarded.classify`; costs what screening costs."""
        return self.classify_rows(self.screen(inputs)[1])


class _Run(nn.Module):
    def __init__(self, guarded: Guarded) -> None:
        super().__init__()
        self.guarded = guarded

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        logits, rows, states = self.guarded.run(inputs)
        return logits, rows, *states


class _Head(nn.Module):
    def __init__(self, guarded: Guarded) -> None:
        super().__init__()
        self.guarded = guarded

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        assert self.guarded.last_layer is not None  # noqa: S101 - `GuardedGraph` has asked
        return self.guarded.last_layer.head(rows)


def computes_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16; OpenVINO falls back silently."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def compiled(module: nn.Module, example: Any, dtype: str) -> Any:
    """Return a module as a graph that computes in `dtype`, traced with example inputs."""
    settings = {
        # float32 has to be asked for: a processor with bfloat16 takes that by default.
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Replicas on one machine would all be pinned to the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    verbosity = logging.get_verbosity()
    logging.set_verbosity(ERROR)  # tracing reads all there is, and transformers comments on it
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Of what depends on the shape of the example, which the tests compare with others.
            warnings.simplefilter("ignore", TracerWarning)
            # OpenVINO's way out would be torch.export, which cannot follow where the trunk ends.
            warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
            graph = openvino.convert_model(module, example_input=example)
    finally:
        logging.set_verbosity(verbosity)
    return openvino.Core().compile_model(graph, "CPU", settings)


def parts_of(inputs: Inputs, max_length: int) -> Iterator[list[torch.Tensor]]:
    """Yield `INPUTS` row by row in order, in shapes of which there are few (see `MOST_ROWS`).

    Padding is masked, so that it may be token 0 whatever the tokenizer's is; but it takes
    positions, of which there may be no more.
    """
    lengths, start = inputs["attention_mask"].sum(1).tolist(), 0
    while left := len(lengths) - start:
        rows = slice(start, start + min(MOST_ROWS, 1 << (left.bit_length() - 1)))
        length = min(rounded(max(lengths[rows])), max_length)
        more = length - inputs["input_ids"].shape[1]  # cut where it is negative
        yield [nn.functional.pad(inputs[name][rows], (0, more)) for name in INPUTS]
        start = rows.stop


def rounded(length: int) -> int:
    """Return the next length that is met: multiples of 8 to 64, of 16 to 128, and so on."""
    step = LENGTH_STEP
    while length > STEPS * step:
        step *= 2
    return -(-length // step) * step


def call(model: Any, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the outputs of a graph."""
    arrays = [np.ascontiguousarray(tensor.numpy()) for tensor in inputs]
    # Not shared with the next call: rows are kept until they are classified.
    outputs = model(arrays, share_inputs=True, share_outputs=False)
    return [torch.from_numpy(array) for array in outputs.values()]
