"""The runbook's commands for Kubernetes, as far as they go without a cluster."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.deploy import RUNBOOK
from tests.support.paths import ROOT
from tests.support.programs import program

K8S = ROOT / "deploy/k8s"
COMMANDS = re.findall(r"^ *\$ (kubectl .*)$", RUNBOOK, re.M)
OF_OTHERS = {"prometheus-operated", "psim-keys"}
"""Names of the Prometheus operator's, and of a Secret that the operator of the gateway makes."""


@pytest.mark.parametrize("command", COMMANDS)
def test_kubectl_takes_every_command_and_only_lacks_a_cluster(command: str, tmp_path: Path) -> None:
    program("kubectl")
    (tmp_path / "keys.toml").write_text("")
    (tmp_path / "config").write_text(yaml.safe_dump(NOWHERE))
    command = command.replace("-k overlay", f"-k {K8S / 'overlays/cpu'}")
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"KUBECONFIG": str(tmp_path / "config")},
        capture_output=True,
        text=True,
    )
    assert "127.0.0.1:1" in done.stderr, f"{command}: {done.stderr}"
    assert "unknown" not in done.stderr, f"{command}: {done.stderr}"


NOWHERE = {
    "apiVersion": "v1",
    "kind": "Config",
    "clusters": [{"name": "nowhere", "cluster": {"server": "http://127.0.0.1:1"}}],
    "contexts": [{"name": "nowhere", "context": {"cluster": "nowhere", "user": ""}}],
    "current-context": "nowhere",
}
"""A cluster that refuses connections."""


def manifests() -> list[dict[str, Any]]:
    """Return all resources of the base and the components."""
    files = [*K8S.glob("base/*.yaml"), *K8S.glob("components/*/*.yaml")]
    documents = [document for file in files for document in yaml.safe_load_all(file.read_text())]
    return [one for one in documents if one.get("kind") and one.get("metadata")]


def test_the_commands_name_what_the_manifests_have() -> None:
    there = {(one["kind"].lower(), one["metadata"]["name"]) for one in manifests()}
    named = {
        (kind, name)
        for command in COMMANDS
        for kind, name in re.findall(
            r"\b(deployment|service|horizontalpodautoscaler)[/ ]([\w-]+)", command
        )
    }
    assert {kind for kind, _ in named} == {"deployment", "service", "horizontalpodautoscaler"}
    assert {(kind, name) for kind, name in named if name not in OF_OTHERS} <= there
    (deployment,) = [one for one in manifests() if one["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    containers = {found for c in COMMANDS for found in re.findall(r"--containers? ([\w-]+)", c)}
    assert containers == {container["name"]}
    base = yaml.safe_load((K8S / "base/kustomization.yaml").read_text())
    ((label, value),) = base["labels"][0]["pairs"].items()
    assert {s for c in COMMANDS for s in re.findall(r"--selector (\S+)", c)} == {f"{label}={value}"}


def test_the_service_is_what_it_was_after_the_bypass() -> None:
    (service,) = [one["spec"] for one in manifests() if one["kind"] == "Service"]
    base = yaml.safe_load((K8S / "base/kustomization.yaml").read_text())
    before = service | {"selector": base["labels"][0]["pairs"]}
    patches = [c for c in map(shlex.split, COMMANDS) if c[3:5] == ["patch", "service"]]
    there, back = (json.loads(command[-1]) for command in patches)
    bypassed = patched(before, there)
    assert bypassed["selector"] != before["selector"]
    assert patched(bypassed, back) == before


def patched(specification: dict[str, Any], patch: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the specification with the values that a JSON patch replaces."""
    copy: dict[str, Any] = json.loads(json.dumps({"spec": specification}))
    for operation in patch:
        assert operation["op"] == "replace"
        *parents, last = operation["path"].removeprefix("/").split("/")
        place: Any = copy
        for key in parents:
            place = place[int(key) if isinstance(place, list) else key]
        assert last in place, "only what is there can be replaced"
        place[last] = operation["value"]
    changed: dict[str, Any] = copy["spec"]
    return changed
