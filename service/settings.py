"""Settings, from `PSIM_*` environment variables only.

An unknown variable refuses to start, unless it is known to be of another version: while a
deployment is updated or rolled back, two versions have one environment.

They come in sections by concern. `Settings` inherits all sections, so that one object configures
everything; a part names in its annotation the section it needs, and cannot read any other.
"""

import base64
import difflib
import ipaddress
import math
import os
from collections.abc import Iterable, Sequence
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

from models.detection.screen import SUSPICION
from models.engines.base import DtypeName, EngineName
from models.errors import PsimError

PREFIX = "PSIM_"
OVERRIDE_TOKENS_S = 4096
"""Tokens per second that override tests may cost by default, where suspicious texts are tested."""
PUSH_KEY_PREFIX, LEAST_PUSH_KEY = "whsec_", 24
OTHER_VERSIONS: dict[str, str | None] = {
    "PSIM_CANDIDATE": "PSIM_CHALLENGER",
    "PSIM_UNREAD": "PSIM_OVERLONG",
    "PSIM_UPSTREAM_DIALECT": "PSIM_UPSTREAM_PROTOCOL",
}
"""Variables of past versions, with what replaces each, and those that the next version will read,
with None. They have no effect, so none belongs here whose loss would weaken the screen."""


ProtocolName = Literal["auto", "tei", "oip", "vllm", "sglang", "native", "hf"]


class Mode(StrEnum):
    """What happens to an input that is found triggered; see `unfamiliar` for the other finding."""

    ENFORCE = "enforce"
    """Rejected; the classifier never sees it."""
    SANITIZE = "sanitize"
    """Classified without its trigger if that is found and the rest passes; else rejected."""
    FLAG = "flag"
    """Classified, and marked."""
    SHADOW = "shadow"
    """Classified as if there were no screen; only the metrics tell."""


class Section(BaseModel):
    """Some of the settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TimeLimits(Section):
    """Time that requests have."""

    request_timeout_s: float = Field(30, gt=0)
    drain_s: int = Field(20, ge=0)
    """Time for running requests to end after SIGTERM."""


class RequestLimits(TimeLimits):
    """Size and time of one request."""

    max_body_bytes: int = Field(2 * 2**20, ge=1)
    max_inputs: int = Field(128, ge=1)
    """Texts per request."""
    max_chars: int = Field(100_000, ge=1)
    """Characters per text."""
    max_conversation_chars: int = Field(400_000, ge=1)
    """Characters of all texts of a conversation, which `max_inputs` does not limit."""


class ServerSettings(Section):
    """The main port."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)


class ExtProcSettings(ServerSettings, RequestLimits):
    """Envoy's ext_proc, over gRPC."""

    ext_proc_port: int | None = Field(None, ge=1, le=65535)
    """Port for ext_proc, on the same host; None switches it off."""


class InferenceGrpcSettings(ServerSettings, RequestLimits):
    """Open Inference, over gRPC."""

    oip_grpc_port: int | None = Field(None, ge=1, le=65535)
    """Port for it, on the same host; None switches it off."""


class AccessSettings(ServerSettings):
    """Who may call which routes, and how often."""

    keys: Path | None = None
    """File of API keys; without it, whoever reaches the port may call anything."""
    limits_url: SecretStr | None = None
    """Redis, in which replicas share the keys' rate limits; without it, each has its own."""
    admin: bool = False
    """Serve `/admin/…`; without keys, to whoever reaches the port."""

    @model_validator(mode="after")
    def _limits_belong_to_keys(self) -> Self:
        if self.limits_url and self.keys is None:
            raise ValueError("PSIM_LIMITS_URL needs PSIM_KEYS, whose limits it shares")
        return self

    @property
    def open_to_others(self) -> bool:
        """Whether other machines may reach the port, and nobody needs a key."""
        return self.keys is None and not is_loopback(self.host)


class ConsoleSettings(AccessSettings):
    """The port of the console."""

    console_port: int | None = Field(None, ge=0, le=65535)
    """Port of the console; None switches it off."""
    console_host: str = "127.0.0.1"
    """Address it listens on."""
    console_open: bool = False
    """Without keys, let whoever reaches that address see and mark everything."""
    console_name: str | None = Field(None, min_length=1)
    """Host name by which browsers reach it, if that is not one of the loopback interface."""

    @model_validator(mode="after")
    def _others_need_keys(self) -> Self:
        alone = self.console_port is None or is_loopback(self.console_host)
        if not (alone or self.keys or self.console_open):
            raise ValueError(
                "PSIM_CONSOLE_HOST lets other machines reach the console, and without PSIM_KEYS "
                "they may see and mark everything: set PSIM_KEYS, or PSIM_CONSOLE_OPEN=true if "
                "something else decides who reaches that address"
            )
        return self


class AuditSettings(Section):
    """What is kept of decisions, and for how long."""

    audit_url: SecretStr | None = None
    """SQLite or PostgreSQL database for decisions; None keeps nothing."""
    audit_text: bool = False
    """Keep the texts too."""
    audit_key: SecretStr | None = Field(None, min_length=32)
    """Key of the HMAC by which a text can be found in the audit; None keeps no HMAC."""
    audit_days: float = Field(30, gt=0)
    """How long rows are kept."""
    audit_queue: int = Field(10_000, ge=1)
    """Inputs that may wait to be written; more are dropped."""
    audit_sample: float = Field(1, ge=1e-6, le=1)
    """Share of the inputs without a finding that is kept. Not 0: from none, nothing could be scaled
    up."""
    push_url: HttpUrl | None = None
    """Where findings are pushed as CloudEvents; None pushes none."""
    push_key: SecretStr | None = None
    """Key of their signature, as Standard Webhooks writes it: `whsec_` and base64."""

    @model_validator(mode="after")
    def _audit_needs_a_store(self) -> Self:
        if self.audit_url is None and (self.audit_text or self.audit_key):
            raise ValueError("PSIM_AUDIT_TEXT and PSIM_AUDIT_KEY need PSIM_AUDIT_URL")
        return self

    @model_validator(mode="after")
    def _push_needs_an_audit_and_a_key(self) -> Self:
        if self.push_url and not (self.audit_url and self.push_key):
            raise ValueError("PSIM_PUSH_URL needs PSIM_AUDIT_URL and PSIM_PUSH_KEY")
        if self.push_key is not None and len(self.push_secret) < LEAST_PUSH_KEY:
            raise ValueError(
                f"PSIM_PUSH_KEY must be whsec_ and {LEAST_PUSH_KEY} random bytes or more in base64"
            )
        return self

    @property
    def push_secret(self) -> bytes:
        """The key of the signature; empty if there is none, or it is not written as it must be."""
        written = self.push_key.get_secret_value() if self.push_key else ""
        if not written.startswith(PUSH_KEY_PREFIX):
            return b""
        try:
            return base64.b64decode(written.removeprefix(PUSH_KEY_PREFIX), validate=True)
        except ValueError:
            return b""


class ObservabilitySettings(Section):
    """Logs and traces."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    traces: bool = False
    """Export OpenTelemetry traces, as the `OTEL_*` variables configure."""


class QueueSettings(TimeLimits):
    """What may wait for the inference worker."""

    queue_inputs: int = Field(1024, ge=1)
    queue_chars: int = Field(8_000_000, ge=1)
    queue_s: float = Field(1, gt=0)
    """Work that may go before a request, in seconds by the latest pace."""


class WorkerSettings(Section):
    """When the inference thread counts as dead."""

    restarts: int = Field(5, ge=0)
    """Deaths within a minute after which the thread is still restarted."""
    stall_s: float = Field(60, gt=0)
    """A forward pass that takes longer counts as hanging."""


class InferenceSettings(QueueSettings, WorkerSettings):
    """The inference thread, its queue and its batches."""

    batch_tokens: int = Field(0, ge=0)
    """Padded tokens per forward pass, for which texts that arrive meanwhile wait; 0 takes
    `BATCH_TOKENS` of the device."""
    threads: int = Field(0, ge=0)
    """Threads of one forward pass; 0 uses all CPUs of the container."""


class OverrideSettings(Section):
    """The override test, the second stage of the screen."""

    screen: Literal["suspicious", "thorough"] | None = None
    """Which texts are tested: those that the first stage suspects, or all of them. None takes all
    of a multi-label classifier's, and the suspicious ones of any other."""
    screen_sample: float = Field(0.01, ge=0, le=1)
    """Share of the other texts that is tested too where suspicious ones are: a trigger may hide
    from the first stage."""
    override_tokens_s: float | None = Field(None, ge=0)
    """Tokens per second that tests may cost; beyond that, the first stage decides alone. None takes
    `OVERRIDE_TOKENS_S`, or as many times that as more texts are tested."""

    @property
    def thorough(self) -> bool | None:
        """Whether all texts are tested, see `Manifest.tests_all_texts`."""
        return None if self.screen is None else self.screen == "thorough"

    def override_budget(self, *, thorough: bool) -> float:
        """Return the tokens per second that tests of suspicious texts, or of all, may cost."""
        if self.override_tokens_s is not None:
            return self.override_tokens_s
        return OVERRIDE_TOKENS_S / (SUSPICION if thorough else 1)


class ScreeningSettings(InferenceSettings, OverrideSettings):
    """Both stages of the screen, and the thread that runs them."""


class TriggerSearchSettings(Section):
    """The search for the words that carry a trigger."""

    searches: int = Field(1, ge=0)
    """Searches that run at a time; each costs many screening passes."""
    sanitize_s: float = Field(5, gt=0)
    """Time for sanitizing per request; inputs that are not clean by then are rejected."""


class UpstreamSettings(Section):
    """A classifier that is deployed elsewhere."""

    upstream: HttpUrl | None = None
    """Base URL of the classifier; None uses the bundle's, in this process."""
    upstream_protocol: ProtocolName = "auto"
    """Protocol of the upstream; `auto` tries them."""
    upstream_input: str = Field("text", min_length=1)
    """Name of the input that holds the texts, for an upstream that speaks Open Inference."""
    upstream_max_length: int | None = Field(None, ge=1)
    """Tokens after which the classifier cuts a text, special tokens included; also for one behind a
    proxy. None asks the upstream."""
    upstream_authorization: SecretStr | None = None
    """Sent to the upstream as `Authorization`, in place of the caller's."""
    upstream_timeout_s: float = Field(10, gt=0)
    upstream_connections: int = Field(64, ge=1)
    upstream_retry_s: float = Field(5, gt=0)
    """Pause before an upstream that is down is tried again."""
    upstream_parity_s: float = Field(3600, ge=0)
    """Pause between comparisons of the upstream with the bundle's victim; 0 makes none."""
    upstream_parity_min: float = Field(0, ge=0, le=1)
    """Share of the carriers that both must give the same label; below it, nothing is forwarded."""


class ModelSettings(UpstreamSettings, OverrideSettings):
    """What each of several models can have of its own."""

    mode: Mode = Mode.ENFORCE
    challenger: Path | None = None
    """A second bundle, tried on live traffic; see `service.pipeline.challenger`."""
    engine: EngineName | None = None
    """Engine that runs the model; None takes the bundle's, or PyTorch if that is not installed."""
    dtype: DtypeName | None = None
    """Type of its numbers; None takes the bundle's."""
    unfamiliar: Literal["flag", "reject", "allow"] = "flag"
    """Fate of a text that is unlike clean ones, but not confirmed to hold a trigger. Mode `flag`
    rejects none, and mode `shadow` allows all."""
    overlong: Literal["reject", "allow"] = "reject"
    """Fate of a text longer than `max_windows` let the screen read, if the classifier is elsewhere
    and may read on."""
    long_texts: Literal["cut", "windows"] = "cut"
    """Whether a text that is too long for the bundle's own classifier is screened only as far as
    that reads, or to its end; for a classifier elsewhere, it always is."""
    max_windows: int = Field(128, ge=1)
    """Windows per text, see `service.pipeline.windows`."""


class GatewaySettings(ModelSettings, TriggerSearchSettings):
    """How one model screens, decides and classifies."""

    fail_open: bool = False
    """Classify inputs that could not be screened. Off, and meant to stay off."""
    seen_texts: int = Field(10_000, ge=0)
    """Texts of conversations that are not screened again; 0 remembers none."""


class BundleSettings(Section):
    """Which models are served."""

    bundle: Path | None = None
    """Bundle of the single model; ignored if `models` names a file."""
    bundle_key: Path | None = None
    """File of the public key with which bundles must be signed; without it, any bundle loads."""
    model: str | None = Field(None, min_length=1)
    """Name of the classifier in protocols that name one; None takes the bundle's."""
    models: Path | None = None
    """File with several models, see `service.lifecycle.models_file`."""

    @model_validator(mode="after")
    def _one_or_several_models(self) -> Self:
        if not (self.bundle or self.models):
            raise ValueError("set PSIM_BUNDLE, or PSIM_MODELS for several models")
        if self.models and self.model:
            raise ValueError("PSIM_MODEL is the name of one model; the file PSIM_MODELS has names")
        return self


class Settings(
    ObservabilitySettings,
    ConsoleSettings,
    ExtProcSettings,
    InferenceGrpcSettings,
    ScreeningSettings,
    AccessSettings,
    AuditSettings,
    GatewaySettings,
    BundleSettings,
    BaseSettings,
):
    """All settings of the service; each is read from `PSIM_` and its name in capitals."""

    model_config = SettingsConfigDict(env_prefix=PREFIX)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address to listen on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """Return a complaint for each `PSIM_*` variable that is no setting: pydantic ignores them."""
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    return [
        f"{name} is not a setting{_hint(name.upper(), known)}"
        for name in sorted(environment)
        if name.upper().startswith(PREFIX) and name.upper() not in known
    ]


def ignored_variables(environment: Iterable[str]) -> list[str]:
    """Return a warning, without its value, for each variable that another version reads."""
    return unknown_variables(name for name in environment if name.upper() in OTHER_VERSIONS)


def _hint(name: str, known: Sequence[str]) -> str:
    if name in OTHER_VERSIONS:
        new = OTHER_VERSIONS[name]
        advice = f"set {new}" if new else "a newer one has it"
        return f" of this version, which ignores it: {advice}"
    similar = difflib.get_close_matches(name, [*known, *OTHER_VERSIONS], n=1)
    return f"; did you mean {OTHER_VERSIONS.get(similar[0]) or similar[0]}?" if similar else ""


def load_settings() -> Settings:
    """Read the settings from the environment.

    Raises:
        PsimError: a setting is wrong; the message has a line for each.
    """
    complaints = unknown_variables(n for n in os.environ if n.upper() not in OTHER_VERSIONS)
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
