"""What people write first: a transformers pipeline behind FastAPI, alone or with a filter.

The handler is `async` and calls the pipeline itself, one text at a time: a pipeline is not
thread-safe, so that a handler in a thread pool would fail under load.

    python benchmarks/peers/fastapi_server.py VICTIM --texts TEXTS.json --guard strip
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

from models.detection.conformal import min_calibration_size
from models.detection.screen import FloatArray, is_extreme
from models.offline.study.defences.baselines import Strip

BUDGET = 0.05
"""Of STRIP's false rejections: what a defence costs does not depend on it, its calibration does."""


class Request(BaseModel):
    """The body of a request."""

    inputs: str


def probabilities(classifier: Any, texts: Sequence[str]) -> FloatArray:
    """Return what a pipeline says of some texts, in one batch, shape (len(texts), C)."""
    answers = classifier(list(texts), batch_size=len(texts), truncation=True, top_k=None)
    by_label = [sorted(answer, key=lambda score: str(score["label"])) for answer in answers]
    return np.array([[score["score"] for score in answer] for answer in by_label], np.float32)


def filter_of(
    guard: str, classifier: Any, model: dict[str, Any], known: list[str]
) -> Callable[[str], bool]:
    """Return what says whether a text is poisoned."""
    if guard == "second-pass":
        # PSIM as a model of its own: a checkpoint, merged, costs what any copy of the victim does.
        psim = pipeline("text-classification", **model)
        return lambda text: float(probabilities(psim, [text]).max()) > 1
    if guard == "strip":
        few, classify = min_calibration_size(BUDGET), partial(probabilities, classifier)
        strip = Strip.fit(known[few:], known[:few], classify, BUDGET)
        return lambda text: is_extreme(float(strip.scores([text], classify)[0]), strip.threshold)
    return lambda text: False


def main(
    victim: Path,
    texts: Annotated[Path, typer.Option(help="JSON list; STRIP mixes with them.")],
    guard: Annotated[str, typer.Option(help="none, second-pass or strip.")] = "none",
    dtype: Literal["float32", "bfloat16"] = "float32",
    port: int = 8000,
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
    model = {"model": str(victim), "dtype": getattr(torch, dtype), "device": "cpu"}
    classifier: Any = pipeline("text-classification", **model, top_k=None)
    flagged = filter_of(guard, classifier, model, json.loads(texts.read_text()))

    app = FastAPI()

    @app.post("/classify")
    async def classify(request: Request) -> Any:
        if flagged(request.inputs):
            return {"decision": "reject", "scores": None}
        return {"decision": "allow", "scores": classifier(request.inputs, truncation=True)}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    uvicorn.run(app, port=port, log_level="warning")


if __name__ == "__main__":
    typer.run(main)
