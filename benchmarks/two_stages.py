"""Cost of the override test: a bundle with it, beside the same bundle without it.

    python benchmarks/two_stages.py BUNDLE TEXTS.jsonl

Both screen the same texts by turns, and the best of some rounds counts. Give texts like the
bundle's own for the cost of everyday traffic, and others for that of unfamiliar traffic.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

from models.bundle.load import load_bundle
from models.detection.screen import Verdict
from models.offline.io.inference import judge_texts
from models.offline.io.samples import load_samples

ROUNDS, TEXTS = 3, 1000


def main(bundle: str, texts: str) -> None:
    """Print texts per second with the override test and without it, and their ratio."""
    both = load_bundle(Path(bundle))
    if both.override is None:
        sys.exit(f"{bundle} has no override test")
    encodings = both.engine.encode([sample.text for sample in load_samples(texts)[:TEXTS]])
    seconds: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, one in (("with", both), ("without", replace(both, override=None))):
            started = time.perf_counter()
            verdicts = judge_texts(one, encodings)
            took = time.perf_counter() - started
            seconds[name] = min(seconds.get(name, took), took)
            if name == "with":
                tested = sum(isinstance(v, Verdict) and v.override is not None for v in verdicts)
    for name, took in seconds.items():
        print(f"{name:8}{len(encodings) / took:8.0f} texts/s")
    print(f"ratio   {seconds['without'] / seconds['with']:8.2f}")
    print(f"tested  {tested / len(encodings):8.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
