"""KServe's model server and its own client, with and without us in between."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from models.offline.demo import CLEAN_TEXT, TARGET, TRIGGERED_TEXT
from tests.support.paths import PEERS
from tests.support.programs import peer
from tests.support.servers import answering, free_port, served
from tests.support.triton import client_for, tensor


def test_kserve_and_its_client(demo_bundle: Path, tmp_path: Path) -> None:
    python, port = peer("KSERVE", "kserve"), free_port()
    url = f"http://127.0.0.1:{port}"

    def ask(server: str, *texts: str) -> dict[str, Any]:
        command: list[str | Path] = [python, PEERS / "kserve_client.py", server, *texts]
        done = subprocess.run(command, capture_output=True, text=True, env={})
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    server: list[str | Path] = [
        python,
        PEERS / "kserve_server.py",
        demo_bundle / "victim",
        demo_bundle / "tokenizer",
    ]
    with (
        answering([*server, str(port)], f"{url}/v2/models/demo/ready", tmp_path / "log"),
        served(demo_bundle, UPSTREAM=url, MODEL="demo") as client,
    ):
        assert client.get("/info").json()["upstream"] == "oip"
        guarded = str(client.base_url).rstrip("/")
        texts = [CLEAN_TEXT, CLEAN_TEXT]
        answer = ask(guarded, *texts)
        assert answer == ask(url, *texts)
        assert answer["label"] == ["negative", "negative"]
        assert (answer["live"], answer["ready"], answer["model"]) == (True, True, True)
        assert ask(url, TRIGGERED_TEXT)["label"] == [TARGET], "the attack works"
        refused = ask(guarded, CLEAN_TEXT, TRIGGERED_TEXT)
        assert (refused["status"], "trigger" in refused["error"]["error"]) == (403, True)

        native = client.post("/classify", json={"inputs": CLEAN_TEXT}).json()["results"][0]
        assert native["label"] == "negative"
        assert [s["score"] for s in native["scores"]] == pytest.approx(
            sorted(answer["scores"][:2], reverse=True)
        )
        # It sends no content type, without which KServe takes JSON for bytes; we say it.
        ours = client_for(client.base_url)
        heard = ours.infer("demo", [tensor(CLEAN_TEXT)]).as_numpy("scores")
        assert heard.flatten().tolist() == pytest.approx(answer["scores"][:2])
        with pytest.raises(InferenceServerException, match="trigger"):
            ours.infer("demo", [tensor(TRIGGERED_TEXT)])
        ours.close()
