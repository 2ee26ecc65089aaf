"""What the guard costs: texts per second, beside the bare model and guards of whole passes.

Bare is what transformers makes of the victim in the same dtype; two passes is that run twice, once
for PSIM as a model of its own; own unguarded is our engine without PSIM; by whole passes is PSIM as
PEFT runs it, checkpoint by checkpoint on a shared trunk, and then the victim.

    python benchmarks/guarded_pass.py BUNDLE TEXTS.jsonl
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from harness import Result, Setup, in_turn, pin, ratios, split_cpus, spread
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from models.bundle import load_bundle
from models.engines import Encoding, Engine
from models.engines.pytorch import DTYPES, TorchEngine, collate
from models.offline.data import load_samples

SIZES, TEXTS = (1, 8, 32), 128
Run = Callable[[Sequence[Encoding]], object]


def load_engine(setup: Setup, dtype: str) -> Engine:
    """Return the bundle's engine; the one place that chooses it."""
    return load_bundle(setup.bundle, dtype).engine


def guarded(engine: Engine, batch: Sequence[Encoding]) -> None:
    """Screen and classify."""
    engine.classify(engine.screen(batch).states)


def bare_model(victim: Path, dtype: str) -> Run:
    """Return the victim as transformers runs it."""
    model = AutoModelForSequenceClassification.from_pretrained(victim, dtype=DTYPES[dtype]).eval()
    pad_id = model.config.pad_token_id or 0

    def run(batch: Sequence[Encoding]) -> None:
        with torch.inference_mode():
            inputs = collate(batch, pad_id, torch.device("cpu"))
            model(**inputs).logits.float().softmax(-1).numpy()

    return run


def whole_runs(engine: Engine) -> dict[str, Run]:
    """Return the engine's ways: guarded, unguarded, and where it can by whole passes."""
    if not isinstance(engine, TorchEngine) or engine.guarded.tail is None:
        return {"guarded": partial(guarded, engine), "own unguarded": engine.classify}
    module, tail = engine.guarded, engine.guarded.tail

    def own_unguarded(batch: Sequence[Encoding]) -> None:
        with torch.inference_mode():
            inputs = collate(batch, engine.pad_id, engine.device)
            mask = inputs["attention_mask"]
            hidden, rotation = module.trunk.output(lambda: module.victim(**inputs))
            rows = tail(hidden, mask, module.trunk.read_positions(mask), [], rotation)
            module.classify_rows(rows[:, 0]).cpu().numpy()

    def by_whole_passes(batch: Sequence[Encoding]) -> None:
        module.tail = None
        guarded(engine, batch)
        module.tail = tail

    return {
        "guarded": partial(guarded, engine),
        "own unguarded": own_unguarded,
        "by whole passes": by_whole_passes,
    }


def measure(setup: Setup) -> Result:
    """Return texts per second by dtype, batch and way, a figure for each round."""
    pin(setup)
    rows = []
    for dtype in setup.dtypes:
        engine = load_engine(setup, dtype)
        bare = bare_model(setup.bundle / "victim", dtype)

        def two_passes(batch: Sequence[Encoding], bare: Run = bare) -> None:
            bare(batch)
            bare(batch)

        ways = {"bare": bare, "two passes": two_passes} | whole_runs(engine)
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


def table(result: Result) -> Table:
    """Return the figures as a table, with the ratios that matter."""
    ways = list(dict.fromkeys(row["way"] for row in result["rows"]))
    shown = Table("dtype", "batch", *ways, "guarded / bare", "guarded / own unguarded")
    for dtype, batch in dict.fromkeys((row["dtype"], row["batch"]) for row in result["rows"]):
        rates = rates_at(result, dtype, batch)
        shown.add_row(
            dtype, str(batch), *(spread(rates[way], 0) for way in ways),
            spread(ratios(rates["guarded"], rates["bare"])),
            spread(ratios(rates["guarded"], rates["own unguarded"])),
        )  # fmt: skip
    return shown


def rates_at(result: Result, dtype: str, batch: int) -> dict[str, list[float]]:
    """Return the rates by way of one dtype and batch."""
    rows = result["rows"]
    return {r["way"]: r["rates"] for r in rows if (r["dtype"], r["batch"]) == (dtype, batch)}


def main(
    bundle: Path,
    texts: str,
    rounds: int = 5,
    threads: Annotated[int, typer.Option(help="CPUs to use.")] = 1,
) -> None:
    samples = tuple(s.text for s in load_samples(texts, drop_empty=True))
    cpus = tuple(split_cpus()[0][:threads])
    setup = Setup(bundle, samples, ("float32", "bfloat16"), rounds=rounds, server_cpus=cpus)
    Console().print(table(measure(setup)))


if __name__ == "__main__":
    typer.run(main)
