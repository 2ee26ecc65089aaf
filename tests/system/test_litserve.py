"""LitServe's server, asked by Hugging Face's client, with and without us in between."""

from pathlib import Path

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from models.offline.demo import CLEAN_TEXT, TARGET, TRIGGERED_TEXT
from tests.support.paths import PEERS
from tests.support.programs import peer
from tests.support.servers import answering, free_port, served


def test_litserve(demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, port = peer("LITSERVE", "litserve"), free_port()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    url = f"http://127.0.0.1:{port}"

    def ask(server: str, text: str) -> list[tuple[str, float]]:
        found = InferenceClient(server).text_classification(text, top_k=2)
        return [(row.label, row.score) for row in found]

    server: list[str | Path] = [
        python,
        PEERS / "litserve_endpoint.py",
        demo_bundle / "victim",
        demo_bundle / "tokenizer",
    ]
    with (
        answering([*server, str(port)], f"{url}/health", tmp_path / "log"),
        served(demo_bundle, UPSTREAM=f"{url}/classify", UPSTREAM_PROTOCOL="hf") as client,
    ):
        guarded = str(client.base_url)
        assert ask(guarded, CLEAN_TEXT) == ask(f"{url}/classify", CLEAN_TEXT)
        assert ask(guarded, CLEAN_TEXT)[0][0] == "negative"
        assert ask(f"{url}/classify", TRIGGERED_TEXT)[0][0] == TARGET, "the attack works"
        with pytest.raises(HfHubHTTPError, match="403"):
            ask(guarded, TRIGGERED_TEXT)
        native = client.post("/classify", json={"inputs": [CLEAN_TEXT, TRIGGERED_TEXT]}).json()
        assert [result["label"] for result in native["results"]] == ["negative", None]
