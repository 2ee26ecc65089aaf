"""The Helm chart: what it renders means what kustomize renders, and what is wrong is refused."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr

from models.offline.demo import cache_folder
from service.lifecycle.models_file import ModelEntry, settings_by_model
from service.settings import Mode, Settings
from tests.support.kubernetes import (
    CHART,
    OLDEST,
    VERSIONS,
    Manifest,
    assert_has_no_rights,
    assert_the_api_takes,
    charted,
    composed,
    helm,
    kustomized,
)
from tests.support.network_policy import NAMESPACE, OUTSIDE, Peer, allowed
from tests.support.paths import ROOT
from tests.support.programs import program
from tests.support.servers import answering, free_port

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PEM = "-----BEGIN PUBLIC KEY-----\nMCow\n-----END PUBLIC KEY-----\n"
ON = {"enabled": True}
SAME: dict[str, tuple[Manifest, str, tuple[str, ...]]] = {
    "defaults": ({}, "base", ("bundle-claim",)),
    "image": (
        {"bundle": {"source": "image", "image": {"reference": "registry.example/psim-bundle:1"}}},
        "base",
        ("bundle-image",),
    ),
    "store": ({"bundle": {"source": "store"}}, "base", ("bundle-store",)),
    "gateway-only": ({"upstream": {"url": "http://classifier:8080"}}, "overlays/gateway-only", ()),
    "credential": (
        {"upstream": {"url": "http://classifier:8080", "secret": "psim-upstream"}},
        "overlays/gateway-only",
        ("upstream-credential",),
    ),
    "keys": (
        dict.fromkeys(("keys", "limits", "audit", "monitoring"), ON),
        "base",
        ("bundle-claim", "monitoring", "limits", "audit", "keys"),
    ),
    "signed": (
        {"bundleKey": ON, "models": {"secret": "psim-models"}, "audit": ON, "console": ON},
        "base",
        ("bundle-claim", "bundle-key", "models", "audit", "console"),
    ),
    "proxied": (
        {"extProc": ON, "httpRoute": ON},
        "base",
        ("bundle-claim", "ext-proc", "httproute"),
    ),
    "external": (
        {"keys": ON, "audit": ON, "externalSecrets": ON},
        "base",
        ("bundle-claim", "keys", "audit", "external-secrets"),
    ),
    "cores": ({"autoscaling": ON}, "base", ("bundle-claim", "autoscaling")),
    "queue": (
        {"autoscaling": {**ON, "by": "queue"}, "monitoring": ON},
        "base",
        ("bundle-claim", "monitoring", "autoscaling-queue"),
    ),
    "keda": (
        {"autoscaling": {**ON, "by": "keda"}, "monitoring": ON},
        "base",
        ("bundle-claim", "monitoring", "autoscaling-keda"),
    ),
    "egress": (
        {"networkPolicy": {"egress": dict.fromkeys(VALUES["networkPolicy"]["egress"], ON)}},
        "base",
        ("bundle-claim", "egress-https", "egress-otlp", "egress-postgresql", "egress-redis"),
    ),
    "gpu": (
        {
            "image": {"tag": f"{VERSION}-cuda"},
            "settings": {"PSIM_ENGINE": "torch", "PSIM_BATCH_TOKENS": 16384},
            "tolerations": [
                {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
            ],
            "resources": {
                "requests": {"memory": "4Gi"},
                "limits": {"nvidia.com/gpu": "1", "memory": "6Gi"},
            },
        },
        "overlays/gpu",
        (),
    ),
}
"""Values, and what kustomize has for the same: base or overlay, and components."""
HELM_S_OWN = {
    "app.kubernetes.io/instance",
    "app.kubernetes.io/managed-by",
    "app.kubernetes.io/version",
    "checksum/config",
    "helm.sh/chart",
}
"""Labels and an annotation that only the chart has, for what kustomize does otherwise."""


def meaning(manifests: list[Manifest]) -> dict[tuple[str, str], Any]:
    """Return manifests by kind and name, less what differs for no cluster."""
    text = json.dumps(manifests)
    # kustomize puts a hash into the name, where the chart has an annotation.
    for hashed in re.findall(r'"(psim-gateway-[a-z0-9]{10})"', text):
        if f'"configMapRef": {{"name": "{hashed}"}}' in text:
            text = text.replace(hashed, "psim-gateway")
    text = re.sub(rf'"image": "psim-gateway:{VERSION}', '"image": "psim-gateway', text)
    # Of the overlay `ray` only.
    kept = [m for m in json.loads(text) if m["kind"] != "PodMonitor"]
    for manifest in kept:
        if manifest["kind"] != "Service":  # whose labels Prometheus goes by
            manifest["metadata"].pop("labels", None)
    return {(m["kind"], m["metadata"]["name"]): plain(m) for m in kept}


def plain(value: Any) -> Any:
    """Return a manifest without Helm's own labels, and with named things by name."""
    if isinstance(value, dict):
        kept = {k: plain(v) for k, v in value.items() if k not in HELM_S_OWN}
        return {k: v for k, v in kept.items() if not (k == "annotations" and not v)}
    if isinstance(value, list):
        named = value and all(isinstance(one, dict) and "name" in one for one in value)
        return [plain(v) for v in (sorted(value, key=lambda v: v["name"]) if named else value)]
    return value


@pytest.mark.parametrize("name", SAME)
def test_it_means_what_kustomize_renders(name: str) -> None:
    values, base, components = SAME[name]
    other = composed(base, components) if components else kustomized(ROOT / "deploy/k8s" / base)
    found, wanted = meaning(charted(values)), meaning(other)
    assert found.keys() == wanted.keys()
    for key, manifest in found.items():
        assert manifest == wanted[key], key


def test_every_component_has_its_values() -> None:
    used = {component for _, _, components in SAME.values() for component in components}
    assert used == {path.name for path in (ROOT / "deploy/k8s/components").iterdir()}


EVERYTHING = {
    **dict.fromkeys(("keys", "limits", "audit", "monitoring", "console", "extProc"), ON),
    **dict.fromkeys(("httpRoute", "externalSecrets"), ON),
    "bundle": {"source": "store"},
    "bundleKey": {**ON, "pem": PEM},
    "models": {
        "list": [
            {"name": "mood", "bundle": "/bundle/mood", "mode": "flag", "max_windows": 2000000},
            {"name": "team/topic", "bundle": "/bundle/topic", "upstream": "http://tei:80"},
        ]
    },
    "upstream": {"url": "https://classifier.example/v1", "secret": "psim-upstream"},
    "autoscaling": {**ON, "by": "keda"},
    "settings": {"PSIM_MAX_BODY_BYTES": 2097152, "PSIM_AUDIT_TEXT": True, "PSIM_DRAIN_S": 30},
    "image": {"repository": "registry.example/psim-gateway", "digest": f"sha256:{'0' * 64}"},
    "imagePullSecrets": [{"name": "registry"}],
    "extraEnv": [{"name": "OTEL_SERVICE_NAME", "value": "psim"}],
    "networkPolicy": {"egress": {"https": {**ON, "to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}}},
    "monitoring": {**ON, "labels": {"release": "prometheus"}},
    "serviceAccount": {"annotations": {"example/role": "reader"}},
    "service": {"annotations": {"example/zone": "a"}, "port": 8080},
    "podLabels": {"team": "a"},
    "podAnnotations": {"example/note": "b"},
    "nodeSelector": {"pool": "cpu"},
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "high",
}


def kinds(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def pod(manifests: list[Manifest]) -> Any:
    (deployment,) = kinds(manifests, "Deployment")
    return deployment["spec"]["template"]["spec"]


def test_lint_has_nothing_to_say(tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    for values in ({}, EVERYTHING):
        file.write_text(yaml.safe_dump(values))
        done = helm("lint", "--strict", CHART, "--values", file)
        assert done.returncode == 0, done.stdout
        assert "[WARNING]" not in done.stdout + done.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_the_api_takes_everything_together(version: str) -> None:
    for manifest in charted(EVERYTHING):
        assert_the_api_takes(manifest, version)


def test_everything_together_has_no_rights_and_holds_no_secret() -> None:
    manifests = charted(EVERYTHING)
    assert_has_no_rights(pod(manifests))
    assert not kinds(manifests, "Secret")
    (container,) = pod(manifests)["containers"]
    assert container["image"] == f"registry.example/psim-gateway@sha256:{'0' * 64}"
    assert pod(manifests)["terminationGracePeriodSeconds"] == 80
    assert {m["metadata"]["name"] for m in kinds(manifests, "ExternalSecret")} == {
        "psim-keys", "psim-limits", "psim-audit", "psim-upstream",
    }  # fmt: skip


def test_settings_arrive_as_they_were_written_and_models_as_the_service_reads_them(
    tmp_path: Path,
) -> None:
    maps = {m["metadata"]["name"]: m["data"] for m in kinds(charted(EVERYTHING), "ConfigMap")}
    settings = maps["psim-gateway"]
    assert settings["PSIM_MAX_BODY_BYTES"] == "2097152", "and not 2.097152e+06"
    assert settings["PSIM_AUDIT_TEXT"] == "true"
    assert settings["PSIM_UPSTREAM"] == "https://classifier.example/v1"
    assert maps["psim-gateway-bundle-key"] == {"public.pem": PEM}
    file = tmp_path / "models.toml"
    file.write_text(maps["psim-gateway-models"]["models.toml"])
    mood, topic = settings_by_model(Settings(models=file))
    assert (mood.model, mood.mode, mood.max_windows) == ("mood", Mode.FLAG, 2000000)
    assert (topic.model, topic.bundle) == ("team/topic", Path("/bundle/topic"))


def test_a_change_of_settings_replaces_the_pods() -> None:
    def checksum(values: Manifest) -> str:
        (deployment,) = kinds(charted(values), "Deployment")
        return str(deployment["spec"]["template"]["metadata"]["annotations"]["checksum/config"])

    assert checksum({}) == checksum({})
    assert checksum({}) != checksum({"settings": {"PSIM_MODE": "flag"}})


HIDDEN = "tiger"
REFUSED: dict[str, tuple[Manifest, str]] = {
    "typo": ({"replcas": 3}, "additional properties 'replcas' not allowed"),
    "setting": ({"settings": {"PSIM_MOOD": 1}}, "additional properties 'PSIM_MOOD' not allowed"),
    "mode": ({"settings": {"PSIM_MODE": "loud"}}, "one of 'enforce', 'sanitize', 'flag', 'shadow'"),
    "source": ({"bundle": {"source": "disk"}}, "one of 'claim', 'image', 'store'"),
    "image": ({"bundle": {"source": "image"}}, "set bundle.image.reference"),
    "pem": ({"bundleKey": {"pem": "x"}}, "bundleKey.pem is no public key"),
    "private": ({"bundleKey": {"pem": f"-----BEGIN {HIDDEN}"}}, "bundleKey.pem is no public key"),
    "scheme": ({"upstream": {"url": "host"}}, "must be http://HOST or https://HOST"),
    "password": (
        {"upstream": {"url": f"http://a:{HIDDEN}@host"}},
        "without a password: name a Secret",
    ),
    "model's password": (
        {"models": {"list": [{"name": "a", "bundle": "/b", "upstream": f"http://a:{HIDDEN}@b"}]}},
        "without a password: name a Secret",
    ),
    "model": ({"models": {"list": [{"name": "a"}]}}, "missing property 'bundle'"),
    "models": (
        {"models": {"list": [{"name": "a", "bundle": "/bundle"}], "secret": "a"}},
        "models.list and models.secret are both set",
    ),
    "model's credential": (
        {"models": {"list": [{"name": "a", "bundle": "/b", "upstream_authorization": HIDDEN}]}},
        "'upstream_authorization' not allowed",
    ),
    "nowhere": ({"upstream": {"secret": "a"}}, "no upstream.url to send it to"),
    "limits": ({"limits": ON}, "limits.enabled needs keys.enabled"),
    "console": ({"console": ON}, "console.enabled needs audit.enabled"),
    "queue": ({"autoscaling": {**ON, "by": "queue"}}, "which needs monitoring.enabled"),
    "bounds": ({"autoscaling": {"min": 3, "max": 2}}, "autoscaling.min is above autoscaling.max"),
    "no secrets": ({"externalSecrets": ON}, "enable keys, limits or audit"),
    "no peer": ({"networkPolicy": {"clients": [{}]}}, "at '/networkPolicy/clients/0'"),
    "digest": ({"image": {"digest": "latest"}}, "at '/image/digest'"),
    "long name": ({"fullnameOverride": "a" * 46}, "at '/fullnameOverride'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_by_its_name(name: str) -> None:
    values, message = REFUSED[name]
    with pytest.raises(AssertionError, match=re.escape(message)) as refused:
        charted(values)
    said = str(refused.value).split("\n")[0]
    assert HIDDEN not in said


def test_the_schema_has_the_settings_of_the_service_and_secrets_go_into_secrets() -> None:
    names = {f"PSIM_{name.upper()}" for name in Settings.model_fields}
    assert SCHEMA["properties"]["settings"]["properties"].keys() == names
    models = SCHEMA["properties"]["models"]["properties"]["list"]["items"]["properties"]
    assert models.keys() == ModelEntry.model_fields.keys() - {"upstream_authorization"}
    secret = [
        f"PSIM_{name.upper()}"
        for name, field in Settings.model_fields.items()
        if SecretStr in (field.annotation, *getattr(field.annotation, "__args__", ()))
    ]
    assert len(secret) == 5
    for name in [*secret, "PSIM_KEYS", "PSIM_UPSTREAM", "PSIM_PORT"]:
        with pytest.raises(AssertionError, match=f"settings.{name} cannot be set here"):
            charted({"settings": {name: "k" * 32}})


def policies(manifests: list[Manifest]) -> list[Any]:
    return [manifest["spec"] for manifest in kinds(manifests, "NetworkPolicy")]


def labels(manifests: list[Manifest]) -> dict[str, str]:
    (deployment,) = kinds(manifests, "Deployment")
    return dict(deployment["spec"]["template"]["metadata"]["labels"])


def test_policies_let_in_and_out_whom_values_name_and_an_empty_list_lets_in_nobody() -> None:
    ingress = Peer("ingress", {"app": "nginx"})
    client, prometheus = (
        Peer(labels={"psim-gateway/client": "true"}),
        Peer("monitoring", {"app.kubernetes.io/name": "prometheus"}),
    )
    peer = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}},
        "podSelector": {"matchLabels": ingress.labels},
    }
    named = charted({"networkPolicy": {"clients": [peer]}})
    nobody = charted({"networkPolicy": {"clients": [], "prometheus": [], "dns": []}})

    def who(manifests: list[Manifest]) -> list[Peer]:
        peers = (client, prometheus, ingress, Peer(), OUTSIDE)
        own = policies(manifests), labels(manifests)
        return [p for p in peers if allowed(own[0], "Ingress", own[1], p, "http")]

    assert who(charted({})) == [client, prometheus]
    assert who(named) == [prometheus, ingress]
    assert who(nobody) == []
    dns = Peer("kube-system", {"k8s-app": "kube-dns"})
    assert allowed(policies(named), "Egress", labels(named), dns, 53, "UDP")
    assert not allowed(policies(nobody), "Egress", labels(nobody), dns, 53, "UDP")
    narrowed = policies(charted(EVERYTHING))
    (https,) = [p["egress"] for p in narrowed if "ipBlock" in str(p)]
    assert https == [
        {"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"protocol": "TCP", "port": 443}]}
    ]
    assert not policies(charted({"networkPolicy": {"enabled": False}}))


def test_two_releases_in_a_namespace_do_not_meet() -> None:
    first, second = charted(EVERYTHING, "a"), charted(EVERYTHING, "b")
    shared = {"ExternalSecret"}  # whose Secrets the values name
    names = [
        {(m["kind"], m["metadata"]["name"]) for m in manifests if m["kind"] not in shared}
        for manifests in (first, second)
    ]
    assert not names[0] & names[1]
    (service,) = kinds(second, "Service")
    assert not service["spec"]["selector"].items() <= labels(first).items()
    assert all(not p["podSelector"]["matchLabels"].items() <= labels(first).items()
               for p in policies(second))  # fmt: skip
    (deployment,) = kinds(second, "Deployment")
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels(second).items()


@pytest.mark.parametrize(
    "release", ["1", "a" * 53, "my-psim-gateway-in-a-release-with-a-long-name-xxxxxxx"]
)
def test_names_fit_whatever_the_release_is_called(release: str) -> None:
    manifests = charted(EVERYTHING, release)
    for manifest in manifests:
        assert_the_api_takes(manifest, VERSIONS[-1])
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", manifest["metadata"]["name"])
        for value in manifest["metadata"]["labels"].values():
            assert isinstance(value, str) and len(value) <= 63


def test_the_package_has_all_and_the_version_of_the_project(tmp_path: Path) -> None:
    done = helm("package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    archive = tmp_path / f"psim-gateway-{VERSION}.tgz"
    shown = helm("template", "psim-gateway", archive, "--namespace", NAMESPACE)
    assert list(yaml.safe_load_all(shown.stdout)) == charted({})
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == VERSION
    assert chart["kubeVersion"] == f">={OLDEST}.0-0"
    (container,) = pod(charted({}))["containers"]
    assert container["image"] == f"psim-gateway:{VERSION}"


def test_a_cluster_that_is_too_old_is_refused() -> None:
    done = helm("template", "psim-gateway", CHART, "--kube-version", "1.29.9")
    assert "requires kubeVersion: >=1.30.0-0" in done.stderr


def test_the_rules_are_those_of_prometheus() -> None:
    own = (CHART / "files/rules.yml").read_text()
    assert own == (ROOT / "deploy/prometheus/rules.yml").read_text(), "copy them again"


def test_every_value_is_explained_and_in_the_schema() -> None:
    assert SCHEMA["properties"].keys() == {"global", *VALUES}
    assert SCHEMA["additionalProperties"] is False


PAGE = (ROOT / "docs/kubernetes.md").read_text()
COMMANDS = [shlex.split(line) for line in re.findall(r"^ *\$ (helm .*)$", PAGE, re.M)]
(OWN,) = re.findall(r"^```yaml\n# my-cluster/values.yaml\n(.*?)^```$", PAGE, re.M | re.S)


def test_the_commands_of_the_page_do_as_far_as_they_go_without_a_cluster(tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(OWN)
    installed = 0
    for _, *arguments in COMMANDS:
        if {"install", "template"} & {*arguments} and "oci://" not in " ".join(arguments):
            own = [str(file) if a == "my-cluster/values.yaml" else a for a in arguments]
            own = [str(ROOT / a) if a.startswith("deploy/") else a for a in own]
            dry = ["--dry-run=client"] if "install" in own else []
            done = helm(*own, *dry)
            assert done.returncode == 0, done.stderr
            installed += "in the mode shadow" in done.stdout
    assert installed == 1
    subcommands = {arguments[0] for _, *arguments in COMMANDS}
    assert subcommands == {"install", "upgrade", "rollback", "template", "package", "push"}
    for subcommand in subcommands:
        (shown, *_) = [a for _, *a in COMMANDS if a[0] == subcommand]
        flags = helm(subcommand, "--help").stdout
        assert all(a in flags for a in shown if a.startswith("--")), shown


def test_the_chart_is_pushed_to_a_registry_and_installed_from_there_as_the_page_says(
    tmp_path: Path,
) -> None:
    port, folder = free_port(), tmp_path / "registry"
    configuration = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(folder)}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    file, values = tmp_path / "registry.yml", tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(configuration))
    values.write_text(OWN)
    there = {"registry.example/charts": f"127.0.0.1:{port}/charts", "dist": str(tmp_path)}
    there |= {"my-cluster/values.yaml": str(values), "deploy/helm": str(CHART.parent)}
    command = [program("docker-registry"), "serve", str(file)]
    with answering(command, f"http://127.0.0.1:{port}/v2/", tmp_path / "log"):
        for _, *arguments in COMMANDS[-3:]:
            own = [re.sub("|".join(there), lambda m: there[m[0]], a) for a in arguments]
            remote = ["--plain-http"] if "oci://" in " ".join(own) else []
            dry = ["--dry-run=client"] if own[0] == "install" else []
            done = helm(*own, *remote, *dry)
            assert done.returncode == 0, done.stderr
    assert own[0] == "install"
    assert f"psim-gateway {VERSION} in the mode shadow" in done.stdout


def test_the_values_of_the_page_serve_the_demo_s_bundle() -> None:
    settings = yaml.safe_load(OWN)["settings"]
    assert settings["PSIM_BUNDLE"] == f"/bundle/psim-gateway/{cache_folder().name}/bundle"
    assert settings["PSIM_MODE"] == "shadow"


def test_the_page_names_the_value_of_every_component() -> None:
    section = re.search(r"^## Helm\n(.*?)^## ", PAGE, re.M | re.S)
    assert section
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", section[1], re.M)
    found = {name for _, cell in rows for name in re.findall(r"`([\w-]+)`", cell)}
    assert {path.name for path in (ROOT / "deploy/k8s/components").iterdir()} <= found
    for cell, _ in rows:
        for name in re.findall(r"`(\w+)[\w.]*`", cell):
            assert name in VALUES, name
