"""The manifests as kubectl would apply them."""

import os
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import kubernetes_validate
import yaml
from cloudcoil.models.prometheus_operator import v1 as operator
from cloudcoil.models.prometheus_operator import v1alpha1

from tests.support.deploy import DOCKERFILE
from tests.support.paths import ROOT
from tests.support.programs import program

Manifest = dict[str, Any]

K8S = ROOT / "deploy/k8s"
CHART = ROOT / "deploy/helm/psim-gateway"
OLDEST = "1.30"
"""Version of Kubernetes that first has `sleep` before a pod's end switched on."""
VERSIONS = (OLDEST, "1.35", "1.36", "1.37")
"""Of Kubernetes, the oldest that works, and those that are maintained."""
UNKNOWN = {"ExternalSecret", "HTTPRoute", "RayService", "ScaledObject"}
"""Kinds without a schema here."""


def kustomized(folder: Path) -> list[Manifest]:
    """Render a kustomization, which must be valid and use nothing that is deprecated."""
    command = [program("kubectl"), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "kustomize warns of what it will not take any more"
    return list(yaml.safe_load_all(done.stdout))


def composed(base: str, components: Iterable[str]) -> list[Manifest]:
    """Render a kustomization with components."""
    with TemporaryDirectory() as folder:
        there = os.path.relpath(K8S, Path(folder).resolve())
        wanted = [f"{there}/components/{component}" for component in components]
        content = {"resources": [f"{there}/{base}"], "components": wanted}
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(content))
        return kustomized(Path(folder))


def helm(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run Helm, whatever it says, without a cluster and without the user's own configuration."""
    with TemporaryDirectory() as home:
        environment = os.environ | {
            "HELM_CONFIG_HOME": home,
            "HELM_CACHE_HOME": home,
            "KUBECONFIG": f"{home}/none",
        }
        command = [program("helm"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)


def charted(values: Manifest, release: str = "psim-gateway") -> list[Manifest]:
    """Render the chart, which must take the values."""
    return _charted(yaml.safe_dump(values), release)


@cache
def _charted(values: str, release: str) -> list[Manifest]:
    with TemporaryDirectory() as folder:
        file = Path(folder, "values.yaml")
        file.write_text(values)
        done = helm("template", release, CHART, "--namespace", "psim", "--values", file)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def assert_the_api_takes(manifest: Manifest, version: str) -> None:
    """Check a manifest against the schema of its kind, if there is one, and no more fields."""
    if manifest["apiVersion"].startswith("monitoring.coreos.com/"):
        models = v1alpha1 if manifest["apiVersion"].endswith("v1alpha1") else operator
        model: Any = getattr(models, manifest["kind"])
        parsed = model.model_validate(manifest)
        # What the operator does not know would be gone.
        assert parsed.model_dump(by_alias=True, exclude_unset=True, mode="json") == manifest
    elif manifest["kind"] not in UNKNOWN:
        assert kubernetes_validate.validate(manifest, version, strict=True) == version


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
