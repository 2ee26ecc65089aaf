"""Image, compose file, dashboard and documents, checked without an engine that could build them."""

import os
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from sqlalchemy import make_url

from models.errors import PsimError
from service.settings import Settings, load_settings, unknown_variables
from tests.support.deploy import (
    DOCKERFILE,
    dockerfile_command,
    image_environment,
    scraped,
    working_directory,
)
from tests.support.paths import ROOT

FIT_DOCKERFILE = (ROOT / "deploy/k8s/fit/Dockerfile").read_text()
BIN = Path(sys.executable).parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


@pytest.mark.parametrize(
    "command",
    [
        ["hadolint", "--failure-threshold", "style", "Dockerfile", "deploy/k8s/fit/Dockerfile"],
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml"],
    ],
)
def test_linters_find_nothing(command: list[str]) -> None:
    done = subprocess.run(
        [BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_runs_as_nobody_and_has_no_build_stage_left() -> None:
    last = DOCKERFILE.split("\nFROM ")[-1]
    assert re.search(r"^USER \d{4,}$", last, re.M)
    assert re.search(r"^HEALTHCHECK ", last, re.M)
    assert "apt-get" not in DOCKERFILE


def test_the_image_that_fits_runs_as_nobody_and_has_what_a_fit_takes() -> None:
    assert re.search(r"^USER \d{4,}$", FIT_DOCKERFILE, re.M)
    (lock,) = re.findall(r"^ARG LOCK=(\w+)$", FIT_DOCKERFILE, re.M)
    assert lock == "demo"
    assert re.search(r'^ENTRYPOINT \["psim"\]$', FIT_DOCKERFILE, re.M)
    (torch,) = re.findall(r"^ARG TORCH=(\w+)$", FIT_DOCKERFILE, re.M)
    assert (ROOT / f"requirements/torch-{torch}.txt").exists()


def test_what_the_image_copies_is_not_ignored() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    for file in (DOCKERFILE, FIT_DOCKERFILE):
        copied = set()
        for line in re.findall(r"^COPY (?!--from)(.*)$", file, re.M):
            copied |= {name.strip("/") for name in line.split()[:-1]}
        assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_every_dependency_is_pinned_to_a_version_that_every_index_has() -> None:
    pins = (ROOT / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[\w.-]+==(\d+!)?[\d.]+((post|b)\d+)?", pin) for pin in pins), pins
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = {re.split(r"[\[<>=;, ]", want)[0].lower() for want in wanted}
    assert names - {"psim-gateway"} <= pinned


def test_image_and_compose_set_only_what_the_service_knows() -> None:
    names = re.findall(r"\b(PSIM_\w+)=", DOCKERFILE)
    names += COMPOSE["services"]["gateway"]["environment"]
    assert "PSIM_BUNDLE" in names
    assert not unknown_variables(names)


def test_compose_opens_the_console_on_purpose_and_the_service_takes_its_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway = COMPOSE["services"]["gateway"]["environment"] | {"PSIM_AUDIT_TEXT": "false"}
    for name, value in (image_environment() | gateway | {"PSIM_MODE": "enforce"}).items():
        if name.startswith("PSIM_"):
            monkeypatch.setenv(name, str(value))
    assert load_settings().console_open
    monkeypatch.delenv("PSIM_CONSOLE_OPEN")
    with pytest.raises(PsimError, match="set PSIM_KEYS, or PSIM_CONSOLE_OPEN=true"):
        load_settings()


def test_compose_rejects_nothing_before_somebody_says_so() -> None:
    assert COMPOSE["services"]["gateway"]["environment"]["PSIM_MODE"] == "${PSIM_MODE:-shadow}"


def test_each_port_is_one_thing_in_all_examples() -> None:
    ports = {"console": COMPOSE["services"]["gateway"]["environment"]["PSIM_CONSOLE_PORT"]}
    envoy = (ROOT / "deploy/envoy/ext_proc.yaml").read_text()
    ray = (ROOT / "deploy/k8s/overlays/ray/rayservice.yaml").read_text()
    (ports["ext_proc"],) = map(int, re.findall(r"PSIM_EXT_PROC_PORT=(\d+)", envoy))
    (ports["replica"],) = map(int, re.findall(r'PSIM_PORT: "(\d+)"', ray))
    assert f"port_value: {ports['ext_proc']} }}" in envoy
    assert len({8000, *ports.values()}) == 4, ports


def test_compose_keeps_the_audit_where_the_image_lets_it_write() -> None:
    gateway = COMPOSE["services"]["gateway"]
    folder = str(Path(make_url(gateway["environment"]["PSIM_AUDIT_URL"]).database or "").parent)
    kept = {path: name for name, path, *_ in (v.split(":") for v in gateway["volumes"])}
    assert kept[folder] in COMPOSE["volumes"]
    assert re.search(rf"install --directory --owner=psim .* {folder}$", DOCKERFILE, re.M)


def test_compose_publishes_on_loopback_only_and_every_port_that_is_served() -> None:
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    gateway = COMPOSE["services"]["gateway"]
    published = {int(port.rsplit(":", 1)[1]) for port in gateway["ports"]}
    (exposed,) = re.findall(r"^EXPOSE (.*)$", DOCKERFILE, re.M)
    assert published == {8000, gateway["environment"]["PSIM_CONSOLE_PORT"]}
    assert published == set(map(int, exposed.split()))


def test_grafana_in_compose_takes_no_password_and_so_not_the_one_that_everybody_knows() -> None:
    variables = COMPOSE["services"]["grafana"]["environment"]
    assert variables == {
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
        # Grafana has two ways to take a password, also that of an older volume's admin.
        "GF_AUTH_BASIC_ENABLED": "false",
        "GF_AUTH_DISABLE_LOGIN_FORM": "true",
        "GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION": "true",
    }


def test_prometheus_scrapes_the_gateway_where_compose_runs_it() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in COMPOSE["services"]
    assert f"PSIM_PORT={port}" in DOCKERFILE


def test_every_file_that_compose_mounts_is_there() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith("./") or (ROOT / source).exists(), source


def test_every_setting_and_metric_is_documented() -> None:
    pages = ("docs/configuration.md", "docs/observability.md")
    document = "".join((ROOT / page).read_text() for page in pages)
    for name in Settings.model_fields:
        assert f"`PSIM_{name.upper()}`" in document
    for series in scraped():
        name = re.sub(r"_(bucket|sum|count)$", "", series)
        assert not name.startswith("psim_") or f"`{name}" in document or name + "_total" in document


def test_every_metric_is_on_the_dashboard_or_alerted_on() -> None:
    seen = (ROOT / "deploy/grafana/dashboards/psim.json").read_text()
    seen += (ROOT / "deploy/prometheus/rules.yml").read_text()
    for series in scraped():
        name = re.sub(r"_(bucket|sum|count)$", "", series)
        assert not name.startswith("psim_") or re.search(rf"\b{name}(_total|_bucket)?\b", seen), (
            name
        )


def test_the_entrypoint_is_the_module_that_the_tests_serve() -> None:
    assert dockerfile_command("ENTRYPOINT") == ["python", "-m", "service"]


def test_compose_lets_nobody_write_where_the_image_runs() -> None:
    gateway = COMPOSE["services"]["gateway"]
    assert gateway["read_only"]
    assert "working_dir" not in gateway
    kept = [volume for volume in gateway["volumes"] if not volume.endswith(":ro")]
    writable = [*gateway["tmpfs"], *(volume.rsplit(":", 1)[1] for volume in kept)]
    assert writable == ["/tmp", "/audit"]
    assert not any(working_directory().is_relative_to(folder) for folder in writable)


@pytest.mark.parametrize(
    ("instruction", "module"),
    [("ENTRYPOINT", "uvicorn"), ("ENTRYPOINT", "service"), ("HEALTHCHECK", "urllib")],
)
def test_the_image_runs_no_code_that_lies_in_its_working_directory(
    instruction: str, module: str, tmp_path: Path
) -> None:
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text("open('executed', 'w')")
    python, *arguments = dockerfile_command(instruction)
    assert python == "python"
    environment = os.environ | image_environment()
    environment |= {"PSIM_BUNDLE": "/nowhere", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert not (tmp_path / "executed").exists()
    if instruction == "ENTRYPOINT":
        assert "/nowhere is not a bundle" in done.stderr, "it did not get that far"


def test_documents_link_to_what_is_there() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_tests_that_documents_name_are_there() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for path in re.findall(r"\btests/[\w/]+\.py", document.read_text()):
            assert (ROOT / path).exists(), f"{document.name}: {path}"
    named = re.findall(r"(test_\w+\.py)::(test_\w+)", (ROOT / "docs/reliability.md").read_text())
    assert named
    for file, name in named:
        (found,) = (ROOT / "tests").rglob(file)
        assert f"def {name}(" in found.read_text(), f"{file}::{name}"
