"""What the files for deployment say."""

import json
import re
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.observability.metrics import Metrics
from service.settings import Settings
from tests.support.fakes import fake_bundle
from tests.support.paths import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def dockerfile_command(instruction: str) -> list[str]:
    """Return the exec form behind an instruction, as the image would run it."""
    (found,) = re.findall(rf"^{instruction}\b.*?(\[[^\n]*\])$", DOCKERFILE, re.M | re.S)
    command: Any = json.loads(found)
    return list(command)


def image_environment() -> dict[str, str]:
    """Return the variables that the image sets."""
    found = dict(re.findall(r"^(?:ENV)? +(\w+)=(\S+?)(?: \\)?$", DOCKERFILE, re.M))
    assert "PSIM_BUNDLE" in found
    return found


def working_directory() -> Path:
    """Return where the image's command runs."""
    (found,) = re.findall(r"^WORKDIR (\S+)$", DOCKERFILE.split("\nFROM ")[-1], re.M)
    return Path(found)


def scraped() -> set[str]:
    """Return the name of every series of a running service."""
    metrics = Metrics()
    metrics.of("fake", Settings(bundle=Path("unused")))
    metrics.describe({"fake": fake_bundle()})
    found = generate_latest(metrics.registry).decode()
    return {s.name for family in text_string_to_metric_families(found) for s in family.samples}


RUNBOOK = (ROOT / "docs/runbook.md").read_text()
