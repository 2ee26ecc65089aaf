"""What the guard costs: texts per second, beside the bare model and a guard of whole passes.

Bare is what transformers makes of the victim in the same dtype; guarded is the engine torch, and
openvino the engine of that name; by whole passes is PSIM as PEFT runs it, checkpoint by checkpoint
on a shared trunk, and then the victim. Best of several rounds,
taken in turns, so that what else the machine does hits all of them.

    python benchmarks/guarded_pass.py BUNDLE TEXTS.jsonl
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification

from models.bundle import load_bundle
from models.engines import Encoding
from models.engines.pytorch import DTYPES, TorchEngine, collate
from models.offline.data import load_samples

ROUNDS, SIZES = 5, (1, 8, 32)
Run = Callable[[Sequence[Encoding]], object]


def runs(bundle: Path, dtype: str) -> tuple[TorchEngine, dict[str, Run]]:
    engine: Any = load_bundle(bundle, dtype, "torch").engine
    graph = load_bundle(bundle, dtype, "openvino").engine
    victim = bundle / "victim"
    bare = AutoModelForSequenceClassification.from_pretrained(victim, dtype=DTYPES[dtype])
    bare.eval().to(engine.device)
    tail = engine.guarded.tail

    def guarded(batch: Sequence[Encoding]) -> None:
        engine.guarded.tail = tail
        engine.classify(engine.screen(batch).states)

    def by_whole_passes(batch: Sequence[Encoding]) -> None:
        engine.guarded.tail = None
        engine.classify(engine.screen(batch).states)

    def unguarded(batch: Sequence[Encoding]) -> None:
        with torch.inference_mode():
            bare(**collate(batch, engine.pad_id, engine.device)).logits.float().softmax(-1).numpy()

    def openvino(batch: Sequence[Encoding]) -> None:
        graph.classify(graph.screen(batch).states)

    return engine, {
        "bare": unguarded,
        "guarded": guarded,
        "openvino": openvino,
        "by whole passes": by_whole_passes,
    }


def main(
    bundle: Path,
    texts: str,
    most: Annotated[int, typer.Option(help="Texts in a round.")] = 256,
    threads: int = torch.get_num_threads(),
) -> None:
    torch.set_num_threads(threads)
    columns = "bare", "guarded", "openvino", "by whole passes", "guarded / bare", "openvino / bare"
    table = Table("dtype", "batch", *columns)
    for dtype in ("float32", "bfloat16"):
        engine, ways = runs(bundle, dtype)
        encodings = engine.encode([s.text for s in load_samples(texts, drop_empty=True)][:most])
        for size in SIZES:
            batches = [encodings[i : i + size] for i in range(0, len(encodings), size)]
            if size == 1:
                batches = batches[: most // 4]
            count, best = sum(map(len, batches)), dict.fromkeys(ways, float("inf"))
            for _ in range(ROUNDS):
                for name, run in ways.items():
                    started = time.perf_counter()
                    for batch in batches:
                        run(batch)
                    best[name] = min(best[name], time.perf_counter() - started)
            rates = {name: count / seconds for name, seconds in best.items()}
            table.add_row(
                dtype, str(size), *(f"{rate:.0f}" for rate in rates.values()),
                f"{rates['guarded'] / rates['bare']:.2f}",
                f"{rates['openvino'] / rates['bare']:.2f}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
