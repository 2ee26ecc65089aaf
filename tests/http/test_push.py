"""Findings that are pushed: to a real receiver, from real stores, at least once."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from pydantic import SecretStr, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.audit import push as pushing
from service.audit.push import Push, cloud_event
from service.audit.rows import Row
from service.audit.store import AuditStore, leases, pushes
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.support.audit import ROW
from tests.support.requests import CLEAN, POISONED, UNFAMILIAR, client_of, metric, until_metric
from tests.support.servers import free_port, serving
from tests.support.waiting import until, wait_for

SECRET = b"s" * 32
WRITTEN = "whsec_" + base64.b64encode(SECRET).decode()


@dataclass
class Receiver:
    """Takes events, unless it is told to answer something else."""

    status: int = 200
    refused: set[str] = field(default_factory=set)
    """Ids of events that it answers 400."""
    location: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)

    async def take(self, request: Request) -> Response:
        body = await request.body()
        event = json.loads(body)
        assert request.headers["content-type"].startswith("application/cloudevents+json")
        self._verify(request, body)
        assert request.headers["webhook-id"] == event["id"]
        self.tried.append(event["id"])
        status = 400 if event["id"] in self.refused else self.status
        if status == 200:
            self.events.append(event)
        return Response(status_code=status, headers={"location": self.location})

    @staticmethod
    def _verify(request: Request, body: bytes) -> None:
        """Check the signature as receivers do, see Standard Webhooks."""
        id, timestamp = request.headers["webhook-id"], request.headers["webhook-timestamp"]
        assert abs(int(timestamp) - datetime.now(UTC).timestamp()) < 60
        signed = b".".join([id.encode(), timestamp.encode(), body])
        digest = hmac.new(SECRET, signed, hashlib.sha256).digest()
        version, _, given = request.headers["webhook-signature"].partition(",")
        assert (version, base64.b64decode(given)) == ("v1", digest)

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Run it; yield its URL."""
        app = Starlette(routes=[Route("/hook", self.take, methods=["POST"])])
        with serving(app) as address:
            yield f"http://{address}/hook"

    @property
    def ids(self) -> list[str]:
        return [event["id"] for event in self.events]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "PAUSE_S", 0.02)
    monkeypatch.setattr(pushing, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(pushing, "LONGEST_BACKOFF_S", 0.1)


def found(number: int) -> list[Row]:
    return [replace(ROW, id=uuid4(), number=i, time=datetime.now(UTC)) for i in range(number)]


def write(url: str, rows: Sequence[Row]) -> list[str]:
    """Write rows as the service does that pushes; return their ids."""
    with closing(AuditStore(url, push=True)) as store:
        store.migrate()
        store.insert(rows)
    return [str(row.id) for row in rows]


def queued(url: str) -> int:
    with closing(AuditStore(url, read_only=True)) as store, store.connect(5) as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(pushes)).scalar_one())


@contextmanager
def pusher(url: str, receiver: str) -> Iterator[Metrics]:
    """Run what pushes; yield its metrics."""
    metrics = Metrics()
    one = Push(url, receiver, SECRET, metrics)
    one.start()
    try:
        yield metrics
    finally:
        one.close()
        assert not one._thread.is_alive()


async def test_the_service_pushes_what_it_finds_and_no_text(url: str) -> None:
    receiver = Receiver()
    with receiver.serving() as hook:
        changes: dict[str, Any] = {"audit_url": SecretStr(url), "audit_text": True}
        changes |= {"audit_key": SecretStr("k" * 32), "push_url": hook}
        async with client_of(push_key=SecretStr(WRITTEN), **changes) as client:
            headers = {"x-request-id": "one"}
            body = {"inputs": [CLEAN, POISONED, UNFAMILIAR]}
            await client.post("/classify", json=body, headers=headers)
            await until(lambda: asyncio.sleep(0, len(receiver.events) == 2))
            await until_metric(client, "psim_push_pending", 0)
            line = 'psim_pushed_findings_total{outcome="delivered"}'
            assert await metric(client, line) == 2
    triggered, unfamiliar = sorted(receiver.events, key=lambda event: event["data"]["number"])
    assert (triggered["specversion"], triggered["type"]) == ("1.0", "psim.finding.v1")
    assert (triggered["source"], triggered["subject"]) == ("/psim-gateway/models/fake", "one")
    assert triggered["data"]["finding"] == "triggered"
    assert triggered["data"]["decision"] == "reject"
    assert (unfamiliar["data"]["finding"], unfamiliar["data"]["decision"]) == ("unfamiliar", "flag")
    said = json.dumps(receiver.events)
    assert not any(word in said for word in (POISONED, UNFAMILIAR, "hmac", '"text"'))


def test_what_fails_is_tried_again_with_the_same_id(url: str) -> None:
    receiver = Receiver(status=503)
    ids = write(url, found(3))
    with receiver.serving() as hook, pusher(url, hook) as metrics:
        value = metrics.registry.get_sample_value
        wait_for(lambda: len(receiver.tried) >= 6)
        assert not receiver.events
        assert value("psim_push_pending") == 3
        assert (value("psim_push_lag_seconds") or 0) > 0
        receiver.status = 200
        wait_for(lambda: queued(url) == 0)
    assert sorted(receiver.ids) == sorted(ids)
    assert (value("psim_pushed_findings_total", {"outcome": "failed"}) or 0) >= 6


def test_an_event_that_the_receiver_minds_holds_up_no_other(url: str) -> None:
    rows = found(4)
    receiver = Receiver(refused={str(rows[0].id)})
    ids = write(url, rows)
    with receiver.serving() as hook, pusher(url, hook):
        wait_for(lambda: sorted(receiver.ids) == sorted(ids[1:]))
        wait_for(lambda: receiver.tried.count(ids[0]) >= 3)
        assert queued(url) == 1
        receiver.refused.clear()
        wait_for(lambda: queued(url) == 0)
    assert sorted(receiver.ids) == sorted(ids)


def test_a_restart_loses_nothing(url: str) -> None:
    ids = write(url, found(3))
    with pusher(url, f"http://127.0.0.1:{free_port()}/hook") as metrics:
        failed = {"outcome": "failed"}
        value = metrics.registry.get_sample_value
        wait_for(lambda: (value("psim_pushed_findings_total", failed) or 0) >= 2)
    ids += write(url, found(2))
    receiver = Receiver()
    with closing(AuditStore(url)) as store, store.connect(5) as connection:
        connection.execute(sa.delete(leases))  # as if it had run out
    with receiver.serving() as hook, pusher(url, hook):
        wait_for(lambda: queued(url) == 0)
    assert sorted(receiver.ids) == sorted(ids)


def test_one_process_pushes_at_a_time(url: str) -> None:
    receiver = Receiver()
    ids = write(url, found(60))
    with receiver.serving() as hook, pusher(url, hook), pusher(url, hook), pusher(url, hook):
        wait_for(lambda: queued(url) == 0)
        ids += write(url, found(5))
        wait_for(lambda: queued(url) == 0)
    assert sorted(receiver.ids) == sorted(ids), "each of them once"


def test_the_lease_goes_to_another_process_when_it_ends(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "LEASE_S", 0.5)
    receiver = Receiver()
    ids = write(file, found(1))
    with receiver.serving() as hook:
        with pusher(file, hook):
            wait_for(lambda: receiver.ids == ids)
        ids += write(file, found(1))
        with pusher(file, hook):
            wait_for(lambda: receiver.ids == ids)


def test_a_redirect_is_not_followed(file: str) -> None:
    other = Receiver()
    ids = write(file, found(1))
    with other.serving() as elsewhere:
        receiver = Receiver(status=307, location=elsewhere)
        with receiver.serving() as hook, pusher(file, hook):
            wait_for(lambda: len(receiver.tried) >= 2)
    assert (other.tried, queued(file), {*receiver.tried}) == ([], 1, {*ids})


def test_only_findings_are_queued_and_only_if_they_are_to_be_pushed(url: str) -> None:
    clean = replace(ROW, id=uuid4(), finding=None, poisoned=False)
    write(url, [clean])
    with closing(AuditStore(url)) as store:
        store.insert(found(1))
    assert queued(url) == 0
    rows = found(1)
    write(url, rows)
    write(url, rows)
    assert queued(url) == 1, "a row that is written twice is queued once"
    with closing(AuditStore(url)) as store:
        store.purge(datetime.now(UTC) + timedelta(days=1), 10)  # a day goes when it has ended
    assert queued(url) == 0, "a row that is deleted is not pushed any more"


def test_a_failure_is_logged_once_and_without_the_address(
    file: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(file, found(1))
    with (
        socket.socket() as taken,  # nobody else can listen there, so the reason stays the same
        caplog.at_level(logging.ERROR, "service.audit.push"),
    ):
        taken.bind(("127.0.0.1", 0))
        receiver = f"http://127.0.0.1:{taken.getsockname()[1]}/hook?token=secret"
        with pusher(file, receiver) as metrics:
            value = metrics.registry.get_sample_value
            failed = {"outcome": "failed"}
            wait_for(lambda: (value("psim_pushed_findings_total", failed) or 0) >= 3)
    logged = [(one.getMessage(), vars(one)["error"]) for one in caplog.records]
    assert logged == [("findings cannot be pushed", "ClientConnectorError")]
    assert "secret" not in str([vars(record) for record in caplog.records])


def test_an_event_s_source_is_a_reference_whatever_the_model_s_name() -> None:
    event = cloud_event(replace(ROW, model="team/mood é"))
    assert event["source"] == "/psim-gateway/models/team%2Fmood%20%C3%A9"
    assert POISONED not in json.dumps(event)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"push_key": SecretStr(WRITTEN)}, "needs PSIM_AUDIT_URL and PSIM_PUSH_KEY"),
        ({"audit_url": SecretStr("sqlite:////a.db")}, "needs PSIM_AUDIT_URL and PSIM_PUSH_KEY"),
        (
            {"audit_url": SecretStr("sqlite:////a.db"), "push_key": SecretStr("s" * 40)},
            "PSIM_PUSH_KEY must be whsec_",
        ),
        (
            {"audit_url": SecretStr("sqlite:////a.db"), "push_key": SecretStr("whsec_c2hvcnQ=")},
            "24 random bytes or more",
        ),
        (
            {"audit_url": SecretStr("sqlite:////a.db"), "push_key": SecretStr("whsec_%%%")},
            "PSIM_PUSH_KEY must be whsec_",
        ),
    ],
)
def test_settings_that_cannot_be_pushed_with_are_refused(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValidationError, match=says):
        Settings(bundle=Path("unused"), push_url="https://hooks.example/in", **changes)
