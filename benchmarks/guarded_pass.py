"""What the guard costs: texts per second, beside the bare model and guards of whole passes.

Bare is what transformers makes of the victim in the same dtype; two passes is that run twice, once
for PSIM as a model of its own; own unguarded is our engine without PSIM; by whole passes is PSIM as
PEFT runs it, checkpoint by checkpoint on a shared trunk, and then the victim.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from harness import Result, Setup, in_turn, pin
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from models.bundle.load import load_bundle
from models.engines.base import Encoding, Engine
from models.engines.pytorch import DTYPES, ModuleEngine, TorchEngine, collate
from models.network.guarded import Guarded
from models.network.trunk import Inputs

SIZES, TEXTS = (1, 8, 32), 128
Run = Callable[[Sequence[Encoding]], object]


def load_engine(setup: Setup, dtype: str, name: str | None = None) -> Any:
    """Return an engine of the bundle, by default the one that is measured.

    An engine keeps the number of threads that it is loaded with: here, that of servers.
    """
    torch.set_num_threads(setup.threads)
    return load_bundle(setup.bundle, dtype, name or setup.engine).engine


def guarded(engine: Engine, batch: Sequence[Encoding]) -> None:
    """Screen and classify."""
    engine.classify(engine.screen(batch).states)


def bare(model: Any) -> Run:
    """Return a model as transformers runs it."""
    model.eval()
    pad_id = int(model.config.pad_token_id or 0)

    def run(batch: Sequence[Encoding]) -> None:
        with torch.inference_mode():
            inputs = collate(batch, pad_id, torch.device("cpu"))
            model(**inputs).logits.float().softmax(-1).numpy()

    return run


class Unguarded(nn.Module):
    """Our trunk and last layer with one branch: the engine without PSIM and the second screen."""

    def __init__(self, guarded: Guarded) -> None:
        super().__init__()
        self.guarded = guarded

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        module, inputs = self.guarded, {"input_ids": input_ids, "attention_mask": attention_mask}
        assert module.last_layer is not None
        entering = module.trunk.output(lambda: module.victim(**inputs))
        read = module.trunk.read_positions(inputs)
        mask = module.trunk.read_mask(inputs, read)
        rows, _ = module.last_layer(entering, mask, read, [])
        return module.last_layer.head(rows[:, 0])


def own_unguarded(engine: ModuleEngine, module: Guarded) -> Run:
    """Return `Unguarded` as the engine would run it; `module` is what the engine was made of."""
    victim = Unguarded(module).eval()
    logits = _by_openvino(victim, engine) if engine.name == "openvino" else lambda i: victim(**i)

    def run(batch: Sequence[Encoding]) -> None:
        with torch.inference_mode():
            logits(collate(batch, engine.pad_id, engine.device)).float().softmax(-1).numpy()

    return run


def _by_openvino(victim: Unguarded, engine: ModuleEngine) -> Callable[[Inputs], torch.Tensor]:
    from models.engines import openvino

    graph = openvino.compiled(openvino.converted(victim, openvino.EXAMPLE), engine.dtype)
    parts = openvino.parts_of
    return lambda inputs: torch.cat(
        [openvino.call(graph, *part)[0] for part in parts(inputs, engine.max_length)]
    )


def by_whole_passes(engine: TorchEngine) -> Run:
    """Return the guard as it is without a tail."""
    module, tail = engine.guarded, engine.guarded.last_layer

    def run(batch: Sequence[Encoding]) -> None:
        module.last_layer = None
        guarded(engine, batch)
        module.last_layer = tail

    return run


def own_runs(engine: Any, setup: Setup) -> dict[str, Run]:
    """Return the engine's ways: guarded, unguarded, and where it can by whole passes."""
    ways: dict[str, Run] = {"guarded": partial(guarded, engine)}
    of = engine if isinstance(engine, TorchEngine) else load_engine(setup, "float32", "torch")
    if of.guarded.last_layer is not None:
        ways["own unguarded"] = own_unguarded(engine, of.guarded)
    if of is engine:
        ways["by whole passes"] = by_whole_passes(engine)
    return ways


def measure(setup: Setup) -> Result:
    """Return texts per second by dtype, batch and way, a figure for each round."""
    pin(setup)
    rows = []
    for dtype in setup.dtypes:
        engine = load_engine(setup, dtype)
        victim = setup.bundle / "victim"
        run = bare(AutoModelForSequenceClassification.from_pretrained(victim, dtype=DTYPES[dtype]))

        def two_passes(batch: Sequence[Encoding], run: Run = run) -> None:
            run(batch)
            run(batch)

        ways = {"bare": run, "two passes": two_passes} | own_runs(engine, setup)
        encodings = engine.encode(setup.texts[:TEXTS])
        for size in tqdm(SIZES, desc=f"engine, {dtype}"):
            batches = [encodings[i : i + size] for i in range(0, len(encodings), size)]
            if size == 1:
                batches = batches[: max(1, len(batches) // 4)]
            rates = rates_of(ways, batches, setup.rounds)
            rows += [
                {"dtype": dtype, "batch": size, "way": way, "rates": found}
                for way, found in rates.items()
            ]
    return {"engine": engine.name, "threads": setup.threads, "rows": rows}


def rates_of(
    ways: dict[str, Run], batches: Sequence[Sequence[Encoding]], rounds: int
) -> dict[str, list[float]]:
    """Return texts per second by way and round."""

    def over(run: Run) -> None:
        for batch in batches:
            run(batch)

    count = sum(map(len, batches))
    seconds = in_turn({way: partial(over, run) for way, run in ways.items()}, rounds)
    return {way: [count / s for s in found] for way, found in seconds.items()}


def rates_at(result: Result, dtype: str, batch: int) -> dict[str, list[float]]:
    """Return the rates by way of one dtype and batch."""
    rows = result["rows"]
    return {r["way"]: r["rates"] for r in rows if (r["dtype"], r["batch"]) == (dtype, batch)}
