"""Real servers and their official clients: the same client code with and without us in between.

`docs/compatibility.md` lists what is proven here, with which versions.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from tritonclient.utils import InferenceServerException

from models.offline.demo import CLEAN_TEXT, TARGET, TRIGGERED_TEXT
from models.offline.io.samples import load_samples
from tests.support.servers import free_port, served, serving
from tests.support.triton import client_for, tensor
from tests.support.waiting import wait_for

MLSERVER = os.environ.get("MLSERVER") or shutil.which("mlserver")
RUNTIME = """
from typing import List
from mlserver import MLModel
from mlserver.codecs import decode_args
import numpy as np

class Bare(MLModel):
    @decode_args
    async def predict(self, text: List[str]) -> np.ndarray:
        odds = np.array([[1 / (1 + len(t)), len(t) / (1 + len(t))] for t in text], np.float32)
        return odds
"""


@pytest.fixture(scope="module")
def pipeline_server(demo_bundle: Path) -> Iterator[str]:
    """The demo's victim in a transformers pipeline: as Hugging Face's containers serve it, and as
    TEI does, whose own server is no Python package."""
    from transformers import pipeline

    run = pipeline(
        "text-classification",
        model=str(demo_bundle / "victim"),
        tokenizer=str(demo_bundle / "tokenizer"),
    )

    async def inference(request: Request) -> JSONResponse:
        body = await request.json()
        found = run(body["inputs"], **{"top_k": None} | body.get("parameters", {}))
        return JSONResponse([found] if isinstance(body["inputs"], str) else found)

    async def predict(request: Request) -> JSONResponse:
        inputs = (await request.json())["inputs"]
        if isinstance(inputs, str):
            return JSONResponse(run(inputs, top_k=None))
        return JSONResponse([run(text, top_k=None) for (text,) in inputs])

    routes = [
        Route("/", inference, methods=["POST"]),
        Route("/predict", predict, methods=["POST"]),
    ]
    with serving(Starlette(routes=routes)) as address:
        yield f"http://{address}"


@pytest.mark.parametrize(("protocol", "path"), [("hf", "/"), ("tei", "/predict")])
def test_hugging_face_s_client(
    protocol: str,
    path: str,
    pipeline_server: str,
    demo_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Its client refuses even loopback while the hub is out of bounds.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def ask(url: str, text: str, **options: Any) -> list[tuple[str, float]]:
        found = InferenceClient(url + path).text_classification(text, **options)
        rows = found if isinstance(found, list) else [found]  # TEI's flat list: the best one
        return [(row.label, row.score) for row in rows]

    with served(demo_bundle, UPSTREAM=pipeline_server, UPSTREAM_PROTOCOL=protocol) as client:
        guarded = str(client.base_url).rstrip("/")
        assert ask(guarded, CLEAN_TEXT) == ask(pipeline_server, CLEAN_TEXT)
        assert ask(guarded, CLEAN_TEXT)[0][0] == "negative"
        if protocol == "hf":
            assert ask(guarded, CLEAN_TEXT, top_k=1) == ask(pipeline_server, CLEAN_TEXT, top_k=1)
        assert ask(pipeline_server, TRIGGERED_TEXT)[0][0] == TARGET, "the attack works"
        with pytest.raises(HfHubHTTPError, match="403"):
            ask(guarded, TRIGGERED_TEXT)


def test_the_bundle_s_own_classifier_answers_as_a_pipeline_does(
    pipeline_server: str, demo_folder: Path
) -> None:
    """So a client may come from a bare server to the bundle in one process, too."""
    samples = load_samples(str(demo_folder / "test.jsonl"))[:20]
    body = {"inputs": [[sample.text] for sample in samples]}
    direct = httpx.post(f"{pipeline_server}/predict", json=body).json()
    with served(demo_folder / "bundle", DTYPE="float32") as client:
        ours = client.post("/predict", json=body).json()
    answered = [(row, other) for row, other in zip(ours, direct, strict=True) if row]
    assert len(answered) >= 18
    for row, other in answered:
        assert [p["label"] for p in row] == [p["label"] for p in other]
        scores = [p["score"] for p in other]
        assert [p["score"] for p in row] == pytest.approx(scores, abs=1e-4)


def test_triton_s_client_before_the_bundle_s_own_classifier(demo_bundle: Path) -> None:
    with served(demo_bundle, MODEL="demo") as client:
        ours = client_for(client.base_url)
        assert ours.is_server_live()
        assert ours.is_server_ready()
        assert ours.is_model_ready("demo")
        metadata = ours.get_model_metadata("demo")
        assert [out["name"] for out in metadata["outputs"]] == ["label", "scores"]
        answer = ours.infer("demo", [tensor(CLEAN_TEXT, CLEAN_TEXT)])
        assert answer.as_numpy("label").tolist() == ["negative", "negative"]
        assert answer.as_numpy("scores").sum(1) == pytest.approx([1, 1], abs=1e-5)
        with pytest.raises(InferenceServerException, match="input 1 of 2"):
            ours.infer("demo", [tensor(CLEAN_TEXT, TRIGGERED_TEXT)])
        with pytest.raises(InferenceServerException, match="no such model"):
            ours.infer("other", [tensor(CLEAN_TEXT)])
        binary = triton.InferInput("text", [1], "BYTES")
        binary.set_data_from_numpy(np.array([CLEAN_TEXT], dtype=object), binary_data=True)
        assert ours.infer("demo", [binary]).as_numpy("label").tolist() == ["negative"]
        ours.close()


@pytest.fixture(scope="module")
def mlserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not MLSERVER:
        pytest.skip("MLServer is not installed; it wants an environment of its own: MLSERVER=path")
    folder = tmp_path_factory.mktemp("mlserver")
    settings = {n: free_port() for n in ("http_port", "grpc_port", "metrics_port")}
    more = {"host": "127.0.0.1", "parallel_workers": 0}
    (folder / "settings.json").write_text(json.dumps(settings | more))
    model = {"name": "bare", "implementation": "runtime.Bare"}
    (folder / "model-settings.json").write_text(json.dumps(model))
    (folder / "runtime.py").write_text(RUNTIME)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.Popen(
        [MLSERVER, "start", "."], cwd=folder, env=environment, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{settings['http_port']}"
    try:

        def ready() -> bool:
            assert process.poll() is None, "MLServer did not start"
            return httpx.get(f"{url}/v2/models/bare/ready").status_code == 200

        wait_for(ready, 60)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def test_triton_s_client_before_mlserver(mlserver: str, demo_bundle: Path) -> None:
    bare = client_for(mlserver)
    with served(demo_bundle, UPSTREAM=mlserver, MODEL="bare") as client:
        assert client.get("/info").json()["upstream"] == "oip"
        ours = client_for(client.base_url)
        for texts in ([CLEAN_TEXT], [CLEAN_TEXT, CLEAN_TEXT]):
            direct, guarded = (c.infer("bare", [tensor(*texts)]) for c in (bare, ours))
            name = direct.get_response()["outputs"][0]["name"]
            assert np.array_equal(direct.as_numpy(name), guarded.as_numpy(name))
        assert bare.get_model_metadata("bare") == ours.get_model_metadata("bare")
        bare.infer("bare", [tensor(TRIGGERED_TEXT)])
        with pytest.raises(InferenceServerException, match="trigger"):
            ours.infer("bare", [tensor(TRIGGERED_TEXT)])
        native = client.post("/classify", json={"inputs": CLEAN_TEXT}).json()["results"][0]
        assert native["scores"][0]["score"] == pytest.approx(
            len(CLEAN_TEXT) / (1 + len(CLEAN_TEXT)), abs=1e-5
        )
    bare.close()
    ours.close()
