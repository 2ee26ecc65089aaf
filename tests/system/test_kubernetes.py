"""The manifests: rendered by kustomize, valid for the API, true of the service that they run."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, get_args

import httpx
import kubernetes_validate
import pytest
import yaml
from pydantic import SecretStr

from models.offline.demo import CLEAN_TEXT, TRIGGERED_TEXT
from service.app import create_app
from service.audit.writer import CLOSE_S
from service.security.access import SCOPES
from service.security.keys.file import hash_of
from service.settings import Settings, unknown_variables
from tests.support.audit import rows
from tests.support.confined import confined
from tests.support.deploy import (
    DOCKERFILE,
    dockerfile_command,
    image_environment,
    scraped,
    working_directory,
)
from tests.support.fakes import fake_bundle
from tests.support.kubernetes import (
    K8S,
    OLDEST,
    VERSIONS,
    Manifest,
    assert_has_no_rights,
    assert_the_api_takes,
    composed,
    kustomized,
)
from tests.support.network_policy import NAMESPACE, OUTSIDE, Peer, allowed
from tests.support.paths import ROOT
from tests.support.requests import client_of
from tests.support.servers import free_port
from tests.support.waiting import wait_for

OVERLAYS = ("cpu", "gpu", "gateway-only")
RAY = "ray"
"""The overlay with a RayService in place of a Deployment."""
EGRESS = ("egress-https", "egress-otlp", "egress-postgresql", "egress-redis")
OTHERS = {
    "image": ("bundle-image",),
    "store": ("bundle-store", "audit"),
    "keys": ("bundle-claim", "monitoring", "limits", "audit", "keys"),
    "cores": ("bundle-claim", "autoscaling"),
    "queue": ("bundle-claim", "monitoring", "autoscaling-queue"),
    "keda": ("bundle-claim", "monitoring", "autoscaling-keda"),
    "egress": ("bundle-claim", *EGRESS),
    "signed": ("bundle-claim", "bundle-key", "models", "audit", "console", "external-secrets"),
    "proxied": ("bundle-claim", "keys", "ext-proc", "httproute", "upstream-credential"),
}
"""What no overlay takes: the base with these components."""
ON_RAY = {
    "ray-keys": ("monitoring", "limits", "audit", "keys"),
    "ray-signed": ("bundle-key", "upstream-credential"),
    "ray-egress": EGRESS,
}
"""The overlay `ray` with these components."""


@cache
def rendered(name: str) -> list[Manifest]:
    """Return what kubectl would apply of an overlay, or of base or overlay with components."""
    if name in OTHERS:
        return composed("base", OTHERS[name])
    if name in ON_RAY:
        return composed(f"overlays/{RAY}", ON_RAY[name])
    return kustomized(K8S / "overlays" / name)


def of(name: str, kind: str) -> list[Manifest]:
    return [manifest for manifest in rendered(name) if manifest["kind"] == kind]


def the(name: str, kind: str) -> Any:
    """Return the specification of the only one of a kind."""
    (manifest,) = of(name, kind)
    return manifest["spec"]


def pod(name: str) -> Any:
    return the(name, "Deployment")["template"]["spec"]


def on_ray(name: str) -> bool:
    return name == RAY or name in ON_RAY


def gateway(name: str) -> Any:
    (container,) = pod(name)["containers"]
    return container


everywhere = pytest.mark.parametrize("name", [*OVERLAYS, *OTHERS])
on_ray_too = pytest.mark.parametrize("name", [*OVERLAYS, *OTHERS, RAY, *ON_RAY])


def test_every_overlay_and_component_is_rendered_here() -> None:
    assert {path.name for path in (K8S / "overlays").iterdir()} == {*OVERLAYS, RAY}
    used = {Path(c).name for o in OVERLAYS for c in kustomization(o)["components"]}
    used |= {component for components in OTHERS.values() for component in components}
    assert {path.name for path in (K8S / "components").iterdir()} == used


def kustomization(overlay: str) -> Any:
    return yaml.safe_load((K8S / "overlays" / overlay / "kustomization.yaml").read_text())


@on_ray_too
@pytest.mark.parametrize("version", VERSIONS)
def test_the_api_takes_every_manifest(name: str, version: str) -> None:
    if (name, version) == ("image", OLDEST):
        pytest.skip("image volumes are newer, as the component says")
    for manifest in rendered(name):
        assert_the_api_takes(manifest, version)
        if manifest["kind"] == "RayService":
            for template in templates(name):
                made = template | {"apiVersion": "v1", "kind": "Pod"}
                made["metadata"] = template["metadata"] | {"name": "made"}
                assert_the_api_takes(made, version)


def templates(name: str = RAY) -> list[Any]:
    """Return the templates of the RayService's pods: the head's, then the workers'."""
    cluster = the(name, "RayService")["rayClusterConfig"]
    return [
        cluster["headGroupSpec"]["template"],
        *(g["template"] for g in cluster["workerGroupSpecs"]),
    ]


def test_a_field_that_the_api_does_not_know_is_seen() -> None:
    (manifest,) = of("cpu", "Service")
    wrong = manifest | {"spec": manifest["spec"] | {"port": 80}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_the_rules_are_those_of_prometheus() -> None:
    made = subprocess.run(
        [sys.executable, K8S / "prometheusrule.py"], capture_output=True, text=True, check=True
    )
    committed = (K8S / "components/monitoring/prometheusrule.yaml").read_text()
    assert made.stdout == committed, "write it again, as prometheusrule.py says"
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())
    assert the("keys", "PrometheusRule") == rules


@everywhere
def test_the_bundle_comes_from_one_place_and_cannot_be_written(name: str) -> None:
    (volume,) = [volume for volume in pod(name)["volumes"] if volume["name"] == "bundle"]
    (mount,) = [m for m in gateway(name)["volumeMounts"] if m["name"] == volume["name"]]
    assert mount["readOnly"]
    assert f"PSIM_BUNDLE={mount['mountPath']}" in DOCKERFILE


@everywhere
def test_only_settings_of_the_service_are_set_and_no_secret_is_written_down(name: str) -> None:
    assert pod(name)["enableServiceLinks"] is False, "the Service would set PSIM_GATEWAY_PORT"
    assert unknown_variables(["PSIM_GATEWAY_PORT"])
    literal = [key for manifest in of(name, "ConfigMap") for key in manifest["data"]]
    referred = {v["name"]: "valueFrom" in v for v in gateway(name).get("env", [])}
    assert literal
    assert not unknown_variables([*literal, *referred])
    secret = {
        f"PSIM_{setting.upper()}"
        for setting, field in Settings.model_fields.items()
        if SecretStr in (field.annotation, *get_args(field.annotation))
    }
    assert "PSIM_AUDIT_URL" in secret
    assert not secret & {*literal, *(key for key, by_name in referred.items() if not by_name)}
    assert not of(name, "Secret")


def test_nothing_is_rejected_before_somebody_says_so() -> None:
    modes = {settings["data"]["PSIM_MODE"] for n in OVERLAYS for settings in of(n, "ConfigMap")}
    (application,) = serve_config()["applications"]
    assert modes == {application["runtime_env"]["env_vars"]["PSIM_MODE"]} == {"shadow"}


@everywhere
def test_what_is_named_is_there(name: str) -> None:
    labels = the(name, "Deployment")["template"]["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert the(name, kind)["selector"]["matchLabels"] == labels
    assert the(name, "Service")["selector"] == labels
    for policy in of(name, "NetworkPolicy"):
        assert policy["spec"]["podSelector"]["matchLabels"] == labels
    for constraint in pod(name)["topologySpreadConstraints"]:
        assert constraint["labelSelector"]["matchLabels"] == labels
    (account,) = of(name, "ServiceAccount")
    assert account["metadata"]["name"] == pod(name)["serviceAccountName"]
    (settings,) = of(name, "ConfigMap")
    assert gateway(name)["envFrom"] == [{"configMapRef": {"name": settings["metadata"]["name"]}}]
    ports = {port["name"]: port["containerPort"] for port in gateway(name)["ports"]}
    assert f"PSIM_PORT={ports['http']}" in DOCKERFILE
    assert [port["targetPort"] for port in the(name, "Service")["ports"]] == [*ports]
    ingress = [i for p in of(name, "NetworkPolicy") for i in p["spec"].get("ingress", [])]
    assert {port["port"] for rule in ingress for port in rule["ports"]} == ports.keys()


def test_paths_are_those_that_the_service_has() -> None:
    routes = create_app(Settings(bundle=Path("unused")), fake_bundle()).openapi()["paths"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = gateway("cpu")[probe]["httpGet"]
        assert "get" in routes[asked["path"]]
        assert asked["port"] == "http"
    (endpoint,) = the("keys", "ServiceMonitor")["endpoints"]
    assert "get" in routes[endpoint["path"]]


async def test_an_upstream_that_is_down_restarts_no_pod_and_sends_it_no_requests() -> None:
    async with client_of(upstream=f"http://127.0.0.1:{free_port()}") as client:
        statuses = {
            probe: (await client.get(gateway("gateway-only")[probe]["httpGet"]["path"])).status_code
            for probe in ("startupProbe", "livenessProbe", "readinessProbe")
        }
    assert statuses == {"startupProbe": 200, "livenessProbe": 200, "readinessProbe": 503}


BUILT_IN = {"v1", "apps/v1", "autoscaling/v2", "networking.k8s.io/v1", "policy/v1"}


def test_overlays_need_nothing_that_a_bare_cluster_does_not_have() -> None:
    for name in OVERLAYS:
        assert {manifest["apiVersion"] for manifest in rendered(name)} <= BUILT_IN
        assert not of(name, "HorizontalPodAutoscaler"), "it needs metrics-server"
    assert {manifest["apiVersion"] for manifest in rendered(RAY)} <= BUILT_IN | {"ray.io/v1"}


def test_prometheus_finds_the_service_and_calls_it_as_the_rules_do() -> None:
    (service,) = of("keys", "Service")
    labels = service["metadata"]["labels"]
    monitor = the("keys", "ServiceMonitor")
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    jobs = set(re.findall(r'job="([^"]+)"', yaml.safe_dump(the("keys", "PrometheusRule"))))
    assert jobs == {labels[monitor["jobLabel"]]}


@pytest.mark.parametrize("name", ["cores", "queue", "keda"])
def test_replicas_follow_the_load_of_the_deployment_and_no_manifest_sets_them_back(
    name: str,
) -> None:
    kind = "ScaledObject" if name == "keda" else "HorizontalPodAutoscaler"
    (deployment,) = of(name, "Deployment")
    assert the(name, kind)["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"], "it would be set back with every apply"
    assert "cpu" in gateway(name)["resources"]["requests"], "utilization is of the request"


def test_only_the_component_for_the_queue_asks_for_a_metric_of_the_adapter() -> None:
    """An autoscaler that cannot get one of its metrics never scales down."""
    scaler = the("cores", "HorizontalPodAutoscaler")
    assert [metric["type"] for metric in scaler["metrics"]] == ["Resource"]
    assert [m["type"] for m in the("queue", "HorizontalPodAutoscaler")["metrics"]] == [
        "Resource",
        "Pods",
    ]


def test_replicas_follow_a_metric_that_is_scraped_and_that_the_adapter_gives() -> None:
    scaler = the("queue", "HorizontalPodAutoscaler")
    (metric,) = [m["pods"]["metric"]["name"] for m in scaler["metrics"] if m["type"] == "Pods"]
    values = yaml.safe_load(
        (K8S / "components/autoscaling-queue/prometheus-adapter-values.yaml").read_text()
    )
    (rule,) = values["rules"]["custom"]
    series = rule["seriesQuery"].split("{")[0]
    assert series in scraped()
    assert re.sub(rule["name"]["matches"], rule["name"]["as"], series) == metric
    assert values["prometheus"].keys() == {"url", "port"}


def test_keda_scales_as_the_adapter_does_and_not_by_the_queue_while_that_is_unknown() -> None:
    scaler, keda = the("queue", "HorizontalPodAutoscaler"), the("keda", "ScaledObject")
    assert keda["minReplicaCount"] == scaler["minReplicas"] == keda["fallback"]["replicas"]
    assert keda["maxReplicaCount"] == scaler["maxReplicas"]
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == scaler["behavior"]
    cores, queue = keda["triggers"]
    own_cores, own_queue = scaler["metrics"]
    target = own_cores["resource"]["target"]
    assert cores["metricType"] == target["type"]
    assert int(cores["metadata"]["value"]) == target["averageUtilization"]
    # KEDA has no fallback for metrics of another type.
    assert queue["metricType"] == "AverageValue"
    assert queue["metadata"]["threshold"] == own_queue["pods"]["target"]["averageValue"]
    (series,) = re.findall(r"\bpsim_\w+", queue["metadata"]["query"])
    assert series == own_queue["pods"]["metric"]["name"]
    job = the("keda", "ServiceMonitor")["selector"]["matchLabels"]["app.kubernetes.io/name"]
    assert f'job="{job}"' in queue["metadata"]["query"]
    values = K8S / "components/autoscaling-queue/prometheus-adapter-values.yaml"
    prometheus = yaml.safe_load(values.read_text())["prometheus"]
    assert queue["metadata"]["serverAddress"] == f"{prometheus['url']}:{prometheus['port']}"


@everywhere
def test_containers_may_do_nothing_that_they_need_not(name: str) -> None:
    assert_has_no_rights(pod(name))


def test_containers_of_ray_may_do_nothing_that_they_need_not() -> None:
    head, worker = (template["spec"] for template in templates())
    assert_has_no_rights(worker)
    # The autoscaler beside it has to ask the API server for pods.
    assert_has_no_rights(head | {"automountServiceAccountToken": False})
    options = the(RAY, "RayService")["rayClusterConfig"]["autoscalerOptions"]
    assert options["securityContext"] == head["containers"][0]["securityContext"]


@on_ray_too
def test_no_code_is_imported_from_where_somebody_may_write(name: str) -> None:
    for spec in [t["spec"] for t in templates(name)] if on_ray(name) else [pod(name)]:
        (own,), others = spec["containers"], spec.get("initContainers", [])
        assert not {"PYTHONPATH", "PYTHONSAFEPATH"} & {v["name"] for v in own.get("env", [])}
        assert "workingDir" not in own
        writable = [mount for mount in own["volumeMounts"] if not mount.get("readOnly")]
        assert [mount["name"] for mount in writable] == ["tmp"]
        assert not working_directory().is_relative_to(writable[0]["mountPath"])
        # What runs before it, and may be somebody else's image, has a folder of its own.
        for other in others:
            assert "tmp" not in {mount["name"] for mount in other["volumeMounts"]}
            assert "/tmp" in {mount["mountPath"] for mount in other["volumeMounts"]}


def test_a_pod_is_given_the_time_that_its_end_may_take() -> None:
    drain = Settings(bundle=Path("unused")).drain_s
    before = gateway("cpu")["lifecycle"]["preStop"]["sleep"]["seconds"]
    # Connections, then the worker, then the audit: service/app.py.
    assert pod("cpu")["terminationGracePeriodSeconds"] > before + 2 * drain + CLOSE_S


def test_the_rayservice_serves_what_the_committed_configuration_does_to_other_pods() -> None:
    config = yaml.safe_load(the(RAY, "RayService")["serveConfigV2"])
    here = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text())
    assert config["http_options"].pop("host") == "0.0.0.0"
    (application,) = config["applications"]
    variables = application["runtime_env"]["env_vars"]
    assert variables.pop("PSIM_HOST") == "0.0.0.0"
    assert variables.pop("PSIM_PORT") != "0", "a free one may be any, beside those of Ray"
    del here["http_options"]["host"]
    for name in ("PSIM_HOST", "PSIM_PORT"):
        del here["applications"][0]["runtime_env"]["env_vars"][name]
    assert config == here


def test_ray_s_workers_have_the_bundle_room_for_each_replica_and_time_to_end() -> None:
    service = the(RAY, "RayService")
    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    (deployment,) = application["deployments"]
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert int(group["rayStartParams"]["num-cpus"]) == deployment["ray_actor_options"]["num_cpus"]
    for limit in ("min", "max"):
        assert group[f"{limit}Replicas"] == deployment["autoscaling_config"][f"{limit}_replicas"]
    worker = group["template"]["spec"]
    mounts = {mount["mountPath"]: mount for mount in worker["containers"][0]["volumeMounts"]}
    assert mounts[application["runtime_env"]["env_vars"]["PSIM_BUNDLE"]]["readOnly"]
    drain = Settings(bundle=Path("unused")).drain_s
    assert worker["terminationGracePeriodSeconds"] > 2 * drain + CLOSE_S
    (locked,) = re.findall(r"^ray==(\S+)", (ROOT / "requirements/serve-ray.txt").read_text(), re.M)
    assert service["rayClusterConfig"]["rayVersion"] == locked


def test_prometheus_asks_each_replica_on_ray_and_may() -> None:
    monitor = the("ray-keys", "PodMonitor")
    wanted = monitor["selector"]["matchLabels"]
    assert wanted.items() <= gateway_labels("ray-keys").items()
    assert not wanted.items() <= gateway_labels("cpu").items(), "it has the ServiceMonitor"
    rules = yaml.safe_dump(the("ray-keys", "PrometheusRule"))
    assert set(re.findall(r'job="([^"]+)"', rules)) == {
        gateway_labels("ray-keys")[monitor["jobLabel"]]
    }
    (endpoint,) = monitor["podMetricsEndpoints"]
    ports = templates("ray-keys")[1]["spec"]["containers"][0]["ports"]
    (port,) = [one["containerPort"] for one in ports if one["name"] == endpoint["port"]]
    assert port == int(serve_config()["applications"][0]["runtime_env"]["env_vars"]["PSIM_PORT"])
    assert may("ray-keys", "Ingress", Peer("monitoring", PROMETHEUS_LABELS), port)
    assert not may("ray-keys", "Ingress", Peer(labels=CLIENT), port)
    assert endpoint["path"] in SCOPES


def test_components_do_on_ray_what_they_do_elsewhere() -> None:
    here, there = pod("keys"), templates("ray-keys")[1]["spec"]
    own, other = here["containers"][0], there["containers"][0]
    assert {v["name"]: v for v in own["env"]}.items() <= {
        v["name"]: v for v in other["env"]
    }.items()
    (mount,) = [mount for mount in own["volumeMounts"] if mount["name"] == "keys"]
    (volume,) = [volume for volume in here["volumes"] if volume["name"] == "keys"]
    assert mount in other["volumeMounts"]
    assert volume in there["volumes"]
    head = templates("ray-keys")[0]["spec"]["containers"][0]
    assert not [v["name"] for v in head["env"] if v["name"].startswith("PSIM_")]
    (service,) = the("keys", "ServiceMonitor")["endpoints"]
    (pods,) = the("ray-keys", "PodMonitor")["podMetricsEndpoints"]
    assert service["authorization"] == pods["authorization"]


@pytest.mark.parametrize(
    "component",
    [
        "autoscaling", "autoscaling-keda", "autoscaling-queue",
        "bundle-claim", "bundle-image", "bundle-store", "httproute", "models",
    ],
)  # fmt: skip
def test_components_that_need_the_deployment_are_refused_on_ray(component: str) -> None:
    with pytest.raises(AssertionError, match=r"no resource matches .*Deployment"):
        composed(f"overlays/{RAY}", [component])


@pytest.mark.parametrize("component", ["console", "ext-proc"])
def test_components_that_need_the_configmap_are_refused_on_ray(component: str) -> None:
    with pytest.raises(AssertionError, match=r"ConfigMap.* does not exist; cannot merge"):
        composed(f"overlays/{RAY}", [component])


def serve_config() -> Any:
    return yaml.safe_load(the(RAY, "RayService")["serveConfigV2"])


PROMETHEUS = ("monitoring", "prometheus")
OPERATOR = ("ray-system", "kuberay-operator")
"""Namespace and name of pods elsewhere."""


def ways_in() -> list[tuple[set[int], list[Any]]]:
    """Return ports that the policies on Ray open, and to whom: pods elsewhere, or labels here."""
    found = []
    for policy in of(RAY, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            assert all("endPort" not in port for port in rule.get("ports", []))
            ports = {port["port"] for port in rule.get("ports", [])}
            found.append((ports, [source(peer) for peer in rule["from"]]))
    return found


def source(peer: Manifest) -> Any:
    labels = peer["podSelector"]["matchLabels"]
    if "namespaceSelector" not in peer:
        return labels
    # An empty selector means every namespace, where anybody gives pods any label.
    (namespace,) = peer["namespaceSelector"]["matchLabels"].items()
    assert namespace[0] == "kubernetes.io/metadata.name", "the one label that nobody chooses"
    return namespace[1], labels["app.kubernetes.io/name"]


def test_on_ray_ports_that_run_code_are_open_to_the_cluster_and_its_operator_only() -> None:
    service = serve_config()
    served = {service["http_options"]["port"]}
    served.add(int(service["applications"][0]["runtime_env"]["env_vars"]["PSIM_PORT"]))
    cluster = {"app.kubernetes.io/name": "psim-gateway", "ray.io/is-ray-node": "yes"}
    for ports, sources in ways_in():
        if not ports:  # all of them
            assert sources == [cluster]
        elif not ports <= served:
            assert (ports - served, sources) == ({8265}, [OPERATOR])
    (head,) = [p["spec"] for p in of(RAY, "NetworkPolicy") if "8265" in yaml.safe_dump(p)]
    assert head["podSelector"]["matchLabels"]["ray.io/node-type"] == "head"


CLIENT = {"psim-gateway/client": "true"}
PROMETHEUS_LABELS = {"app.kubernetes.io/name": "prometheus"}
DNS = Peer("kube-system", {"k8s-app": "kube-dns"})


def may(name: str, direction: str, peer: Peer, port: int | str, protocol: str = "TCP") -> bool:
    """Return whether the policies let a peer reach the gateway, or the gateway a peer."""
    policies = [policy["spec"] for policy in of(name, "NetworkPolicy")]
    return allowed(policies, direction, gateway_labels(name), peer, port, protocol)


def gateway_labels(name: str) -> dict[str, str]:
    """Return the labels of the pods that serve."""
    if on_ray(name):
        own = templates(name)[1]["metadata"]["labels"]
        return {**own, "ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"}
    return dict(the(name, "Deployment")["template"]["metadata"]["labels"])


@on_ray_too
def test_clients_and_prometheus_get_in_and_nobody_else(name: str) -> None:
    port = 8000 if on_ray(name) else "http"
    for peer in (Peer(labels=CLIENT), Peer("monitoring", PROMETHEUS_LABELS)):
        assert may(name, "Ingress", peer, port), peer
        assert not may(name, "Ingress", peer, 8265)
    for peer in (
        OUTSIDE,
        Peer(),
        Peer("elsewhere", CLIENT),
        Peer("monitoring"),
        Peer("elsewhere", PROMETHEUS_LABELS),
        Peer(labels={"app.kubernetes.io/name": "psim-gateway"}),
    ):
        assert not may(name, "Ingress", peer, port), peer


@on_ray_too
def test_names_are_resolved_and_nothing_else_is_asked_of_who_does_that(name: str) -> None:
    assert may(name, "Egress", DNS, 53, "UDP")
    assert may(name, "Egress", DNS, 53, "TCP")
    assert not may(name, "Egress", DNS, 8080)
    assert not may(name, "Egress", Peer(labels=DNS.labels), 53, "UDP"), NAMESPACE


PEERS = {
    "upstream": Peer(labels={"psim-gateway/upstream": "true"}),
    "postgresql": Peer(labels={"app.kubernetes.io/name": "postgresql"}),
    "redis": Peer(labels={"app.kubernetes.io/name": "redis"}),
    "neighbour": Peer(),
    "upstream elsewhere": Peer("elsewhere", {"psim-gateway/upstream": "true"}),
    "outside": OUTSIDE,
}
PORTS = (80, 443, 4318, 5432, 6379, 6380, 8080)
EVERYWHERE = {(peer, port) for peer in PEERS for port in (443, 4318, 5432, 6379, 6380)}
WAYS_OUT = {
    "gateway-only": {("upstream", port) for port in PORTS},
    "signed": {("postgresql", 5432)},
    "store": {("postgresql", 5432), *((peer, 443) for peer in PEERS)},
    "keys": {("postgresql", 5432), ("redis", 6379)},
    "ray-keys": {("postgresql", 5432), ("redis", 6379)},
    "egress": EVERYWHERE,
    "ray-egress": EVERYWHERE,
}
"""What is open beside names: a peer, and the port of it."""


@on_ray_too
def test_policies_open_the_ways_that_are_needed_and_no_other(name: str) -> None:
    found = {(n, p) for n, peer in PEERS.items() for p in PORTS if may(name, "Egress", peer, p)}
    assert found == WAYS_OUT.get(name, set())


def test_keys_are_read_where_they_are_mounted_and_prometheus_has_its_own() -> None:
    (volume,) = [volume["secret"] for volume in pod("keys")["volumes"] if "secret" in volume]
    (mount,) = [m for m in gateway("keys")["volumeMounts"] if m["name"] == "keys"]
    # Whole, since a volume with a subPath would not follow the Secret; but not Prometheus's key.
    assert mount == {"name": "keys", "mountPath": mount["mountPath"], "readOnly": True}
    (item,) = volume["items"]
    (variable,) = [v for v in gateway("keys")["env"] if v["name"] == "PSIM_KEYS"]
    assert variable["value"] == f"{mount['mountPath']}/{item['path']}"
    (endpoint,) = the("keys", "ServiceMonitor")["endpoints"]
    credentials = endpoint["authorization"]["credentials"]
    assert credentials["name"] == volume["secretName"]
    assert credentials["key"] != item["key"]


def test_components_can_be_combined() -> None:
    assert [variable["name"] for variable in gateway("keys")["env"]] == [
        "PSIM_KEYS", "PSIM_AUDIT_URL", "PSIM_AUDIT_KEY", "PSIM_LIMITS_URL",
    ]  # fmt: skip


def test_files_of_other_components_are_read_where_they_are_mounted() -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in gateway("signed")["volumeMounts"]}
    variables = {v["name"]: v.get("value") for v in gateway("signed")["env"]}
    assert variables["PSIM_BUNDLE_KEY"] == f"{mounts['bundle-key']}/public.pem"
    assert variables["PSIM_MODELS"] == f"{mounts['models']}/models.toml"
    (models,) = [v["secret"] for v in pod("signed")["volumes"] if v["name"] == "models"]
    assert models["items"] == [{"key": "models.toml", "path": "models.toml"}]
    on_ray = templates("ray-signed")[1]["spec"]["containers"][0]
    assert {v["name"]: v.get("value") for v in on_ray["env"]}["PSIM_BUNDLE_KEY"] == variables[
        "PSIM_BUNDLE_KEY"
    ]


def test_a_file_of_the_reader_s_own_overlay_gets_there(tmp_path: Path) -> None:
    """And a change of it replaces the pods, since its name has a hash of it."""
    there = os.path.relpath(K8S, tmp_path.resolve())
    content = {
        "resources": [f"{there}/overlays/cpu"],
        "components": [f"{there}/components/{name}" for name in ("models", "bundle-key")],
        "secretGenerator": [{"name": "psim-models", "files": ["models.toml"]}],
        "configMapGenerator": [{"name": "psim-bundle-key", "files": ["public.pem"]}],
    }
    (tmp_path / "models.toml").write_text((ROOT / "deploy/models.toml").read_text())
    (tmp_path / "public.pem").write_text("key")
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(content))
    made = kustomized(tmp_path)
    names = {m["kind"]: m["metadata"]["name"] for m in made if "psim-" in m["metadata"]["name"]}
    (deployment,) = [m for m in made if m["kind"] == "Deployment"]
    volumes = {v["name"]: v for v in deployment["spec"]["template"]["spec"]["volumes"]}
    assert volumes["models"]["secret"]["secretName"] == names["Secret"] != "psim-models"
    keys = [m["metadata"]["name"] for m in made if "public.pem" in m.get("data", {})]
    assert [volumes["bundle-key"]["configMap"]["name"]] == keys != ["psim-bundle-key"]


ENVOY = Peer("envoy-gateway-system", {"app.kubernetes.io/name": "envoy"})


def test_envoy_gets_in_where_it_is_sent_and_where_it_asks_for_verdicts() -> None:
    (service,) = of("proxied", "Service")
    served = {port["port"]: port["targetPort"] for port in service["spec"]["ports"]}
    route = the("proxied", "HTTPRoute")["rules"][0]
    (backend,) = route["backendRefs"]
    assert backend["name"] == service["metadata"]["name"]
    assert may("proxied", "Ingress", ENVOY, served[backend["port"]])
    assert not may("proxied", "Ingress", ENVOY, "ext-proc")
    assert not may("cpu", "Ingress", ENVOY, "http")
    (settings,) = of("proxied", "ConfigMap")
    (port,) = [p for p in gateway("proxied")["ports"] if p["name"] == "ext-proc"]
    assert settings["data"]["PSIM_EXT_PROC_PORT"] == str(port["containerPort"])
    assert served[port["containerPort"]] == port["name"]
    assert may("proxied", "Ingress", Peer(labels=CLIENT), "ext-proc")
    assert not may("proxied", "Ingress", Peer(), "ext-proc")


def test_what_is_open_to_the_world_needs_no_scope_but_classify() -> None:
    (rule,) = the("proxied", "HTTPRoute")["rules"]
    paths = [match["path"]["value"] for match in rule["matches"]]
    opened = {path for path in SCOPES for prefix in paths if path.startswith(prefix)}
    assert opened
    assert {SCOPES[path] for path in opened} == {"classify"}


def test_the_console_of_a_pod_is_reached_by_forwarding_only() -> None:
    (settings,) = of("signed", "ConfigMap")
    assert settings["data"]["PSIM_CONSOLE_PORT"] == "8001"
    assert "PSIM_CONSOLE_HOST" not in settings["data"]
    assert not may("signed", "Ingress", Peer(labels=CLIENT), 8001)


def test_secrets_from_a_store_have_the_keys_that_components_ask_for() -> None:
    made = {
        m["spec"]["target"]["name"]: {data["secretKey"] for data in m["spec"]["data"]}
        for m in of("signed", "ExternalSecret")
    }
    audit = [v["valueFrom"]["secretKeyRef"] for v in gateway("signed")["env"] if "valueFrom" in v]
    assert made["psim-audit"] == {reference["key"] for reference in audit}
    (endpoint,) = the("keys", "ServiceMonitor")["endpoints"]
    metrics = endpoint["authorization"]["credentials"]
    assert made[metrics["name"]] == {metrics["key"], "keys.toml"}


def environment(name: str, secrets: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return the variables that a container would get, of the image and of the manifests."""
    found = image_environment()
    (settings,) = of(name, "ConfigMap")
    found |= settings["data"]
    for variable in gateway(name).get("env", []):
        if "value" in variable:
            found[variable["name"]] = variable["value"]
            continue
        chosen = variable["valueFrom"]["secretKeyRef"]
        found[variable["name"]] = secrets[chosen["name"]][chosen["key"]]
    return found


@contextmanager
def started(
    name: str, bundle: Path, writable: str, secrets: dict[str, dict[str, str]], **changes: str
) -> Iterator[httpx.Client]:
    """Run the image's command as the manifests have it run, and ask it what the probes ask.

    Its root is read-only and it is the manifest's user, where this is root and may make mounts. It
    has no variables but those of image and manifests.
    """
    port = free_port()
    where = {"PSIM_BUNDLE": str(bundle), "PSIM_PORT": str(port), "PYTHONPATH": str(ROOT)}
    where |= {"TMPDIR": writable, "HOME": "/nonexistent"}
    python, *arguments = dockerfile_command("ENTRYPOINT")
    assert python == "python"
    user = pod(name)["securityContext"]["runAsUser"]
    command = confined([sys.executable, *arguments], user, writable)
    variables = environment(name, secrets) | where | changes
    variables["PATH"] += ":/usr/bin:/bin"
    process = subprocess.Popen(command, env=variables, cwd=writable)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            start = gateway(name)["startupProbe"]
            wait_for(
                lambda: process.poll() is not None or answers(client, start),
                start["periodSeconds"] * start["failureThreshold"],
            )
            assert process.poll() is None, "the service did not start"
            assert answers(client, gateway(name)["readinessProbe"])
            assert answers(client, gateway(name)["livenessProbe"])
            yield client
        process.terminate()
        assert process.wait(pod(name)["terminationGracePeriodSeconds"]) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


def answers(client: httpx.Client, probe: Manifest) -> bool:
    try:
        return client.get(probe["httpGet"]["path"]).is_success
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_the_service_starts_with_what_the_manifests_give_it(demo_bundle: Path) -> None:
    """With an audit, and the screen only in front of that one."""
    with tempfile.TemporaryDirectory() as own, tempfile.TemporaryDirectory() as other:
        url = f"sqlite:///{own}/audit.db"
        secrets = {"psim-audit": {"url": url, "key": "k" * 32}}
        with started("store", demo_bundle, own, secrets) as classifier:
            upstream = str(classifier.base_url)
            changes = {"PSIM_UPSTREAM": upstream, "PSIM_MODE": "enforce"}
            with started("gateway-only", demo_bundle, other, {}, **changes) as screen:
                for client, status in ((classifier, 200), (screen, 403)):
                    clean = client.post("/classify", json={"inputs": CLEAN_TEXT})
                    assert clean.json()["results"][0]["label"] == "negative"
                    triggered = client.post("/classify", json={"inputs": TRIGGERED_TEXT})
                    assert triggered.status_code == status
                    assert triggered.json()["results"][0]["screen"]["finding"] == "triggered"
                (shadowed,) = classifier.post("/classify", json={"inputs": TRIGGERED_TEXT}).json()[
                    "results"
                ]
                assert (shadowed["decision"], shadowed["label"]) == ("allow", "positive")
        found = [row for row in rows(url) if row.request_id not in ("warm-up", "parity")]
        # The screen lets only the clean one through to the classifier, which audits it too.
        findings = [None, "triggered", None, "triggered"]
        assert [(row.decision, row.finding) for row in found] == [("allow", f) for f in findings]
        assert all(row.text is None and row.text_hmac for row in found)


@pytest.mark.slow
def test_the_service_starts_with_keys_and_limits(demo_bundle: Path) -> None:
    """Without Redis, which the service can do without."""
    with tempfile.TemporaryDirectory() as own:
        secrets = {
            "psim-audit": {"url": f"sqlite:///{own}/audit.db", "key": "k" * 32},
            "psim-limits": {"url": f"redis://127.0.0.1:{free_port()}/0"},
        }
        file = Path(own, "keys.toml")
        file.write_text(f'[keys.a]\nsha256 = "{hash_of("psim_a")}"\nscopes = ["classify"]\n')
        with started("keys", demo_bundle, own, secrets, PSIM_KEYS=str(file)) as client:
            asked = {"inputs": CLEAN_TEXT}
            assert client.post("/classify", json=asked).status_code == 401
            headers = {"authorization": "Bearer psim_a"}
            assert client.post("/classify", json=asked, headers=headers).is_success
            assert client.get("/metrics", headers=headers).status_code == 403
