"""Print what an image holds, as CycloneDX JSON: Python, its packages, and those of Debian.

To be run by the environment's own Python, which needs no package for it.
"""

import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from typing import Any
from urllib.parse import quote

OWN = "psim-gateway"
DEBIAN = "${binary:Package}\t${Version}\t${Architecture}\n"


def main() -> None:
    """Write the bill of materials to stdout; the same image gives the same bytes."""
    packages = sorted(python_packages(), key=lambda c: c["purl"])
    (own,) = [package for package in packages if package["name"] == OWN]
    packages.remove(own)
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": own | {"type": "application"}},
        "components": [python(), *packages, *debian_packages()],
    }
    json.dump(bill, sys.stdout, indent=1)


def component(name: str, version: str, purl: str, **more: Any) -> dict[str, Any]:
    """Return a component; `purl` is the address of the package without its version."""
    address = f"pkg:{purl}@{quote(version, safe='')}"
    found = {"type": "library", "name": name, "version": version, "purl": address}
    return found | {"bom-ref": address} | more


def python() -> dict[str, Any]:
    """Return the interpreter."""
    return component("python", platform.python_version(), "generic/python")


def python_packages() -> Iterator[dict[str, Any]]:
    """Yield what is installed beside this interpreter."""
    for found in distributions():
        name = re.sub("[-_.]+", "-", found.metadata["Name"]).lower()
        licence = found.metadata["License-Expression"]
        more = {"licenses": [{"expression": licence}]} if licence else {}
        yield component(name, found.version, f"pypi/{name}", **more)


def debian_packages() -> Iterator[dict[str, Any]]:
    """Yield Debian's packages, in the order of their names; none where there is no dpkg."""
    command = ["dpkg-query", "--show", f"--showformat={DEBIAN}"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    except FileNotFoundError:
        return
    for line in listed.splitlines():
        name, version, architecture = line.split("\t")
        bare = name.split(":")[0]
        found = component(bare, version, f"deb/debian/{bare}")
        found["purl"] += f"?arch={architecture}"
        yield found | {"bom-ref": f"{name} {version}"}


if __name__ == "__main__":
    main()
