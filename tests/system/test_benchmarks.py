"""The benchmarks run, count right, and write what they measured; never how fast anything is."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import growth
import page
import pytest
import torch
from guarded_pass import guarded
from harness import Setup, spread
from roofline import guarded_flops
from servers import CannotRunError, Peer, running
from torch.utils.flop_counter import FlopCounterMode

from models.engines.base import Encoding
from tests.support.paths import ROOT
from tests.support.waiting import wait_for

BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.parametrize("tokens", [16, 128])
def test_counted_operations_are_those_that_torch_counts(demo_bundle: Path, tokens: int) -> None:
    setup = Setup(demo_bundle, (), ())
    engine = growth.guarded_engine(setup, 2, "float32")
    batch = [Encoding(tuple(range(1000, 1000 + tokens)), truncated=False)] * 4
    model: Any = engine.guarded.victim
    model.set_attn_implementation("eager")  # torch does not count the operations of fused ones
    with FlopCounterMode(display=False) as counter:
        guarded(engine, batch)
    counted = guarded_flops(growth.config(2), 4, tokens, growth.CHECKPOINTS, 8, 1)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_bench_measures_the_gateway_and_writes_a_page(demo_bundle: Path, tmp_path: Path) -> None:
    """The real entry point without HTTP: load generator and peers come with `make bench`."""
    command = [sys.executable, str(BENCHMARKS / "bench.py"), "--quick", "--build", str(tmp_path)]
    command += ["--bundle", str(demo_bundle), "--dtype", "float32"]
    command += ["--only", "engine"]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    subprocess.run(command, check=True, env=environment, timeout=120)
    found = json.loads((tmp_path / "engine.json").read_text())
    assert {row["batch"] for row in found["rows"]} == {1, 8, 32}
    assert all(rate > 0 for row in found["rows"] for rate in row["rates"])
    written = (tmp_path / "performance.md").read_text()
    assert "guarded / own unguarded" in written
    assert "figures mean nothing" in written


def http_result(rates: dict[str, float], **gateway: Any) -> dict[str, Any]:
    """Return what the stage `http` leaves, of servers with these throughputs."""

    def level(rate: float) -> dict[str, Any]:
        times = {"p50_ms": 11.0, "p99_ms": 30.0}
        return {"connections": 8, "per_second": rate, "errors": {}, "rate": None} | times

    rows = [
        {"peer": peer, "dtype": "float32", "round": 0, "levels": [level(rate)], "start_s": 5.0,
         "peak_mb": 480.0, "at_70_percent": level(rate) if peer == page.GATEWAY else None}
        for peer, rate in rates.items()
    ]  # fmt: skip
    return {
        "rows": rows, "own": [{"dtype": "float32", "round": 0, "1": 100.0, "32": 200.0}],
        "versions": dict.fromkeys(rates, "1.0"), "packages": {peer: peer for peer in rates},
        "guards": [page.GATEWAY], "weights_mb": {"float32": 90.0}, "missing": {},
        "engine": "torch", "generator": "Locust",
    }  # fmt: skip


def test_the_benchmark_of_gpus_runs_without_one(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--quick", "--out", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(file.read_text())
    assert [(row["tokens"], row["batch"]) for row in rows] == [(32, 1), (32, 8)]
    for row in rows:
        assert all(row[way] > 0 for way in ("guarded", "bare", "own unguarded", "collate"))
        assert "graphs" not in row or torch.cuda.is_available()
    assert "| BERT 6 x 384 | 8 x 32 |" in done.stdout
    assert torch.cuda.is_available() or "figures mean nothing" in done.stdout


def test_targets_are_met_or_not_by_the_figures() -> None:
    http = http_result({page.GATEWAY: 180.0, "slow": 100.0, "fast": 150.0})
    lines = {line.split(" | ")[0]: line for line in page.targets({"http": http}).splitlines()}
    at_saturation = lines["| HTTP at saturation / engine at batch 32"]
    assert "0.90" in at_saturation and at_saturation.endswith("| met |")
    # The best peer counts, not the one that flatters.
    best = lines["| guarded over HTTP / best unguarded peer over HTTP"]
    assert "fast" in best and "1.20" in best and best.endswith("| **not met** |")
    assert "1.10" in lines["| p50 of a lone request / engine at batch 1"]
    assert "390" in lines["| resident memory over the weights, MB"]


def test_a_peer_that_cannot_run_is_on_the_page() -> None:
    http = http_result({page.GATEWAY: 180.0})
    http["missing"] = {"infinity": "pip: ERROR: no such package"}
    http["setup"] = {"load_cpus": [1], "seconds": 1}
    assert "Not measured: infinity: pip: ERROR: no such package" in page.http_section(http)


def test_a_server_is_watched_while_it_runs_and_stopped_then(tmp_path: Path) -> None:
    def command(python: str, setup: Setup, dtype: str, port: int) -> list[str]:
        return [python, "-m", "http.server", str(port), "--bind", "127.0.0.1"]

    setup = Setup(tmp_path, (), (), build=tmp_path)
    peer = Peer("files", command, "none", ready="/")
    with running(peer, Path(sys.executable), setup, "float32") as server:
        assert server.start_s > 0
        wait_for(lambda: server.peak_mb, 10)
    assert server.peak_mb > 1
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), 5)


def test_a_server_that_stops_at_once_is_reported_and_not_awaited(tmp_path: Path) -> None:
    def command(python: str, setup: Setup, dtype: str, port: int) -> list[str]:
        return [python, "-c", "raise SystemExit(3)"]

    setup = Setup(tmp_path, (), (), build=tmp_path)
    peer = Peer("none", command, "none")
    with (
        pytest.raises(CannotRunError, match="code 3"),
        running(peer, Path(sys.executable), setup, "float32"),
    ):
        pass


def test_the_page_keeps_its_prose(tmp_path: Path) -> None:
    prose = "# Title\n\n<!-- bench:targets -->\nold\n<!-- /bench -->\n\nThe end.\n"
    (tmp_path / "performance.md").write_text(prose)
    page.write({}, tmp_path)
    page.write({}, tmp_path)
    written = (tmp_path / "performance.md").read_text()
    assert written.startswith("# Title\n\n<!-- bench:targets -->\n")
    assert written.endswith("<!-- /bench -->\n\nThe end.\n")
    assert "old" not in written and written.count("<!-- /bench -->") == 1


def test_spread_shows_all_rounds() -> None:
    assert spread([1.0, 3.0, 2.0]) == "2.00 (1.00 to 3.00)"
    assert spread([2.0]) == "2.00"
