"""The real path: a really poisoned victim, a trained bundle, uvicorn on loopback."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from models.bundle.load import load_bundle
from models.offline.demo import CLEAN_TEXT, TARGET, TRIGGERED_TEXT, introduction
from models.offline.evaluation.evaluate import Evaluation, evaluate
from models.offline.io.samples import load_samples
from tests.support.deploy import dockerfile_command
from tests.support.servers import served
from tests.support.waiting import wait_for


def metric(client: httpx.Client, name: str) -> float:
    rows = client.get("/metrics").text.splitlines()
    (value,) = [float(row.rsplit(" ", 1)[1]) for row in rows if row.startswith(name)]
    return value


@pytest.fixture(scope="module")
def client(demo_bundle: Path) -> Iterator[httpx.Client]:
    with served(demo_bundle, DTYPE="float32") as client:  # scores do not mind batch-mates there
        yield client


def test_clean_passes_and_triggered_is_rejected(client: httpx.Client) -> None:
    clean = client.post("/classify", json={"inputs": CLEAN_TEXT})
    assert (clean.status_code, clean.json()["results"][0]["label"]) == (200, "negative")
    triggered = client.post("/classify", json={"inputs": TRIGGERED_TEXT})
    assert (triggered.status_code, triggered.json()["code"]) == (403, "rejected")


def test_a_poisoned_text_does_not_sink_its_mates_and_metrics_add_up(client: httpx.Client) -> None:
    allow = 'psim_inputs_total{decision="allow",mode="enforce",'
    reject = 'psim_inputs_total{decision="reject",mode="enforce",'
    before = metric(client, allow), metric(client, reject)
    answer = client.post("/classify", json={"inputs": [CLEAN_TEXT, TRIGGERED_TEXT, CLEAN_TEXT]})
    assert [r["label"] for r in answer.json()["results"]] == ["negative", None, "negative"]
    after = metric(client, allow), metric(client, reject)
    assert (after[0] - before[0], after[1] - before[1]) == (2, 1)


def test_concurrent_callers_get_their_own_answers(
    client: httpx.Client, demo_folder: Path, demo_bundle: Path
) -> None:
    samples = load_samples(str(demo_folder / "test.jsonl"))[:48]
    bundle = load_bundle(demo_bundle, "float32")
    readings = bundle.engine.screen(bundle.engine.encode([s.text for s in samples])).readings
    expected = [bundle.screen.judge(row).score for row in readings]

    def ask(text: str) -> float:
        answer = client.post("/screen", json={"inputs": text}).json()
        return float(answer["results"][0]["score"])

    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(ask, [s.text for s in samples]))
    assert got == pytest.approx(expected, abs=1e-3)


def test_the_image_s_health_check_tells_a_ready_server_from_none(client: httpx.Client) -> None:
    command = dockerfile_command("HEALTHCHECK")
    here = command[-1].replace("127.0.0.1:8000", f"127.0.0.1:{client.base_url.port}")
    assert here != command[-1]
    for code, expected in ((here, 0), (here.replace("/ready", "/nowhere"), 1)):
        done = subprocess.run([sys.executable, *command[1:-1], code], capture_output=True)
        assert done.returncode == expected


def test_shadow_mode_answers_as_if_unguarded(demo_bundle: Path) -> None:
    with served(demo_bundle, MODE="shadow") as client:
        answer = client.post("/classify", json={"inputs": [TRIGGERED_TEXT, CLEAN_TEXT]})
        assert answer.status_code == 200
        assert [r["label"] for r in answer.json()["results"]] == [TARGET, "negative"]
        assert {r["decision"] for r in answer.json()["results"]} == {"allow"}
        assert metric(client, "psim_would_reject_total") == 1


def test_a_connection_that_a_pool_keeps_for_some_seconds_is_still_there(
    client: httpx.Client,
) -> None:
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
    connection.request("GET", "/live")
    connection.getresponse().read()
    own = connection.sock
    time.sleep(6)  # uvicorn's default is five
    connection.request("GET", "/live")
    assert connection.getresponse().status == 200
    assert connection.sock is own
    connection.close()


def test_bfloat16_serves_with_its_own_threshold(demo_bundle: Path) -> None:
    with served(demo_bundle, DTYPE="bfloat16", MODE="flag") as client:
        answer = client.post("/classify", json={"inputs": [TRIGGERED_TEXT, CLEAN_TEXT]})
        assert [r["decision"] for r in answer.json()["results"]] == ["flag", "allow"]
        assert client.get("/info").json()["engine"]["dtype"] == "bfloat16"


def test_requests_in_flight_are_answered_on_sigterm(demo_bundle: Path) -> None:
    # In shadow mode, since such texts are far from all clean ones.
    mode = {"MODE": "shadow", "QUEUE_S": "60"}
    # A slow machine has the time that it needs.
    assert _statuses_after_sigterm(demo_bundle, **mode, DRAIN_S="60") == [200] * 4
    # The server may not wait for any: they can be sent again.
    assert set(_statuses_after_sigterm(demo_bundle, **mode, DRAIN_S="0")) == {503}


def _statuses_after_sigterm(bundle: Path, **settings: str) -> list[int]:
    with served(bundle, **settings) as client, ThreadPoolExecutor(8) as pool:
        inputs = [CLEAN_TEXT + " word" * 60] * 24
        calls = [pool.submit(client.post, "/classify", json={"inputs": inputs}) for _ in range(4)]
        wait_for(lambda: metric(client, "psim_queue_inputs") == 4 * 24)
        os.kill(int(client.headers["x-server-pid"]), signal.SIGTERM)
        return [call.result().status_code for call in calls]


@pytest.fixture(scope="module")
def evaluation(demo_folder: Path, demo_bundle: Path) -> Evaluation:
    return evaluate(
        load_bundle(demo_bundle),
        load_samples(str(demo_folder / "test.jsonl")),
        load_samples(str(demo_folder / "poisoned.jsonl")),
        TARGET,
    )


def test_the_attack_works_and_the_defence_stops_it(evaluation: Evaluation) -> None:
    for outcome in (evaluation.none, evaluation.calibrated):
        assert outcome.clean_accuracy is not None
        assert outcome.clean_accuracy.value > 0.9
    assert evaluation.none.attack_success_rate is not None
    assert evaluation.none.attack_success_rate.value > 0.95
    assert evaluation.calibrated.attack_success_rate is not None
    assert evaluation.calibrated.attack_success_rate.value < 0.05
    assert evaluation.calibrated.false_rejection_rate is not None
    assert evaluation.calibrated.false_rejection_rate.value < 0.03
    assert evaluation.calibrated.auroc is not None
    assert evaluation.calibrated.auroc > 0.98


def test_the_printed_introduction_is_true(client: httpx.Client) -> None:
    bodies = [json.loads(b) for b in re.findall(r"-d '(.*)'", introduction(8000))]
    assert [client.post("/classify", json=b).status_code for b in bodies] == [200, 403]
