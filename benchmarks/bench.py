"""`make bench`: every figure of docs/performance.md, in one run on one machine.

Each stage leaves a JSON file below `--build`; tables and plots are made of all that are there, so
that one stage can be measured anew with `--only`. With `--docs` they go into docs/performance.md,
between the markers that it has for them, and into docs/img; without, beside the JSON.

    python benchmarks/bench.py --texts sst-2/test.jsonl --docs
    python benchmarks/bench.py --quick --only engine --only http --peer "PSIM Gateway"
"""

import json
import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import growth
import guarded_pass
import over_http
import page
import roofline
import typer
from harness import Setup, machine, split_cpus, versions
from servers import PEERS

from models.offline.demo import build
from models.offline.io.samples import load_samples

Cpus = tuple[int, ...]
ROOT = Path(__file__).parent.parent
MOST_TEXTS = 1000


class Stage(StrEnum):
    """What can be measured by itself."""

    ENGINE = "engine"
    """The guarded pass beside the bare model, without HTTP."""
    GROWTH = "growth"
    """Over length, layers and batch."""
    ROOFLINE = "roofline"
    """FLOP/s beside the peak of matrix products."""
    HTTP = "http"
    """The gateway beside its peers; last, since it takes longest and depends on most."""


MEASURES = {
    Stage.ENGINE: guarded_pass.measure,
    Stage.HTTP: over_http.measure,
    Stage.GROWTH: growth.measure,
    Stage.ROOFLINE: roofline.measure,
}


def cpus(given: str | None, default: Cpus) -> Cpus:
    """Return CPU numbers written with commas."""
    return tuple(int(number) for number in given.split(",")) if given else default


def main(
    only: Annotated[list[Stage] | None, typer.Option(help="Stages; all unless given.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="The demo's unless given.")] = None,
    texts: Annotated[str | None, typer.Option(help="The demo's test texts unless given.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Both unless given.")] = None,
    engine: Annotated[str | None, typer.Option(help="The service's default unless given.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Servers by name; all.")] = None,
    rounds: int = 3,
    seconds: Annotated[float, typer.Option(help="Of load, by server, level and round.")] = 3,
    server_cpus: Annotated[str | None, typer.Option(help="Such as 0,1; all but one.")] = None,
    load_cpus: Annotated[str | None, typer.Option(help="Of the generator; the last one.")] = None,
    quick: Annotated[bool, typer.Option(help="Smoke test; the figures mean nothing.")] = False,
    build_folder: Annotated[Path, typer.Option("--build")] = ROOT / "build" / "bench",
    docs: Annotated[bool, typer.Option(help="Write docs/performance.md and docs/img.")] = False,
) -> None:
    known = [one.name for one in PEERS]
    if unknown := set(peer or ()) - set(known):
        raise typer.BadParameter(f"no such server: {', '.join(unknown)}; there are {known}")
    build_folder.mkdir(parents=True, exist_ok=True)
    demo = (bundle.parent if bundle else build().parent) / "test.jsonl"
    samples = load_samples(texts or str(demo), drop_empty=True)
    servers, load = split_cpus()
    setup = Setup(
        bundle=(bundle or build()).absolute(),
        texts=tuple(sample.text for sample in samples[: 32 if quick else MOST_TEXTS]),
        dtypes=tuple(dtype or ("float32", "bfloat16")),
        engine=engine,
        rounds=1 if quick else rounds,
        seconds=1 if quick else seconds,
        connections=(1, 8) if quick else (1, 8, 32, 128),
        server_cpus=cpus(server_cpus, servers),
        load_cpus=cpus(load_cpus, load),
        peers=tuple(peer or ()),
        build=build_folder,
        quick=quick,
    )
    allowed = os.sched_getaffinity(0)
    for stage in only or list(Stage):
        before, started = machine(), time.time()
        result = MEASURES[stage](setup)
        os.sched_setaffinity(0, allowed)
        result |= {
            "setup": described(setup, texts),
            "machine": before,
            "versions_of_all": versions(),
        }
        result |= {"at": time.strftime("%Y-%m-%d", time.gmtime()), "took_s": time.time() - started}
        (build_folder / f"{stage}.json").write_text(json.dumps(result, indent=1))
        print(page.section(stage, result))
    found = {
        stage.value: json.loads((build_folder / f"{stage}.json").read_text())
        for stage in Stage
        if (build_folder / f"{stage}.json").exists()
    }
    print(page.targets(found))
    page.write(found, page.DOCS if docs else build_folder)


def described(setup: Setup, texts: str | None) -> dict[str, Any]:
    """Return what a reader needs to repeat a measurement; no paths of this machine."""
    return {
        "texts": Path(texts).parent.name + "/" + Path(texts).name if texts else "the demo's",
        "count": len(setup.texts),
        "rounds": setup.rounds,
        "seconds": setup.seconds,
        "server_cpus": setup.server_cpus,
        "load_cpus": setup.load_cpus,
        "quick": setup.quick,
    }


if __name__ == "__main__":
    typer.run(main)
