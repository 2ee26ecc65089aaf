"""The page on Kubernetes: what its commands name is there, and its overlays render."""

import os
import re
import shlex
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml

from models.offline.demo import CLEAN_TEXT, TRIGGERED_TEXT, cache_folder
from psim.__main__ import load
from service.settings import unknown_variables
from tests.support.deploy import scraped
from tests.support.kubernetes import K8S, OLDEST, VERSIONS, Manifest, assert_has_no_rights
from tests.support.kubernetes import kustomized as rendered_folder
from tests.support.network_policy import NAMESPACE, OUTSIDE, Peer, allowed
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/kubernetes.md").read_text()
COMMANDS = [shlex.split(line) for line in re.findall(r"^ *\$ (.*)$", PAGE, re.M)]
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
OVERLAYS = {
    name[1]: block for block in BLOCKS if (name := re.match(r"# (\S+)/kustomization.yaml\n", block))
}
"""The kustomizations that the page has its reader write, by folder."""
SERVE, FIT, UPSTREAM = "my-cluster/serve", "my-cluster/fit", "my-cluster/tei"


@cache
def rendered(folder: str, more: str = "") -> list[Manifest]:
    """Render an overlay of the page as if its folder were in the checkout."""
    with TemporaryDirectory() as there:
        to_root = os.path.relpath(ROOT, Path(there).resolve())
        up = "../" * (folder.count("/") + 1)
        assert f"{up}deploy" in OVERLAYS[folder], "paths begin at its folder"
        overlay = OVERLAYS[folder].replace(up, f"{to_root}/") + more
        Path(there, "kustomization.yaml").write_text(overlay)
        return rendered_folder(Path(there))


def the(folder: str, kind: str) -> Any:
    (manifest,) = [manifest for manifest in rendered(folder) if manifest["kind"] == kind]
    return manifest


def test_every_kustomization_renders_into_one_namespace() -> None:
    assert OVERLAYS.keys() == {SERVE, FIT, UPSTREAM}
    for folder in OVERLAYS:
        assert {m["metadata"]["namespace"] for m in rendered(folder)} == {NAMESPACE}
    assert ["kubectl", "create", "namespace", NAMESPACE] in COMMANDS
    applied = {command[3] for command in COMMANDS if command[:3] == ["kubectl", "apply", "-k"]}
    assert applied == {SERVE, FIT}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_api_takes_what_fits(version: str) -> None:
    for manifest in rendered(FIT):
        assert kubernetes_validate.validate(manifest, version, strict=True) == version


def test_the_oldest_version_of_kubernetes_is_said() -> None:
    assert f"**Kubernetes {OLDEST} or newer**" in PAGE


def test_what_commands_name_is_there() -> None:
    names = {
        (manifest["kind"].lower(), manifest["metadata"]["name"])
        for folder in OVERLAYS
        for manifest in rendered(folder)
    }
    for command in COMMANDS:
        if command[0] != "kubectl" or "monitoring" in command or "kube-system" in command:
            continue
        words = " ".join(command)
        found = re.findall(r"\b(deployment|service|job|pod)[/ ]([a-z]+-[a-z-]+)", words)
        # `patch deployment tei` is the reader's own.
        assert not {*found} - names, words
    assert ("job", "psim-fit") in names


def test_images_are_built_by_files_that_are_there_and_are_those_of_the_overlays() -> None:
    built = {}
    for command in COMMANDS:
        if command[:2] == ["docker", "build"]:
            options = dict(zip(command[2::2], command[3::2], strict=False))
            text = (ROOT / options.get("-f", "Dockerfile")).read_text()
            given = options.get("--build-arg", "").split("=")[0]
            assert not given or f"ARG {given}" in text
            built[options["-t"]] = text
    run = {c["image"] for folder in OVERLAYS for c in containers(folder)}
    assert run <= built.keys()
    pushed = {command[2] for command in COMMANDS if command[:2] == ["docker", "push"]}
    assert pushed == run


def containers(folder: str) -> list[Any]:
    specs = [pod(manifest) for manifest in rendered(folder)]
    return [container for spec in specs if spec for container in spec["containers"]]


def pod(manifest: Manifest) -> Any:
    """Return the specification of a manifest's pods, if it has any."""
    if manifest["kind"] == "Pod":
        return manifest["spec"]
    return manifest.get("spec", {}).get("template", {}).get("spec")


def test_what_fits_has_no_rights_and_writes_where_the_gateway_reads() -> None:
    for kind in ("Pod", "Job"):
        assert_has_no_rights(pod(the(FIT, kind)))
    job, serving = pod(the(FIT, "Job")), pod(the(SERVE, "Deployment"))
    (variables,) = [m["data"] for m in rendered(FIT) if m["kind"] == "ConfigMap"]
    args = [
        re.sub(r"\$\((\w+)\)", lambda m: variables[m[1]], a) for a in job["containers"][0]["args"]
    ]
    subcommand, *options = args
    parsed = load(subcommand).make_context(subcommand, options).params
    assert parsed["frr_budget"] == 0.01

    def claim(spec: Any, path: str) -> str:
        (mount,) = [
            m
            for m in spec["containers"][0]["volumeMounts"]
            if Path(path).is_relative_to(m["mountPath"])
        ]
        (volume,) = [v for v in spec["volumes"] if v["name"] == mount["name"]]
        return str(volume["persistentVolumeClaim"]["claimName"])

    files = pod(the(FIT, "Pod"))
    assert claim(job, str(parsed["out"])) == claim(serving, "/bundle") == claim(files, "/bundles")
    copied = [c[3].split(":")[1] for c in COMMANDS if c[:2] == ["kubectl", "cp"]]
    assert copied == [parsed["victim"], parsed["texts"]]
    assert {claim(job, path) for path in copied} == {claim(files, path) for path in copied}
    claims = {m["metadata"]["name"] for m in rendered(FIT) if "Claim" in m["kind"]}
    assert claims == {claim(job, parsed["victim"]), claim(job, str(parsed["out"]))}
    assert f"`{Path('/bundle', parsed['out'].name)}`, your own" in PAGE


def test_the_demo_is_fitted_where_the_first_deployment_looks_for_it() -> None:
    (demo,) = [command for command in COMMANDS if command[-2:] == ["demo", "--no-serve"]]
    assert load("demo").make_context("demo", demo[-1:]).params["serve"] is False
    assert "XDG_CACHE_HOME=/bundles" in demo
    settings = the(SERVE, "ConfigMap")["data"]
    assert settings["PSIM_BUNDLE"] == f"/bundle/psim-gateway/{cache_folder().name}/bundle"
    assert settings["PSIM_MODE"] == "shadow"
    assert not unknown_variables(settings)
    inspected = [command[-1] for command in COMMANDS if "inspect" in command]
    assert settings["PSIM_BUNDLE"].replace("/bundle/", "/bundles/", 1) in inspected


def test_the_smoke_test_asks_with_a_clean_text_and_a_triggered_one() -> None:
    """`test_kubernetes.py` asks a service that the manifests started."""
    asked = [command for command in COMMANDS if command[0] == "curl" and "-d" in command]
    assert [yaml.safe_load(command[-1])["inputs"] for command in asked] == [
        CLEAN_TEXT, TRIGGERED_TEXT,
    ]  # fmt: skip


def test_secrets_have_the_keys_that_components_ask_for() -> None:
    created = {
        command[4]: {
            Path(o.split("=", 1)[1]).name if o.startswith("--from-file") else o.split("=")[1]
            for o in command[5:]
        }
        for command in COMMANDS
        if command[:4] == ["kubectl", "create", "secret", "generic"]
    }
    wanted: dict[str, set[str]] = {}
    for component in ("audit", "keys"):
        text = (K8S / "components" / component / "kustomization.yaml").read_text()
        for name, key in re.findall(r"\{name: (psim-\w+), key: ([\w.]+)\}", text):
            wanted.setdefault(name, set()).add(key)
    wanted["psim-keys"].add("keys.toml")
    assert created == wanted


def test_metrics_that_queries_name_are_there() -> None:
    asked = [command[-1] for command in COMMANDS if command[0] == "promtool"]
    named = {name for query in asked for name in re.findall(r"\bpsim_\w+", query)}
    assert len(named) >= 4
    assert named <= scraped()


def test_the_documented_upstream_is_reached_by_the_documented_label() -> None:
    host = httpx.URL(the(UPSTREAM, "ConfigMap")["data"]["PSIM_UPSTREAM"]).host
    (patch,) = [c for c in COMMANDS if c[0] == "kubectl" and c[-3:-1] == [host, "--patch"]]
    labels = yaml.safe_load(patch[-1])["spec"]["template"]["metadata"]["labels"]
    policies = [m["spec"] for m in rendered(UPSTREAM) if m["kind"] == "NetworkPolicy"]
    own = the(UPSTREAM, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert allowed(policies, "Egress", own, Peer(labels=labels), 80)
    assert not allowed(policies, "Egress", own, Peer(), 80)
    assert allowed(policies, "Egress", own, OUTSIDE, 5432)


def test_a_way_out_can_be_narrowed_as_documented() -> None:
    (patch,) = [block for block in BLOCKS if block.startswith("patches:")]
    (name,) = re.findall(r"name: ([\w-]+)\}", patch)
    (policy,) = [m for m in rendered(UPSTREAM, patch) if m["metadata"]["name"] == name]
    (rule,) = policy["spec"]["egress"]
    assert rule["to"][0].keys() == {"ipBlock"}
    assert rule["ports"]


def test_files_and_all_components_are_there() -> None:
    for path in re.findall(r"deploy/[\w./-]+", PAGE):
        assert (ROOT / path.rstrip(".")).exists(), path
    components = re.search(r"^## Components\n(.*?)^## ", PAGE, re.M | re.S)
    assert components
    rows = re.findall(r"^\| (`.*?`) \| ", components[1], re.M)
    assert {name for row in rows for name in re.findall(r"`([\w-]+)`", row)} == {
        path.name for path in (K8S / "components").iterdir()
    }
