"""Programs that tests need and that are no Python packages."""

import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

REQUIRE = "TESTS_REQUIRE_SERVERS"
"""Set to 1, and a test fails whose program is missing; otherwise it is skipped."""
PACKAGES = {
    "chromium": "chromium",
    "docker-registry": "docker-registry",
    "initdb": "postgresql",
    "nginx": "nginx-light",
    "openssl": "openssl",
    "postgres": "postgresql",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "redis-server": "redis-server",
}
"""Which package of Debian brings a program."""
OTHERWISE = {
    "envoy": "make dev",
    "helm": "make dev on Linux on x86-64, otherwise https://helm.sh",
    "kubectl": "https://kubernetes.io/docs/tasks/tools",
}
"""What brings a program that Debian has not."""
PLACES = {
    "envoy": f"{sys.prefix}/envoy/envoy/_bin/envoy",
    "helm": f"{sys.prefix}/helm/helm",
    "initdb": "/usr/lib/postgresql/*/bin/initdb",
    "nginx": "/usr/sbin/nginx",
    "postgres": "/usr/lib/postgresql/*/bin/postgres",
}
"""Where programs are that are not on everybody's PATH; of several versions, the last one counts."""
_MISSING = re.compile(r"(\S+) is missing: ")


def program(name: str) -> str:
    """Return the path of a program; where it is missing, skip the test, or fail it."""
    if name in PLACES and (found := sorted(Path("/").glob(PLACES[name].lstrip("/")))):
        return str(found[-1])
    if on_path := shutil.which(name):
        return on_path
    brings = f"apt-get install {PACKAGES[name]}" if name in PACKAGES else OTHERWISE[name]
    if os.environ.get(REQUIRE) == "1":
        pytest.fail(f"{name} is missing: {brings}, or unset {REQUIRE}", pytrace=False)
    pytest.skip(f"{name} is missing: {brings}")


def peer(variable: str, package: str) -> str:
    """Return a program of a peer that wants an environment of its own; skip where there is none."""
    found = os.environ.get(variable)
    if not found:
        pytest.skip(f"{package} wants an environment of its own: {variable}, docs/compatibility.md")
    return found


def closing_line(reasons: Iterable[str]) -> str:
    """Say how many tests were skipped for which programs, and what brings them."""
    names = [found[1] for reason in reasons if (found := _MISSING.search(reason))]
    if not names:
        return ""
    missing = sorted(set(names))
    packages = sorted({PACKAGES[name] for name in missing if name in PACKAGES})
    ways = [f"apt-get install {' '.join(packages)}"] if packages else []
    ways += [f"{name}: {OTHERWISE[name]}" for name in missing if name in OTHERWISE]
    return f"{len(names)} skipped without {', '.join(missing)}; to have them: {'; '.join(ways)}"
