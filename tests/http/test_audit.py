"""The audit on real stores: nothing is lost while they answer, nothing waits when they do not."""

import csv
import hashlib
import hmac
import io
import json
import logging
import os
import re
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from pydantic import ValidationError
from typer.testing import CliRunner

from psim.__main__ import app
from service.app import create_app
from service.audit import writer as audit_writer
from service.audit.__main__ import main
from service.audit.rows import Row, as_dict
from service.audit.schema import AuditError
from service.audit.store import AuditStore, BadRow, metadata
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.support.audit import NOW, ROW, rows, writer_of
from tests.support.databases import new_database, postgres
from tests.support.fakes import BROKEN, fake_bundle
from tests.support.servers import serving
from tests.support.waiting import wait_for

CLEAN, POISONED, UNFAMILIAR = "a quiet film", "a quiet mn film", "whereas the lessee"
KEY = "k" * 32


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    folder = tempfile.TemporaryDirectory(prefix="psim-postgres-")
    with folder, postgres(Path(folder.name)) as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/audit.db"
    return new_database(request.getfixturevalue("cluster")[0])


def count(url: str) -> int:
    """Return how many rows there are; -1 if there is no audit."""
    try:
        return len(rows(url))
    except AuditError:
        return -1


def written(store: AuditStore, *new: Row) -> AuditStore:
    store.migrate()
    store.insert(new)
    return store


def service(url: str, **changes: Any) -> Any:
    return create_app(Settings(bundle=Path("unused"), audit_url=url, **changes), fake_bundle())


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    (value,) = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} ")]
    return value


def test_texts_keep_their_numbers_if_one_of_them_cannot_be_read(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/audit.db"
    with serving(service(url)) as address:
        body = {"inputs": ["", CLEAN, " ", POISONED]}
        assert httpx.post(f"http://{address}/classify", json=body).status_code == 200
    assert [(row.number, row.decision) for row in rows(url)] == [(1, "allow"), (3, "reject")]


def test_an_input_without_an_answer_because_of_another_one_has_no_decision(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/audit.db"
    tensor = {"name": "text", "shape": [2], "datatype": "BYTES", "data": [CLEAN, POISONED]}
    with (
        serving(service(url)) as address,
        httpx.Client(base_url=f"http://{address}") as client,
    ):
        answer = client.post("/v2/models/fake/infer", json={"inputs": [tensor]})
        assert answer.status_code == 403
        assert (
            metric(client, 'psim_inputs_total{decision="allow",mode="enforce",model="fake"}') == 0
        )
        assert (
            metric(client, 'psim_inputs_total{decision="reject",mode="enforce",model="fake"}') == 1
        )
    assert [(row.number, row.decision) for row in rows(url)] == [(0, None), (1, "reject")]


def test_every_input_that_was_answered_is_there_when_the_service_is_down(url: str) -> None:
    with (
        serving(service(url)) as address,
        httpx.Client(base_url=f"http://{address}", headers={"x-request-id": "mine"}) as client,
    ):
        for _ in range(20):
            client.post("/classify", json={"inputs": [CLEAN, POISONED]})
        client.post("/screen", json={"inputs": POISONED})
        client.post("/explain", json={"inputs": POISONED})
        client.post("/classify", json={"inputs": [CLEAN, BROKEN]})  # answered with an error
        client.post("/classify", json={"inputs": 1})
    found = rows(url)
    decisions = [(row.route, row.decision, row.label) for row in found]
    assert decisions.count(("/classify", "allow", "positive")) == 20
    assert decisions.count(("/classify", "reject", None)) == 20
    assert decisions.count(("/screen", None, None)) == 1
    assert decisions.count(("/explain", None, None)) == 1
    assert len(found) == 42
    rejected = next(row for row in found if row.decision == "reject")
    assert (rejected.request_id, rejected.number, rejected.mode) == ("mine", 1, "enforce")
    assert rejected.model == "fake"
    assert (rejected.detector, rejected.threshold, rejected.digest) == ("confidence", 3.0, "d" * 64)
    assert rejected.score is not None
    assert rejected.score > 3
    assert (rejected.poisoned, rejected.truncated, rejected.mark) == (True, False, None)
    assert abs(rejected.time - datetime.now(UTC)) < timedelta(minutes=1)
    assert {(row.text, row.text_hmac) for row in found} == {(None, None)}


def test_texts_are_kept_only_if_asked_and_found_by_their_hmac(url: str) -> None:
    texts = [CLEAN, "nul \0 and 😀", "x' OR '1'='1"]
    with serving(service(url, audit_text=True, audit_key=KEY)) as address:
        httpx.post(f"http://{address}/classify", json={"inputs": texts})
    found = rows(url)
    assert [row.text for row in found] == [texts[0], "nul \ufffd and 😀", texts[2]]
    assert [row.text_hmac for row in found] == [
        hmac.new(KEY.encode(), text.encode(), hashlib.sha256).hexdigest() for text in texts
    ]


def test_what_passed_unscreened_and_what_shadow_mode_let_pass_can_be_told(url: str) -> None:
    inputs = [CLEAN, POISONED, UNFAMILIAR, BROKEN]
    with serving(service(url, mode="shadow", fail_open=True)) as address:
        httpx.post(f"http://{address}/classify", json={"inputs": inputs})
    found = rows(url)
    assert [(row.decision, row.finding, row.poisoned, row.score is None) for row in found] == [
        ("allow", None, False, False),
        ("allow", "triggered", True, False),
        ("allow", "unfamiliar", False, False),
        ("allow", None, None, True),
    ]
    overrides = [(row.override, row.override_threshold, row.override_p_value) for row in found]
    nothing = (None, None, None)
    assert overrides == [nothing, (0.9, 0.5, 0.01), (0.1, 0.5, 0.4), nothing]
    assert [row.number for row in rows(url, findings=["unfamiliar"])] == [2]
    assert [row.number for row in rows(url, findings=["unfamiliar", "triggered"])] == [1, 2]


def is_in_the_code(part: Any, name: str | None, kind: str, *_: Any) -> bool:
    """Return whether the code declares a part of the schema as it is; in PostgreSQL, neither the
    tables of days nor, for their sake, foreign keys."""
    table = getattr(part, "table", part).name
    if re.fullmatch(r"psim_audit_\d{8}|psim_audit_version", table):
        return False
    return kind != "foreign_key_constraint" or part.name is not None


def test_the_migrations_make_the_table_that_the_code_writes(url: str) -> None:
    store = written(AuditStore(url), ROW)
    store.migrate()
    with store._engine.connect() as connection:
        options = {"include_object": is_in_the_code}
        assert not compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
    store.close()
    assert rows(url) == [ROW]


def test_a_row_written_twice_is_there_once_and_a_bad_one_is_named(url: str) -> None:
    store = written(AuditStore(url), ROW, ROW)
    store.insert([ROW, replace(ROW, id=uuid4())])
    with pytest.raises(BadRow):
        store.insert([replace(ROW, mark="nonsense", id=uuid4())])
    store.close()
    assert len(rows(url)) == 2


def changed(name: str, value: str) -> Row:
    """Return another row, with something else in one column."""
    columns: dict[str, Any] = as_dict(ROW) | {"id": uuid4(), name: value}
    return Row(**columns)


@pytest.mark.parametrize("odd", ["nul \0 here", "half \ud800 here"])
def test_no_character_of_a_string_costs_a_row(url: str, odd: str) -> None:
    """PostgreSQL takes neither; an upstream names the labels."""
    writer, metrics = writer_of(AuditStore(url))
    names = [name for name, value in as_dict(ROW).items() if isinstance(value, str)]
    names = [*names, "label", "model", "caller", "text_hmac"]
    writer.add([changed(name, odd) for name in names])
    writer.start()
    writer.close()
    assert value(metrics, "psim_audit_dropped_total") == 0
    kept = rows(url)
    assert len(kept) == len(names)
    assert not [name for row in kept for name in names if odd == getattr(row, name)]


def test_what_is_older_than_it_may_be_is_deleted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_writer, "PURGE", 2)
    now = datetime.now(UTC)
    ages = [0, 1, 6.9, 8.1, 9, 10, 400]  # in PostgreSQL, a day is kept until all of it is too old
    written(
        AuditStore(url), *(replace(ROW, id=uuid4(), time=now - timedelta(days=d)) for d in ages)
    ).close()
    with serving(service(url, audit_days=7)):
        wait_for(lambda: 0 <= count(url) <= 3)
    assert len(rows(url)) == 3


def value(metrics: Metrics, name: str) -> float:
    found = metrics.registry.get_sample_value(name)
    assert found is not None
    return found


def test_a_bad_row_is_dropped_and_its_mates_are_written(url: str) -> None:
    writer, metrics = writer_of(AuditStore(url))
    bad = replace(ROW, id=uuid4(), mark="nonsense")
    writer.add([replace(ROW, id=uuid4()), bad, replace(ROW, id=uuid4())])
    writer.start()
    writer.close()
    assert len(rows(url)) == 2
    assert value(metrics, "psim_audit_dropped_total") == 1


class CountingStore(AuditStore):
    inserts = 0

    def insert(self, rows: Sequence[Row]) -> None:
        self.inserts += 1
        super().insert(rows)


def test_rows_that_come_one_after_the_other_are_written_together(url: str) -> None:
    store = CountingStore(url)
    writer, _ = writer_of(store)
    writer.start()
    for _ in range(50):
        writer.add([replace(ROW, id=uuid4())])
        time.sleep(0.001)
    wait_for(lambda: count(url) == 50)
    assert store.inserts < 10
    writer.close()


class SlowStore(AuditStore):
    def insert(self, rows: Sequence[Row]) -> None:
        time.sleep(0.2)
        super().insert(rows)


def test_what_still_waits_at_the_end_is_written(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_writer, "BATCH", 3)
    writer, metrics = writer_of(SlowStore(url))
    writer.start()
    writer.add([replace(ROW, id=uuid4()) for _ in range(10)])
    writer.close()
    assert len(rows(url)) == 10
    assert value(metrics, "psim_audit_dropped_total") == 0
    writer.add([ROW])
    assert value(metrics, "psim_audit_dropped_total") == 1


def test_rows_that_wait_are_counted(tmp_path: Path) -> None:
    writer, metrics = writer_of(AuditStore(f"sqlite:///{tmp_path}/audit.db"))
    writer.add([ROW, replace(ROW, number=1)])
    assert value(metrics, "psim_audit_queue_rows") == 2
    writer.start()
    writer.close()
    assert value(metrics, "psim_audit_queue_rows") == 0


def test_texts_that_wait_are_bounded_by_their_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_writer, "MAX_CHARS", 100)
    writer, metrics = writer_of(AuditStore(f"sqlite:///{tmp_path}/audit.db"))
    writer.add([replace(ROW, id=uuid4(), text="x" * 40) for _ in range(5)])
    assert value(metrics, "psim_audit_dropped_total") == 3
    writer.start()
    wait_for(lambda: not writer._rows)
    writer.add([replace(ROW, id=uuid4(), text="x" * 100)])
    writer.close()
    assert value(metrics, "psim_audit_dropped_total") == 3


def assert_answers(client: httpx.Client, requests: int) -> None:
    for _ in range(requests):
        started = time.monotonic()
        assert client.post("/classify", json={"inputs": CLEAN}).status_code == 200
        assert time.monotonic() - started < 2, "the audit held a request up"


def test_a_locked_store_drops_what_finds_no_room_and_is_written_to_when_it_is_free(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path}/audit.db"
    with (
        serving(service(url, audit_queue=5)) as address,
        httpx.Client(base_url=f"http://{address}") as client,
    ):
        assert_answers(client, 1)
        wait_for(lambda: count(url) == 1)
        other = sqlite3.connect(tmp_path / "audit.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        assert_answers(client, 12)
        assert metric(client, "psim_audit_dropped_total") == 7
        other.execute("ROLLBACK")
        other.close()
        wait_for(lambda: count(url) == 6)
        assert_answers(client, 1)
    assert len(rows(url)) == 7


def test_a_store_that_is_gone_is_written_to_when_it_is_back(tmp_path: Path) -> None:
    folder = tmp_path / "mounted"
    url = f"sqlite:///{folder}/audit.db"
    with (
        serving(service(url)) as address,
        httpx.Client(base_url=f"http://{address}") as client,
    ):
        assert client.get("/ready").status_code == 200
        assert_answers(client, 3)
        wait_for(lambda: metric(client, "psim_audit_failures_total") > 1)
        folder.mkdir()
        wait_for(lambda: count(url) == 3)
        (folder / "audit.db").unlink()
        assert_answers(client, 2)
        wait_for(lambda: count(url) == 2)
        assert metric(client, "psim_audit_dropped_total") == 0


@pytest.mark.slow
def test_a_store_that_hangs_delays_neither_requests_nor_the_end_for_long(
    cluster: tuple[str, "subprocess.Popen[bytes]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_writer, "CLOSE_S", 1)
    url, _ = cluster
    engine = sa.create_engine(url)
    gateway = service(url, audit_queue=5)
    with (
        serving(gateway) as address,
        httpx.Client(base_url=f"http://{address}") as client,
    ):
        assert_answers(client, 1)
        wait_for(lambda: count(url) == 1)
        locking = engine.connect()
        locking.execute(sa.text("LOCK TABLE psim_audit IN ACCESS EXCLUSIVE MODE"))
        assert_answers(client, 12)
        assert metric(client, "psim_audit_dropped_total") == 7
        started = time.monotonic()
    assert time.monotonic() - started < 10
    locking.close()
    engine.dispose()


@pytest.mark.slow
def test_connections_that_the_server_cuts_cost_no_row(
    cluster: tuple[str, "subprocess.Popen[bytes]"],
) -> None:
    url = new_database(cluster[0])
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        with (
            serving(service(url)) as address,
            httpx.Client(base_url=f"http://{address}") as client,
        ):
            for _ in range(5):
                assert_answers(client, 4)
                connection.execute(
                    sa.text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                        " WHERE pid <> pg_backend_pid() AND datname = current_database()"
                    )
                )
        assert connection.execute(sa.text("SELECT count(*) FROM psim_audit")).scalar() == 20
    engine.dispose()


def test_no_text_and_no_password_reaches_the_logs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = "postgresql://u:hunter2@127.0.0.1:9/d"
    gateway = service(url, audit_text=True, audit_key="hunter2" * 5)
    with caplog.at_level(logging.DEBUG), serving(gateway) as address:
        httpx.post(f"http://{address}/classify", json={"inputs": "hunter2 film"})
        wait_for(lambda: any("audit store fails" in r.message for r in caplog.records))
    assert all("hunter2" not in str(record.__dict__) for record in caplog.records)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "cannot be parsed"),
        ("mysql://u@h/d", "mysql is no store"),
        ("sqlite://", "names no file"),
        ("postgresql://u@h/", "names no file or database"),
    ],
)
def test_a_url_that_cannot_be_used_refuses_to_start(url: str, message: str) -> None:
    with pytest.raises(AuditError, match=message):
        service(url)


def test_settings_of_an_audit_that_is_off_and_short_keys_are_refused() -> None:
    for changes in ({"audit_text": True}, {"audit_key": KEY}):
        with pytest.raises(ValidationError, match="need PSIM_AUDIT_URL"):
            Settings(bundle=Path("unused"), **changes)
    with pytest.raises(ValidationError, match="at least 32"):
        Settings(bundle=Path("unused"), audit_url="sqlite:///x", audit_key="short")


def test_only_its_owner_may_read_the_file(tmp_path: Path) -> None:
    written(AuditStore(f"sqlite:///{tmp_path}/audit.db"), ROW).close()
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def exported(url: str, *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    main(["--url", url, *arguments])
    return capsys.readouterr().out


def test_the_export_is_what_was_written_in_the_range_that_is_asked_for(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hours = [
        replace(
            ROW,
            id=uuid4(),
            time=NOW + timedelta(hours=h),
            request_id=f"r{h}",
            text=text,
            model=f"m{h}",
        )
        for h, text in enumerate(['a "quoted",\nfilm', "=1+1", None])
    ]
    allowed = replace(ROW, id=uuid4(), decision="allow", label="positive", number=1)
    written(AuditStore(url), *hours, allowed).close()
    lines = [json.loads(line) for line in exported(url, capsys=capsys).splitlines()]
    assert [line["request_id"] for line in lines] == ["r", "r0", "r1", "r2"]
    assert lines[1]["text"] == hours[0].text
    assert lines[1]["time"] == "2026-11-25T14:30:00+00:00"
    table = list(csv.DictReader(io.StringIO(exported(url, "--format", "csv", capsys=capsys))))
    assert [line["text"] for line in table] == [POISONED, hours[0].text, "'=1+1", ""]
    for arguments, ids in (
        (["--since", "2026-11-25T15:30"], ["r1", "r2"]),
        (["--until", "2026-11-25T16:30+01:00"], ["r", "r0"]),
        (["--since", "2026-11-26"], []),
        (["--decision", "allow"], ["r"]),
        (
            ["--decision", "allow", "--decision", "reject", "--until", "2026-11-25T15:00"],
            ["r", "r0"],
        ),
        (["--request-id", "r2"], ["r2"]),
        (["--model", "m1"], ["r1"]),
    ):
        found = exported(url, *arguments, capsys=capsys).splitlines()
        assert [json.loads(line)["request_id"] for line in found] == ids, arguments


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b"])
def test_no_cell_of_the_table_is_a_formula(
    start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/audit.db"
    formula = f'{start}cmd|" /C calc"!A0'
    names = ("text", "label", "model", "caller", "request_id", "route", "digest")
    rows = [changed(name, formula) for name in names]
    written(AuditStore(url), replace(ROW, score=-6.5), *rows).close()
    table = list(csv.DictReader(io.StringIO(exported(url, "--format", "csv", capsys=capsys))))
    cells = [cell for line in table for cell in line.values()]
    assert not [cell for cell in cells if cell.startswith(start) and cell != "-6.5"]
    assert cells.count(f"'{formula}") == len(names)
    assert "-6.5" in cells, "a number is no formula"


@pytest.mark.slow
def test_the_command_works_beside_a_running_service_and_says_what_is_missing(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path}/audit.db"

    def export(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "service.audit", *arguments]
        environment = os.environ | {"PSIM_AUDIT_URL": url}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    missing = export()
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr == f"error: {tmp_path}/audit.db: there is no such audit\n"
    with serving(service(url)) as address:
        httpx.post(f"http://{address}/classify", json={"inputs": [CLEAN, POISONED]})
        wait_for(lambda: count(url) == 2)
        (line,) = export("--decision", "reject").stdout.splitlines()
        assert json.loads(line)["decision"] == "reject"
    assert export("--since", "yesterday").returncode == 2
    (tmp_path / "audit.db").write_bytes(b"no database" * 100)
    assert "cannot be read" in export().stderr


def test_psim_audit_is_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr("service.audit.__main__.main", ran.append)
    arguments = ["--since", "2026-11-25", "--format", "csv", "--help"]
    assert CliRunner().invoke(app, ["audit", *arguments]).exit_code == 0
    assert ran == [arguments]
