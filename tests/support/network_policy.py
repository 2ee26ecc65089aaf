"""What NetworkPolicies allow, as a network plugin would decide it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

NAMESPACE = "psim"
"""Where the policies are."""


@dataclass(frozen=True)
class Peer:
    """Whoever is at the other end: a pod, or a host outside the cluster, in no namespace."""

    namespace: str | None = NAMESPACE
    labels: dict[str, str] = field(default_factory=dict)


OUTSIDE = Peer(namespace=None)


def allowed(
    policies: Iterable[dict[str, Any]],
    direction: str,
    labels: dict[str, str],
    peer: Peer,
    port: int | str,
    protocol: str = "TCP",
) -> bool:
    """Return whether pods with these labels may be entered by a peer, or leave for one.

    Args:
        policies: specifications of the policies in the pods' namespace.
        direction: `Ingress` or `Egress`.
        port: of the pod that is entered: its number, or its name if the policies use names.
    """
    applying = [
        policy
        for policy in policies
        if direction in policy["policyTypes"] and _selects(policy["podSelector"], labels)
    ]
    if not applying:
        return True
    side = "from" if direction == "Ingress" else "to"
    return any(
        _is_one_of(peer, rule.get(side)) and _opens(rule.get("ports"), port, protocol)
        for policy in applying
        for rule in policy.get(direction.lower(), [])
    )


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, "expressions are not understood here"
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def _is_one_of(peer: Peer, wanted: list[dict[str, Any]] | None) -> bool:
    return not wanted or any(_is(peer, one) for one in wanted)


def _is(peer: Peer, wanted: dict[str, Any]) -> bool:
    if "ipBlock" in wanted:
        return peer.namespace is None
    if peer.namespace is None or not _selects(wanted.get("podSelector", {}), peer.labels):
        return False
    if "namespaceSelector" not in wanted:
        return peer.namespace == NAMESPACE
    return _selects(wanted["namespaceSelector"], {"kubernetes.io/metadata.name": peer.namespace})


def _opens(ports: list[dict[str, Any]] | None, port: int | str, protocol: str) -> bool:
    return not ports or any(
        one["port"] == port and one.get("protocol", "TCP") == protocol for one in ports
    )
