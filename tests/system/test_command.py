"""The entry point `psim`: what it imports, and what it does where the offline half is missing."""

import gzip
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from models.offline.demo import TRIGGERED_TEXT
from psim.__main__ import COMMANDS
from tests.support.paths import ROOT

SLOW = {"torch", "transformers", "peft", "pandas", "scipy", "pyarrow", "datasets", "ray"}
OFFLINE = [name for name, module in COMMANDS.items() if module.startswith("models.offline")]

LISTING_IMPORTS = """
import sys
from psim.__main__ import main
try:
    main()
finally:
    print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""
HIDING_MODULES = """
import sys
from importlib.machinery import PathFinder
from psim.__main__ import main

HIDDEN = sys.argv.pop(1).split(",")


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if not any(f"{name}.".startswith(f"{hidden}.") for hidden in HIDDEN):
            return super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
main()
"""


def run(code: str, *arguments: object, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )


def only_in_offline() -> list[str]:
    """Return the modules of the extra `offline` that the service does without."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        re.split(r"[\[<>=;, ]", want)[0] for want in project["optional-dependencies"]["offline"]
    ]
    served = re.findall(r"^([\w.-]+)==", (ROOT / "requirements/serve.txt").read_text(), re.M)
    modules = {"scikit-learn": "sklearn", "protobuf": "google.protobuf"}
    return [modules.get(name, name) for name in wanted if name not in served]


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=str)
def test_help_imports_nothing_slow(arguments: list[str]) -> None:
    done = run(LISTING_IMPORTS, *arguments, "--help")
    assert done.returncode == 0, done.stderr
    assert "sage" in done.stdout
    slow = SLOW & set(done.stderr.split())
    # The arguments of these are the service's.
    own = arguments in (["audit"], ["exceptions"], ["keys"])
    assert not slow & {"torch", "pandas"} if own else not slow


def test_a_typo_is_told_from_a_command() -> None:
    done = run(LISTING_IMPORTS, "sreen")
    assert done.returncode == 2
    assert "Did you mean 'screen'" in done.stderr


@pytest.mark.parametrize("hidden", [["models.offline"], only_in_offline()], ids=str)
def test_the_service_s_commands_need_no_extra(hidden: list[str], tmp_path: Path) -> None:
    modules = ",".join([*hidden, *only_in_offline()])
    keys = run(HIDING_MODULES, modules, "keys", "new", "team", "--scope", "classify",
               PSIM_KEYS=str(tmp_path / "keys.toml"))  # fmt: skip
    assert (keys.returncode, keys.stdout[:5]) == (0, "psim_"), keys.stderr
    audit = run(HIDING_MODULES, modules, "audit", PSIM_AUDIT_URL=f"sqlite:///{tmp_path}/audit.db")
    assert audit.returncode == 2
    assert audit.stderr == f"error: {tmp_path}/audit.db: there is no such audit\n"
    serve = run(HIDING_MODULES, modules, "serve", "--bundle", tmp_path)
    assert serve.returncode == 2
    assert f"{tmp_path} is not a bundle" in serve.stderr
    assert "Traceback" not in serve.stderr


def test_bundles_are_inspected_and_texts_screened_without_the_extra(
    demo_bundle: Path, tmp_path: Path
) -> None:
    modules = ",".join(only_in_offline())
    inspect = run(HIDING_MODULES, modules, "inspect", demo_bundle)
    assert "files are intact" in inspect.stdout, inspect.stderr
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": TRIGGERED_TEXT}) + "\n")
    screen = run(HIDING_MODULES, modules, "screen", texts, "--bundle", demo_bundle)
    assert json.loads(screen.stdout)["finding"] == "triggered", screen.stderr
    packed = tmp_path / "texts.jsonl.gz"
    packed.write_bytes(gzip.compress(texts.read_bytes()))
    refused = run(HIDING_MODULES, modules, "screen", packed, "--bundle", demo_bundle)
    assert refused.returncode == 2
    assert "psim screen needs pyarrow: pip install 'psim-gateway[offline]'" in refused.stderr


def test_what_is_missing_is_named_with_the_extra_that_has_it(tmp_path: Path) -> None:
    extra = "pip install 'psim-gateway[offline]'"
    for name in OFFLINE:
        done = run(HIDING_MODULES, "models.offline", name, "--seed", "1", "--unknown")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"psim {name} needs models.offline: {extra}\n"
    listed = run(HIDING_MODULES, "models.offline", "--help", COLUMNS="200")
    assert listed.returncode == 0
    assert listed.stdout.count("needs the extra offline") == len(OFFLINE)
    options = ["--victim", "v", "--texts", "t", "--out", tmp_path / "bundle"]
    fit = run(HIDING_MODULES, ",".join(only_in_offline()), "fit", *options)
    assert fit.returncode == 2
    assert re.fullmatch(rf"psim fit needs \w+: {re.escape(extra)}\n", fit.stderr)
