"""The engine on a GPU, in one command of under eight minutes on a machine with nothing but PyTorch.

Guarded beside bare transformers and beside our engine without PSIM, on models of random weights, in
bfloat16. Printed last is one table: milliseconds a batch, ratios, and texts a second. Three ways to
save the GPU its many small launches are tried, and none is served yet:

- `graphs`: the guarded pass captured as a CUDA graph, one for each shape;
- `compiled`: by `torch.compile`, mode `reduce-overhead`, for a few shapes, since it takes long;
- `collate`: how long the host takes to put a batch together, which is in all of the others.

Each is compared with the plain pass first, and what fails or differs says so in the table.

    python benchmarks/gpu.py --out gpu.json          # with --quick, a smoke test on a CPU too
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from growth import random_guarded
from guarded_pass import Unguarded
from page import markdown
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from models.engines.base import Encoding
from models.engines.pytorch import best_device, collate
from models.network.guarded import Guarded

LENGTHS, SIZES = (32, 128), (1, 8, 32, 128)
COMPILED = {("BERT 12 x 768", 32, size) for size in (1, 128)}
"""What is compiled: model, tokens, batch."""
ROUNDS, WARM_UP = 20, 3
TOLERANCE = 0.02
"""Largest difference of a probability in bfloat16 between two ways that agree."""
Inputs = Mapping[str, torch.Tensor]
Way = Callable[[Sequence[Encoding]], torch.Tensor]


def bert(layers: int, width: int) -> PreTrainedModel:
    heads = max(1, width // 64)
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
        )
    )


def llama() -> PreTrainedModel:
    return LlamaForSequenceClassification(  # type: ignore[no-untyped-call]
        LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            pad_token_id=0,
        )
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "BERT 6 x 384": partial(bert, 6, 384),
    "BERT 12 x 768": partial(bert, 12, 768),
    "BERT 24 x 1024": partial(bert, 24, 1024),
    "LLaMA 16 x 2048": llama,
}


class Graphs:
    """Captures the guarded pass as a CUDA graph for each shape, and replays it."""

    def __init__(self, module: Guarded) -> None:
        self._module = module
        self._captured: dict[
            torch.Size, tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor], torch.Tensor]
        ] = {}

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        shape = inputs["input_ids"].shape
        if shape not in self._captured:
            self._captured[shape] = self._capture(inputs)
        graph, own, readings = self._captured[shape]
        for name, tensor in inputs.items():
            own[name].copy_(tensor)
        graph.replay()
        return readings.clone()

    def _capture(
        self, inputs: Inputs
    ) -> tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor], torch.Tensor]:
        own = {name: tensor.clone() for name, tensor in inputs.items()}
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as PyTorch's documentation asks for
            for _ in range(WARM_UP):
                self._module.screen(own)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            readings, _ = self._module.screen(own)
        return graph, own, readings


def ways_of(make: Callable[[], PreTrainedModel], device: torch.device) -> dict[str, Way]:
    """Return each way to run a model, on a batch of texts."""
    bare: Any = make()
    bare = bare.to(device, torch.bfloat16).eval()
    module = random_guarded(make()).to(device, torch.bfloat16).eval()
    unguarded = Unguarded(module).eval()
    found: dict[str, Callable[[Inputs], torch.Tensor]] = {
        "guarded": lambda inputs: module.screen(inputs)[0],
        "bare": lambda inputs: bare(**inputs).logits.float().softmax(-1),
        "own unguarded": lambda inputs: unguarded(**inputs).float().softmax(-1),
        "compiled": torch.compile(lambda inputs: module.screen(inputs)[0], mode="reduce-overhead"),
    }
    if device.type == "cuda":
        found["graphs"] = Graphs(module)

    def whole(run: Callable[[Inputs], torch.Tensor], batch: Sequence[Encoding]) -> torch.Tensor:
        with torch.inference_mode():
            return run(collate(batch, 0, device)).cpu()

    ways: dict[str, Way] = {name: partial(whole, run) for name, run in found.items()}
    return ways | {"collate": lambda batch: collate(batch, 0, device)["input_ids"]}


def milliseconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the median time of a call, which includes the copy of its answer to the host."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken)


def measure(ways: Mapping[str, Way], batch: Sequence[Encoding], rounds: int) -> dict[str, Any]:
    """Return milliseconds by way; of one that fails or differs, why."""
    device, row = best_device(), dict[str, Any]()
    expected = ways["guarded"](batch)
    for name, way in ways.items():
        try:
            said = way(batch)
            if name in ("compiled", "graphs"):
                difference = (said - expected)[:, :1].abs().max().item()
                if not difference < TOLERANCE:
                    row[name] = f"differs by {difference:.3f}"
                    continue
            row[name] = milliseconds(partial(way, batch), device, rounds)
        except Exception as error:  # one way that cannot be run must not end the others
            row[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table that is printed last."""
    names = ["guarded", "bare", "own unguarded", "graphs", "compiled", "collate"]

    def shown(value: object) -> str:
        return f"{value:.2f}" if isinstance(value, float) else str(value or "-")

    lines = []
    for row in rows:
        best = min(
            row[n] for n in ("guarded", "graphs", "compiled") if isinstance(row.get(n), float)
        )
        lines.append([
            row["model"], f"{row['batch']} x {row['tokens']}", *(shown(row.get(n)) for n in names),
            f"{row['bare'] / best:.2f}", f"{row['own unguarded'] / best:.2f}",
            f"{1000 * row['batch'] / best:,.0f}",
        ])  # fmt: skip
    header = ["model", "batch", *(f"{name}, ms" for name in names)]
    return markdown([*header, "best / bare", "best / own unguarded", "texts/s, best"], lines)


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    quick: Annotated[bool, typer.Option(help="One model and few sizes: a smoke test.")] = False,
) -> None:
    device, rows = best_device(), list[dict[str, Any]]()
    sizes = [(32, 1), (32, 8)] if quick else [(n, size) for n in LENGTHS for size in SIZES]
    for name, make in list(MODELS.items())[: 1 if quick else None]:
        torch.manual_seed(0)
        ways = ways_of(make, device)
        for tokens, size in tqdm(sizes, desc=name):
            batch = [Encoding(tuple(range(1000, 1000 + tokens)), truncated=False)] * size
            left_out = () if (name, tokens, size) in COMPILED else ("compiled",)
            own = {way: run for way, run in ways.items() if way not in left_out}
            row = measure(own, batch, 3 if quick else ROUNDS)
            rows.append({"model": name, "tokens": tokens, "batch": size} | row)
            if out:  # each time, so that an end by a time limit leaves what was measured
                out.write_text(json.dumps(rows, indent=1))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU: figures mean nothing"
    print(f"\n{where}, PyTorch {torch.__version__}, bfloat16\n\n{table(rows)}")


if __name__ == "__main__":
    typer.run(main)
