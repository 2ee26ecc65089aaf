"""What is installed: pinned with hashes, the same everywhere, and listed."""

import json
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT

LOCKS = sorted(ROOT.glob("requirements/*.txt"))


def locked(*names: str) -> dict[str, str]:
    """Return the versions that locks pin, by package."""
    text = "".join((ROOT / "requirements" / f"{name}.txt").read_text() for name in names)
    return {canonicalize_name(n): v for n, v in re.findall(r"^([\w.-]+)==([^ ;\\]+)", text, re.M)}


def constrained() -> dict[str, str]:
    pins = [line.split("==") for line in (ROOT / "constraints.txt").read_text().split()]
    return {canonicalize_name(name): version for name, version in pins}


def test_locks_pin_what_the_constraints_do() -> None:
    torch = {"torch": constrained()["torch"]}
    assert locked("dev", "envoy", "helm") | torch == constrained(), "run make lock"
    assert locked("torch-cpu") == {"torch": f"{torch['torch']}+cpu"}
    assert (ROOT / "requirements/torch-cpu.txt").read_text().count("--hash=") == 2  # x86-64, arm64
    assert torch.items() <= locked("torch-cuda").items(), "run make lock"
    served = locked("serve")
    assert served.items() <= constrained().items(), "run make lock"
    assert locked("serve-ray").items() <= constrained().items(), "run make lock"
    assert served.items() < locked("serve-ray").items()
    assert locked("build").items() <= constrained().items(), "run make lock"
    assert {"fastapi", "cryptography", "limits", "redis", "openvino"} <= served.keys()
    assert not {"pytest", "datasets", "hatchling"} & served.keys()


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_requirement_has_a_hash_and_no_address(lock: Path) -> None:
    lines = [line for line in lock.read_text().splitlines() if line and line[0] != "#"]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        hashed = re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line)
        pinned = re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.!+]+( ; [^\\]+)? \\", line)
        assert hashed or (pinned and "--hash=" in following), line


def test_only_what_is_locked_is_installed() -> None:
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    installs = re.findall(r"pip install ([^&;\n]*)", text)
    assert installs
    for given in installs:
        assert "--no-deps" in given
        assert "--require-hashes" in given or "-e ." in given


def test_images_install_only_what_is_locked_and_ourselves() -> None:
    steps = (ROOT / "deploy/image/install.sh").read_text()
    (pip,) = re.findall(r"pip .*\binstall (.*)", steps)
    assert "--no-deps" in pip
    installs = re.findall(r"^ +install_into (.*)$", steps, re.M)
    own = [given for given in installs if "--require-hashes" not in given]
    assert own == ['"$venv" "$build"/dist/*.whl']
    assert len(installs) == 4
    for name in ("Dockerfile", "deploy/k8s/fit/Dockerfile"):
        assert not re.search(r"\b(pip|apt-get|uv) install", (ROOT / name).read_text())


def test_the_bill_of_materials_lists_what_is_installed(tmp_path: Path) -> None:
    made = tmp_path / "sbom.json"
    command = [
        "make",
        "-o",
        ".venv/.ready",
        "sbom",
        f"SBOM={made}",
        f"BIN={Path(sys.executable).parent}",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    bill = json.loads(made.read_text())
    listed = {(canonicalize_name(c["name"]), c["version"]) for c in bill["components"]}
    # Not `sys.path`, to which Ray adds a folder of its own packages.
    here = distributions(path=[sysconfig.get_path("purelib")])
    installed = {(canonicalize_name(d.name), d.version) for d in here}
    own = bill["metadata"]["component"]
    assert (own["name"], own["version"]) in installed
    assert listed == {(name, version) for name, version in installed if name != own["name"]}
    assert str(ROOT) not in made.read_text()
