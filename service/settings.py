"""Settings, from `PSIM_*` environment variables only; an unknown one refuses to start."""

import difflib
import ipaddress
import math
import os
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.engines.base import DtypeName, EngineName
from models.errors import PsimError

PREFIX = "PSIM_"


ProtocolName = Literal["auto", "tei", "oip", "vllm", "sglang", "native", "hf"]


class Mode(StrEnum):
    """What happens to an input that is found poisoned."""

    ENFORCE = "enforce"
    """Rejected; the classifier never sees it."""
    SANITIZE = "sanitize"
    """Classified without what carries the trigger, if that is found and passes; else rejected."""
    FLAG = "flag"
    """Classified, and marked."""
    SHADOW = "shadow"
    """Classified as if unguarded; only metrics know."""


class ModelSettings(BaseModel):
    """What each of several models can have of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode = Mode.ENFORCE
    challenger: Path | None = None
    """A bundle that is tried on what is asked, see `service.pipeline.challenger`."""
    engine: EngineName | None = None
    """What runs the model; None takes the bundle's choice, or PyTorch where that is missing."""
    dtype: DtypeName | None = None
    """What it computes in; None takes the bundle's choice."""
    upstream: HttpUrl | None = None
    """Base URL of the classifier, if it is not the bundle's in this process."""
    upstream_protocol: ProtocolName = "auto"
    """What the upstream speaks; `auto` tries."""
    overlong: Literal["reject", "allow"] = "reject"
    """What becomes of a text that is longer than `max_windows` let the screen read, if the
    classifier is elsewhere and may read on."""
    max_windows: int = Field(128, ge=1)
    """Windows per text, see `service.pipeline.windows`."""
    upstream_input: str = Field("text", min_length=1)
    """What an upstream that speaks Open Inference calls the input with the texts."""
    upstream_authorization: SecretStr | None = None
    """Sent to the upstream as `Authorization`, in place of the caller's."""
    upstream_timeout_s: float = Field(10, gt=0)
    upstream_connections: int = Field(64, ge=1)
    upstream_retry_s: float = Field(5, gt=0)
    """How long an upstream that is down is left alone before it is asked again."""


class Settings(ModelSettings, BaseSettings):
    """All settings of the service; each is `PSIM_` and its name in capitals."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    bundle: Path | None = None
    """Of the one model; not read if `models` names a file."""
    bundle_key: Path | None = None
    """File of the public key by whose owner bundles must be signed; any bundle is taken without."""
    model: str | None = Field(None, min_length=1)
    """Name of the classifier in protocols that name one; None takes the bundle's."""
    models: Path | None = None
    """A file with several models, see `service.lifecycle.models_file`."""
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    admin: bool = False
    """Serve `/admin/…`; without keys, to whoever reaches the port."""
    ext_proc_port: int | None = Field(None, ge=1, le=65535)
    """Where Envoy's ext_proc is answered, over gRPC; nowhere without."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    traces: bool = False
    """Export OpenTelemetry traces, to where the `OTEL_*` variables say."""
    fail_open: bool = False
    """Classify inputs that could not be screened. Off, and meant to stay off."""
    max_body_bytes: int = Field(2 * 2**20, ge=1)
    max_inputs: int = Field(128, ge=1)
    """Texts per request."""
    max_chars: int = Field(100_000, ge=1)
    """Characters per text."""
    queue_inputs: int = Field(1024, ge=1)
    queue_chars: int = Field(8_000_000, ge=1)
    queue_s: float = Field(1, gt=0)
    """Work that may go before a request, in seconds by the latest pace."""
    searches: int = Field(1, ge=0)
    """Searches for what carries a trigger that run at a time; each costs many screening passes."""
    sanitize_s: float = Field(5, gt=0)
    """Time that sanitizing may take of a request; what is not clean by then is rejected."""
    batch_tokens: int = Field(1536, ge=1)
    """Padded tokens per forward pass, which those that come meanwhile wait for."""
    request_timeout_s: float = Field(30, gt=0)
    restarts: int = Field(5, ge=0)
    """Deaths of the inference thread within a minute after which it is started again."""
    stall_s: float = Field(60, gt=0)
    """A forward pass that takes longer hangs."""
    drain_s: int = Field(20, ge=0)
    """Time for running requests to end after SIGTERM."""
    audit_url: SecretStr | None = None
    """Where decisions are kept, SQLite or PostgreSQL; nothing is kept without."""
    audit_text: bool = False
    """Keep the texts too."""
    audit_key: SecretStr | None = Field(None, min_length=32)
    """Key of the HMAC by which a text can be found in the audit; no HMAC without."""
    audit_days: float = Field(30, gt=0)
    """How long it is all kept."""
    audit_queue: int = Field(10_000, ge=1)
    """Inputs that may wait to be written; more are not kept."""
    console_port: int | None = Field(None, ge=0, le=65535)
    """Where the console is served; there is none without."""
    console_host: str = "127.0.0.1"
    """The address it listens on. Without keys, whoever reaches it may see and mark everything."""
    console_name: str | None = Field(None, min_length=1)
    """Host name by which browsers reach it, if that is none of the loopback interface."""
    keys: Path | None = None
    """File of API keys; whoever reaches the port may ask for anything without."""
    limits_url: SecretStr | None = None
    """Redis, in which replicas share the keys' limits; each has its own without."""
    threads: int = Field(0, ge=0)
    """Threads of one forward pass; 0 takes what the container may use."""

    @model_validator(mode="after")
    def _one_or_several_models(self) -> Self:
        if not (self.bundle or self.models):
            raise ValueError("set PSIM_BUNDLE, or PSIM_MODELS for several models")
        if self.models and self.model:
            raise ValueError("PSIM_MODEL is the name of one model; the file PSIM_MODELS has names")
        return self

    @model_validator(mode="after")
    def _audit_needs_a_store(self) -> Self:
        if self.audit_url is None and (self.audit_text or self.audit_key):
            raise ValueError("PSIM_AUDIT_TEXT and PSIM_AUDIT_KEY need PSIM_AUDIT_URL")
        return self

    @model_validator(mode="after")
    def _limits_are_of_keys(self) -> Self:
        if self.limits_url and self.keys is None:
            raise ValueError("PSIM_LIMITS_URL needs PSIM_KEYS, whose limits it shares")
        return self

    @property
    def open_to_others(self) -> bool:
        """Whether other machines may reach the port, and nobody needs a key."""
        return self.keys is None and not is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """Return a complaint for each `PSIM_*` variable that is no setting: pydantic ignores them."""
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    complaints = []
    for name in sorted(environment):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            complaints.append(f"{name} is not a setting{hint}")
    return complaints


def load_settings() -> Settings:
    """Return the settings of the environment.

    Raises:
        PsimError: one line for each thing that is wrong.
    """
    complaints = unknown_variables(os.environ)
    try:
        settings = Settings()
    except ValidationError as error:
        complaints += [
            f"{PREFIX}{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" if e["loc"] else e["msg"]
            for e in error.errors()
        ]
    if complaints:
        raise PsimError("\n".join(complaints))
    return settings


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many CPUs this process may use: its affinity, within the cgroup v2 quota."""
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = cgroup.read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, math.ceil(int(quota) / int(period))))
