"""The manifests as kubectl would apply them."""

import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.support.deploy import DOCKERFILE
from tests.support.paths import ROOT
from tests.support.programs import program

Manifest = dict[str, Any]

K8S = ROOT / "deploy/k8s"
OLDEST = "1.30"
"""Version of Kubernetes that first has `sleep` before a pod's end switched on."""
VERSIONS = (OLDEST, "1.35", "1.36", "1.37")
"""Of Kubernetes, the oldest that works, and those that are maintained."""


def kustomized(folder: Path) -> list[Manifest]:
    """Render a kustomization, which must be valid and use nothing that is deprecated."""
    command = [program("kubectl"), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "kustomize warns of what it will not take any more"
    return list(yaml.safe_load_all(done.stdout))


def assert_has_no_rights(spec: Any) -> None:
    """Check that the containers of a pod may do nothing that they need not."""
    assert spec["automountServiceAccountToken"] is False
    rights = spec["securityContext"]
    assert rights["runAsNonRoot"]
    assert rights["seccompProfile"] == {"type": "RuntimeDefault"}
    assert f"USER {rights['runAsUser']}" in DOCKERFILE
    for container in (*spec["containers"], *spec.get("initContainers", [])):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"].keys() == {"requests", "limits"}
