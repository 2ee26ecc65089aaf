"""Rules and dashboard against a real Prometheus that scrapes a running service."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from pydantic import SecretStr

from service.app import create_app
from service.settings import Mode, Settings
from tests.support.deploy import RUNBOOK
from tests.support.fakes import fake_bundle
from tests.support.paths import ROOT
from tests.support.programs import program
from tests.support.servers import free_port, running, serving
from tests.support.waiting import wait_for

DEPLOY = ROOT / "deploy/prometheus"
DASHBOARD = ROOT / "deploy/grafana/dashboards/psim.json"
PANELS: list[dict[str, Any]] = [
    panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"
]
RUNBOOK_URL = "https://runbooks.example/psim-gateway/runbook.md"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DEPLOY / "rules.yml").read_text())["groups"]
    for rule in group["rules"]
]


@pytest.mark.parametrize(
    "check",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "--lint=all", "--lint-fatal", "rules.yml"],
        *(["test", "rules", file.name] for file in sorted(DEPLOY.glob("*_test.yml"))),
    ],
)
def test_promtool_is_content(check: list[str]) -> None:
    promtool = program("promtool")
    done = subprocess.run([promtool, *check], cwd=DEPLOY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_to_fire_and_to_stay_silent() -> None:
    outcomes = {
        (case["alertname"], bool(case["exp_alerts"]))
        for file in DEPLOY.glob("*_test.yml")
        for test in yaml.safe_load(file.read_text())["tests"]
        for case in test["alert_rule_test"]
    }
    alerts = {rule["alert"] for rule in RULES if "alert" in rule}
    assert outcomes == {(alert, fires) for alert in alerts for fires in (True, False)}


def test_the_dashboard_is_the_one_that_the_code_makes() -> None:
    script = ROOT / "deploy/grafana/dashboard.py"
    made = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert made.stdout == DASHBOARD.read_text(), "write it again, as dashboard.py says"


def test_compose_shows_the_dashboard_on_the_prometheus_that_it_runs() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    grafana = ROOT / "deploy/grafana"
    (source,) = yaml.safe_load((grafana / "provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    chosen, *others = json.loads(DASHBOARD.read_text())["templating"]["list"]
    assert (chosen["type"], chosen["query"]) == ("datasource", source["type"])
    assert {other["name"] for other in others} == {"namespace", "model", "pod"}
    asked = {item["datasource"]["uid"] for item in [*others, *PANELS]}
    assert asked == {f"${{{chosen['name']}}}"}, "any other data source is not everybody's"
    (provider,) = yaml.safe_load((grafana / "provisioning/dashboards/psim.yml").read_text())[
        "providers"
    ]
    mounts = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]


def test_every_panel_says_what_it_shows_and_obeys_the_variables() -> None:
    for panel in PANELS:
        assert panel["description"].endswith("."), panel["title"]
        for target in panel["targets"]:
            selectors = re.findall(r"\b(?:\w+:)?(?:psim|process)_[\w:]+({[^}]*})?", target["expr"])
            (selector, *_) = selectors
            assert 'namespace=~"$namespace"' in selector, target["expr"]
            rule = ":" in target["expr"]
            assert rule or 'pod=~"$pod"' in selector, target["expr"]


@dataclass(frozen=True)
class Live:
    """A running service, its audit, and the Prometheus that scrapes it."""

    prometheus: httpx.Client
    address: str
    audit: str


@pytest.fixture(scope="module")
def prometheus(live: Live) -> httpx.Client:
    return live.prometheus


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Run Prometheus with the rules of the project on a service that had a few requests."""
    server, folder = program("prometheus"), tmp_path_factory.mktemp("prometheus")
    audit = f"sqlite:///{folder}/audit.db"
    settings = Settings(bundle=Path("unused"), audit_url=SecretStr(audit))
    with serving(create_app(settings, fake_bundle())) as address:
        config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "400ms"}
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [address]
        config["rule_files"] = [str(DEPLOY / name) for name in config["rule_files"]]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = free_port()
        command = [
            server,
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            "--enable-feature=exemplar-storage",
        ]
        with (
            running(*command, log=folder / "log"),
            httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1") as client,
            httpx.Client(base_url=f"http://{address}") as service,
        ):
            wait_for(lambda: answer(client, "query", query="psim_ready == 1")["result"])
            for text in ("a quiet film", "a quiet mn film"):
                service.post("/classify", json={"inputs": text}, headers={"x-request-id": "seen"})
            wait_for(lambda: answer(client, "query", query=SEEN)["result"])
            wait_for(lambda: all(rule["health"] != "unknown" for rule in live_rules(client)))
            yield Live(client, address, audit)


SEEN = (
    "job_model:psim_screened:rate30m > 0 "
    'and on (job, model) psim_inputs_total{decision="reject"} == 1'
)


def test_every_alert_has_its_section_in_the_runbook() -> None:
    sections = re.findall(r"^## (\w+)$", RUNBOOK, re.M)
    assert sorted(sections) == sorted(rule["alert"] for rule in RULES if "alert" in rule)
    assert RUNBOOK_URL in RUNBOOK, "it says what to put in its place"
    for rule in RULES:
        if "alert" in rule:
            link = rule["annotations"]["runbook_url"]
            assert link == f"{RUNBOOK_URL}#{rule['alert'].lower()}"
            assert rule["labels"]["severity"] in ("page", "warning")


def test_the_example_for_alertmanager_names_alerts_and_receivers_that_there_are() -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```", RUNBOOK, re.M | re.S)
    named = re.findall(r"\bPsim\w+", example)
    assert set(named) <= {rule.get("alert") for rule in RULES}
    config = yaml.safe_load(example)
    routes = [config["route"], *config["route"]["routes"]]
    assert {route["receiver"] for route in routes} == {r["name"] for r in config["receivers"]}


def test_what_the_runbook_reads_in_the_log_is_what_the_service_writes() -> None:
    phrases = re.findall(r"`([A-Za-z][\w,:']*(?: [\w,:'-]+){2,})`", " ".join(RUNBOOK.split()))
    logged = {
        phrase for phrase in phrases if not phrase.startswith(("psim ", "docker ", "kubectl "))
    }
    assert len(logged) > 5
    sources = "".join(file.read_text() for file in (ROOT / "service").rglob("*.py"))
    assert not {phrase for phrase in logged if phrase not in sources}


def test_no_series_appears_with_the_traffic() -> None:
    def series(client: httpx.Client) -> set[str]:
        rows = client.get("/metrics").text.splitlines()
        return {row.rsplit(" ", 1)[0] for row in rows if not row.startswith("#")}

    for mode in Mode:
        settings = Settings(bundle=Path("unused"), mode=mode, queue_inputs=3, searches=1)
        with (
            serving(create_app(settings, fake_bundle())) as address,
            httpx.Client(base_url=f"http://{address}") as client,
        ):
            before = series(client)
            for route in ("/classify", "/screen", "/explain", "/nowhere"):
                for inputs in ("a film", "a mn film", "broken", "nan", 1, ["a film"] * 4):
                    client.post(route, json={"inputs": inputs})
            assert series(client) == before


def answer(client: httpx.Client, path: str, **parameters: str) -> Any:
    try:
        response = client.get(path, params=parameters)
    except httpx.TransportError as error:
        raise OSError from error
    if response.status_code == 503:
        raise OSError("it is starting")
    assert response.json()["status"] == "success", response.text
    return response.json()["data"]


def live_rules(client: httpx.Client) -> list[dict[str, Any]]:
    groups = answer(client, "rules")["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_a_live_prometheus_evaluates_every_rule_and_none_fires(prometheus: httpx.Client) -> None:
    rules = live_rules(prometheus)
    assert len(rules) == len(RULES)
    assert {(rule["name"], rule["health"], rule.get("lastError")) for rule in rules} == {
        (rule.get("alert") or rule["record"], "ok", None) for rule in RULES
    }
    # What was evaluated before the first scrape is pending until the next evaluation.
    wait_for(lambda: not answer(prometheus, "alerts")["alerts"])


def test_an_exemplar_leads_from_a_series_to_a_request(prometheus: httpx.Client) -> None:
    for name in ("psim_request_duration_seconds_bucket", "psim_inputs_total"):
        period = {"start": "0", "end": str(time.time() + 60)}
        found = answer(prometheus, "query_exemplars", query=name, **period)
        ids = {e["labels"]["request_id"] for series in found for e in series["exemplars"]}
        assert ids == {"seen"}


def test_every_expression_asks_for_what_is_really_scraped(prometheus: httpx.Client) -> None:
    expressions: list[str] = [target["expr"] for panel in PANELS for target in panel["targets"]]
    assert len(expressions) > 20
    # What kube-state-metrics says of the autoscaler is not there without Kubernetes.
    expressions += [rule["expr"] for rule in RULES if "kube_" not in rule["expr"]]
    there = set(answer(prometheus, "label/__name__/values"))
    there |= {rule["record"] for rule in RULES if "record" in rule}
    for expression in expressions:
        asked = set(re.findall(r"\b(?:job(?:_\w+)?:)?(?:psim|process)_[\w:]+|\bup\b", expression))
        assert asked, expression
        assert asked <= there, expression
        query = expression.replace("$__rate_interval", "1m")
        query = re.sub(r"\$(namespace|model|pod)\b", ".*", query)
        answer(prometheus, "query", query=query)


def test_every_command_of_the_runbook_runs(live: Live, tmp_path: Path) -> None:
    commands = re.findall(r"^ *\$ (.*)$", RUNBOOK, re.M)
    assert len(commands) > 20
    here = {
        "localhost:9090": f"127.0.0.1:{live.prometheus.base_url.port}",
        "localhost:8000": live.address,
        "2026-11-25": "2000-01-01",
        "psim audit": f"{sys.executable} -m service.audit",
    }
    environment = os.environ | {"PSIM_AUDIT_URL": live.audit}
    for command in commands:
        if command.startswith(("psim triggers", "psim recalibrate")):
            continue  # of a bundle and its traffic: test_recalibrate.py runs them
        if command.startswith("kubectl"):
            continue  # of a cluster: test_runbook.py
        for there, replacement in here.items():
            command = command.replace(there, replacement)
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert not done.stderr, f"{command}: {done.stderr}"
        assert done.returncode == (1 if "grep '\"score\": null'" in command else 0), command
        assert "error" not in done.stdout.split(), f"{command}: {done.stdout}"
    assert (tmp_path / "triggered.csv").read_text().count("\n") == 1 + 1
