"""The image: its files say what they should, and its steps are taken in a folder.

Nothing here needs an engine for containers. The steps themselves take some minutes, so they are
only taken with TESTS_BUILD_IMAGE=1, which `make test-image` sets.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import httpx
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.utils import canonicalize_name

from models.offline.demo import CLEAN_TEXT, TRIGGERED_TEXT
from tests.support.confined import confined
from tests.support.deploy import DOCKERFILE, dockerfile_command, image_environment
from tests.support.paths import ROOT
from tests.support.servers import answering, free_port

BUILD = "TESTS_BUILD_IMAGE"
USER = 10001
INSTALL = "deploy/image/install.sh"
ARGUMENTS = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.M))
FIT_DOCKERFILE = (ROOT / "deploy/k8s/fit/Dockerfile").read_text()
UNWANTED = re.compile(
    r"nvidia|cuda|triton|^pip$|^datasets$|^pyarrow$|^matplotlib$|^pytest$|^hatchling$"
)
"""Packages that the CPU build, or what is served, does without."""
MOST_MB = 1500
"""What the environment may take; it takes 1,430, and 195 more with PyTorch's tests and headers."""

Done = subprocess.CompletedProcess[str]


def taken(step: str, venv: Path, context: Path = ROOT, **variables: str) -> Done:
    """Take a step of the Dockerfile, with the values that it has for its arguments."""
    environment = os.environ | ARGUMENTS | {"PIP_RETRIES": "0"} | variables
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = [str(context / INSTALL), step, str(venv)]
    return subprocess.run(command, cwd=context, env=environment, capture_output=True, text=True)


def test_the_base_is_pinned_by_digest_and_the_same_for_both_images() -> None:
    base = ARGUMENTS["BASE"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-trixie@sha256:[0-9a-f]{64}", base)
    assert f"ARG BASE={base}\n" in FIT_DOCKERFILE
    for file in (DOCKERFILE, FIT_DOCKERFILE):
        assert {*re.findall(r"^FROM (\S+)", file, re.M)} == {"${BASE}"}
        assert "ARG TORCH=cpu\n" in file


def test_the_image_is_labelled() -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="(.*?)"', DOCKERFILE))
    project = (ROOT / "pyproject.toml").read_text()
    for key, field in (("version", "version"), ("licenses", "license")):
        assert f'\n{field} = "{labels[key]}"\n' in project
    assert labels.keys() == {"title", "description", "licenses", "version", "revision"}


def test_the_image_keeps_its_installer_to_the_stage_that_builds() -> None:
    builder, last = DOCKERFILE.split("\nFROM ")[1:]
    assert INSTALL in builder
    assert INSTALL not in last
    assert re.search(r"pip uninstall .* pip setuptools wheel", last)
    assert "COPY --from=builder /src/LICENSE " in last


@pytest.mark.parametrize("torch", ["gpu", "", "../serve"])
def test_torch_is_cpu_or_cuda(torch: str, tmp_path: Path) -> None:
    done = taken("libraries", tmp_path / "venv", TORCH=torch)
    assert done.returncode == 2
    assert done.stderr == f"TORCH is cpu or cuda, not '{torch}'\n"
    assert not (tmp_path / "venv").exists()


@pytest.mark.slow
def test_where_the_cpu_build_is_missing_nothing_else_is_installed(tmp_path: Path) -> None:
    nowhere = {"PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    done = taken("libraries", tmp_path / "venv", ROOT, **nowhere)
    assert done.returncode == 1
    assert "No matching distribution found for torch==" in done.stderr
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    assert [*packages.iterdir()] == []


def test_the_bill_of_materials_of_the_image_is_valid_and_complete() -> None:
    assert_billed(Path(sys.executable), Path(sysconfig.get_path("purelib")))


def assert_billed(python: Path, packages: Path) -> None:
    """Check that an environment's bill of materials is valid, and lists what it has."""
    command = [python, ROOT / "deploy/image/sbom.py"]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(made) is None
    bill = json.loads(made)
    listed = {c["purl"].split("@")[0] for c in bill["components"]}
    installed = {canonicalize_name(d.name) for d in distributions(path=[str(packages)])}
    assert {f"pkg:pypi/{name}" for name in installed - {"psim-gateway"}} <= listed
    assert "pkg:generic/python" in listed
    assert bool(shutil.which("dpkg-query")) == ("pkg:deb/debian/libc6" in listed)
    assert bill["metadata"]["component"]["name"] == "psim-gateway"
    assert str(ROOT) not in made


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Take the steps, with no files but those that the builder gets."""
    if os.environ.get(BUILD) != "1":
        pytest.skip(f"takes some minutes: {BUILD}=1, or make test-image")
    context = tmp_path_factory.mktemp("context")
    for line in (ROOT / ".dockerignore").read_text().split():
        if line.startswith("!"):
            name, ignored = line[1:], shutil.ignore_patterns("__pycache__")
            copy: Any = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            (context / name).parent.mkdir(exist_ok=True)
            copy(
                ROOT / name, context / name, **({"ignore": ignored} if copy != shutil.copy else {})
            )
    made = tmp_path_factory.mktemp("opt") / "venv"
    for step in ("libraries", "gateway"):
        done = taken(step, made, context)
        assert done.returncode == 0, done.stderr
    return made


@pytest.fixture
def packages(venv: Path) -> Path:
    (found,) = venv.glob("lib/python*/site-packages")
    return found


def ran(venv: Path, writable: Path, program: str, *arguments: str | Path, **variables: str) -> Done:
    """Run a program of the environment as the image's user, with the image's variables."""
    command = confined([str(venv / "bin" / program), *map(str, arguments)], USER, writable)
    environment = variables_of(venv, writable) | variables
    return subprocess.run(command, cwd=writable, env=environment, capture_output=True, text=True)


def variables_of(venv: Path, writable: Path) -> dict[str, str]:
    """Return the image's variables, and where a container has its temporary files."""
    path = f"{venv}/bin:/usr/bin:/bin:/usr/sbin"
    return image_environment() | {"PATH": path, "TMPDIR": str(writable)}


@pytest.mark.slow
def test_what_is_installed_is_what_is_served(venv: Path, packages: Path) -> None:
    names = {canonicalize_name(d.name) for d in distributions(path=[str(packages)])}
    assert {"torch", "openvino", "psim-gateway"} <= names
    assert not [name for name in names if UNWANTED.search(name)]
    assert not [*venv.glob("bin/pip*")]
    assert [*packages.glob("psim_gateway-*.dist-info/licenses/LICENSE")]
    assert not (packages / "torch/include").exists()
    files = [file for file in venv.rglob("*") if file.is_file() and not file.is_symlink()]
    assert sum(file.stat().st_size for file in files) < MOST_MB * 1e6
    assert_billed(venv / "bin/python", packages)


def test_the_commands_of_operators_work(venv: Path, demo_bundle: Path, tmp_path: Path) -> None:
    inspect = ran(venv, tmp_path, "psim", "inspect", demo_bundle)
    assert "files are intact" in inspect.stdout, inspect.stderr
    keys = {"PSIM_KEYS": str(tmp_path / "keys.toml")}
    made = ran(venv, tmp_path, "psim", "keys", "new", "team", "--scope", "classify", **keys)
    assert made.stdout.startswith("psim_"), made.stderr
    audit = ran(venv, tmp_path, "psim", "audit", PSIM_AUDIT_URL=f"sqlite:///{tmp_path}/audit.db")
    assert audit.stderr == f"error: {tmp_path}/audit.db: there is no such audit\n"
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": t}) + "\n" for t in (CLEAN_TEXT, TRIGGERED_TEXT)))
    screen = ran(venv, tmp_path, "psim", "screen", texts, "--bundle", demo_bundle)
    findings = [json.loads(line)["finding"] for line in screen.stdout.splitlines()]
    assert findings == [None, "triggered"], screen.stderr
    fit = ran(venv, tmp_path, "psim", "fit", "--victim", "v", "--texts", "t", "--out", "o")
    assert re.fullmatch(r"psim fit needs \w+: pip install .*\n", fit.stderr)


@pytest.fixture
def started(venv: Path, demo_bundle: Path, tmp_path: Path) -> Iterator[str]:
    """Run the image's command; yield its address."""
    python, *arguments = dockerfile_command("ENTRYPOINT")
    port, writable = free_port(), tmp_path / "own"
    writable.mkdir()
    settings = {"PSIM_BUNDLE": str(demo_bundle), "PSIM_HOST": "127.0.0.1", "PSIM_PORT": str(port)}
    variables = variables_of(venv, writable) | settings
    assignments = [f"{name}={value}" for name, value in variables.items()]
    command = [str(venv / "bin" / python), *arguments]
    url = f"http://127.0.0.1:{port}"
    isolated = ["env", "-i", *assignments, *confined(command, USER, writable)]
    with answering(isolated, f"{url}/ready", tmp_path / "log"):
        yield url


def test_the_service_starts_and_screens(started: str) -> None:
    request = {"inputs": [CLEAN_TEXT, TRIGGERED_TEXT]}
    results = httpx.post(f"{started}/classify", json=request, timeout=60).json()["results"]
    assert [result["screen"]["finding"] for result in results] == [None, "triggered"]
