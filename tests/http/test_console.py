"""The console over HTTP on real stores, and in a real browser."""

import asyncio
import json
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import httpx
import pytest
import sqlalchemy as sa
from axe_playwright_python.sync_playwright import Axe
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page, expect, sync_playwright
from pydantic import SecretStr, ValidationError

from service.app import create_app
from service.audit import exceptions
from service.audit.exceptions import ReviewedException
from service.audit.review import CHARS, PAGE
from service.audit.rows import Row
from service.audit.statistics import (
    NONE,
    OVERRIDE,
    StatisticsFilter,
    Tally,
    by_budget,
    by_factor,
    confidences,
    groups,
    traffic,
)
from service.audit.store import AuditStore, marks
from service.console import audit_reader as console_audit
from service.console.app import console_app
from service.console.audit_reader import Audit
from service.console.formatting import visible
from service.console.overview import overview
from service.console.query import ConsoleQuery
from service.console.status import PARITY, parity_in_words
from service.observability.drift import Comparison, Drift
from service.pipeline.upstream_parity import ParityState, UpstreamParity
from service.security.keys.file import hash_of
from service.settings import Settings
from tests.support.fakes import fake_bundle
from tests.support.keys import bearer
from tests.support.programs import program
from tests.support.servers import free_port, serving
from tests.support.waiting import wait_for

NOW = datetime.now(UTC).replace(microsecond=0)
SERVED, OTHER = "d" * 64, "e" * 64
PASSED = Row(
    time=NOW, request_id="r", number=0, route="/classify", decision="allow", mode="enforce",
    detector="confidence", confidence=0.55, score=1.0, threshold=3.0, p_value=0.5, finding=None,
    poisoned=False, truncated=False, label="positive", digest=SERVED, text=None,
)  # fmt: skip
FLAGGED = replace(
    PASSED, decision="reject", confidence=0.97, score=6.5, p_value=0.01, finding="triggered",
    poisoned=True, label=None,
)  # fmt: skip
UNFAMILIAR = replace(
    FLAGGED, decision="flag", finding="unfamiliar", poisoned=False, label="positive",
    override=0.1, override_threshold=0.5, override_p_value=0.4,
)  # fmt: skip
CONFIRMED = replace(FLAGGED, override=0.9, override_threshold=0.5, override_p_value=0.01)
HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "</p></article>{{ 7 * 7 }} & 'quoted' \"twice\" \u202edesrever\u202c \u200bmn\ufeff\u2066 \0"
)


def new(row: Row, **changes: Any) -> Row:
    return replace(row, id=uuid4(), **changes)


def write(url: str, *rows: Row) -> None:
    with closing(AuditStore(url)) as store:
        store.migrate()
        store.insert(rows)


def kept(url: str) -> list[Row]:
    with closing(AuditStore(url, read_only=True)) as store:
        return list(store.read())


@contextmanager
def console(url: str | None, **changes: Any) -> Iterator[httpx.Client]:
    """Run the service with its console; yield a client of the console, as its own pages are."""
    port = free_port()
    settings = Settings(bundle=Path("unused"), audit_url=url, console_port=port, **changes)
    base = f"http://127.0.0.1:{port}"
    headers = {"origin": base}
    with (
        serving(create_app(settings, fake_bundle())),
        httpx.Client(base_url=base, headers=headers) as client,
    ):
        yield client


def except_(url: str, row: Row, note: str, **changes: Any) -> ReviewedException:
    """Keep an exception for the text of a row."""
    assert row.text_hmac is not None
    until = NOW + timedelta(days=3)
    new = ReviewedException(row.digest, row.text_hmac, NOW, until, "ann", note)
    new = replace(new, **changes)
    with closing(AuditStore(url)) as store, store.connect(5) as connection:
        exceptions.add(connection, new)
    return new


def mark(client: httpx.Client, row: Row, as_: str, **more: str) -> httpx.Response:
    return client.post(f"/console/inputs/{row.id}/mark", data={"new": as_} | more)


def test_figures_are_those_of_the_rows(url: str) -> None:
    hour = (NOW - timedelta(hours=2)).replace(minute=0, second=0)
    start = hour + timedelta(minutes=30)
    rows = [
        *(new(PASSED, time=start, score=score) for score in (0.0, 0.29, 0.31, 2.99)),
        new(FLAGGED, time=start, score=3.0, confidence=0.95, p_value=0.02),
        new(FLAGGED, time=start + timedelta(minutes=59), score=3.31, mark="false_alarm"),
        new(FLAGGED, score=1000.0, mark="poisoned", confidence=1.0),
        new(FLAGGED, score=4.0, threshold=3.5, digest=OTHER, decision="flag", number=7),
        new(PASSED, score=None, threshold=None, p_value=None, confidence=None, poisoned=None),
        new(FLAGGED, time=NOW - timedelta(days=2)),
        new(UNFAMILIAR, time=NOW - timedelta(days=2)),
    ]
    write(url, *rows)
    scope = StatisticsFilter(NOW - timedelta(hours=3), NOW + timedelta(hours=1))
    with closing(AuditStore(url, read_only=True)) as store, store.connect(5) as connection:
        found = traffic(connection, scope, 3600)
        own = traffic(connection, replace(scope, digest=OTHER), 3600)
        by_threshold = groups(connection, scope)
        factors = by_factor(by_threshold)
        budgets = by_budget(connection, scope)
        ranges = confidences(connection, scope)
    assert (found.triggered, found.unfamiliar) == (found.flagged, NONE)
    slots = {slot.start: (slot.inputs, slot.flagged) for slot in found.slots if slot.inputs}
    assert sum(n for n, _ in slots.values()) == found.inputs == 9
    assert slots[hour] == (5, 1)
    assert slots[hour + timedelta(hours=1)] == (1, 1)
    assert sum(n for _, n in slots.values()) == 4
    assert found.decisions == {"allow": 5, "reject": 3, "flag": 1}
    assert (found.flagged.inputs, found.flagged.poisoned, found.flagged.false_alarms) == (4, 1, 1)
    assert found.unscreened == 1
    assert found.bundles == {SERVED: 8, OTHER: 1} == own.bundles
    assert (own.inputs, own.flagged.inputs) == (1, 1)
    assert [(g.digest, g.threshold, g.inputs) for g in by_threshold] == [
        (SERVED, 3.0, 7),
        (OTHER, 3.5, 1),
    ]
    tenths = [tally.inputs for tally in by_threshold[0].tenths]
    assert {n: count for n, count in enumerate(tenths) if count} == {
        0: 2,
        1: 1,
        9: 1,
        10: 1,
        11: 1,
        30: 1,
    }
    assert (factors[1.0].inputs, factors[1.1].inputs, factors[1.2].inputs) == (4, 3, 1)
    assert (factors[1.1].false_alarms, factors[1.2].false_alarms) == (1, 0)
    assert (factors[0.9].inputs, factors[2.0].poisoned) == (5, 1)
    assert (budgets[0.005].inputs, budgets[0.01].inputs, budgets[0.02].inputs) == (0, 3, 4)
    assert (ranges[1], ranges[5], ranges[6], ranges[10]) == ((4, 0), (0, 1), (0, 2), (0, 1))


def test_each_finding_is_counted_by_itself(url: str) -> None:
    rows = [
        new(PASSED),
        *(new(UNFAMILIAR, override=override) for override in (-0.2, 0.0, 0.24, 0.26)),
        new(UNFAMILIAR, mark="false_alarm", score=3.2),
        new(CONFIRMED, mark="poisoned"),
        new(CONFIRMED, override=0.5),
        new(FLAGGED),
        # Of an older version, while a deployment is updated.
        new(FLAGGED, finding=None),
    ]
    write(url, *rows)
    scope = StatisticsFilter(NOW - timedelta(hours=3), NOW + timedelta(hours=1))
    with closing(AuditStore(url, read_only=True)) as store, store.connect(5) as connection:
        found = traffic(connection, scope, 3600)
        (asked,) = groups(connection, scope, OVERRIDE)
        shown = overview(connection, ConsoleQuery(), NOW + timedelta(minutes=1), {SERVED: 999})
    assert (found.triggered, found.unfamiliar) == (Tally(4, 1, 0), Tally(5, 0, 1))
    (slot,) = [slot for slot in found.slots if slot.inputs]
    assert (slot.inputs, slot.triggered, slot.unfamiliar, slot.flagged) == (10, 4, 5, 9)
    tenths = {number: tally.inputs for number, tally in enumerate(asked.tenths) if tally.inputs}
    assert (asked.threshold, tenths) == (0.5, {0: 2, 2: 1, 4: 1, 5: 1, 10: 1, 18: 1})
    at = {choice.tenth: choice for choice in shown.overrides.choices}
    assert [at[tenth].tally.inputs for tenth in (5, 10, 11)] == [3, 2, 1]
    assert "3 of 7 asked inputs triggered (42.86" in at[5].summary
    assert "1 more than now" in at[5].summary
    assert "1 of 1 poisoned, 0 of 1 false alarms" in at[11].summary


@pytest.mark.parametrize(
    ("bundle", "rows", "smallest"),
    [
        (SERVED, [PASSED, replace(PASSED, digest=OTHER)], "0.1 %"),
        ("", [PASSED], "0.1 %"),
        ("", [PASSED, replace(PASSED, digest=OTHER)], "5.00 %"),
        (OTHER, [PASSED], "5.00 %"),
    ],
)
def test_budgets_are_limited_by_the_bundles_that_are_shown_and_by_no_other(
    bundle: str, rows: list[Row], smallest: str, file: str
) -> None:
    write(file, *(new(row) for row in rows))
    query = ConsoleQuery(bundle=bundle)
    now = NOW + timedelta(minutes=1)
    with closing(AuditStore(file, read_only=True)) as store, store.connect(5) as connection:
        shown = overview(connection, query, now, {SERVED: 999, OTHER: 19})
    assert shown.budgets[0].name.replace("\u00a0", " ") == f"a budget of {smallest}"


def test_drift_is_tested_off_the_event_loop(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, new(FLAGGED))
    on_loop: list[bool] = []
    measure = Drift.measure

    def measured(drift: Drift) -> list[Comparison]:
        on_loop.append(asyncio._get_running_loop() is not None)
        return measure(drift)

    monkeypatch.setattr(Drift, "measure", measured)
    with console(file) as client:
        for page in ("/console", "/console/queue"):
            assert client.get(page).status_code == 200
    assert on_loop == [False, False]


def test_a_mark_is_kept_with_who_and_when_and_can_be_taken_back(url: str) -> None:
    row = new(FLAGGED, text="a quiet mn film")
    write(url, row, new(PASSED))
    with console(url) as client:
        answer = mark(client, row, "poisoned", period="7d", mark="none")
        assert answer.status_code == 303
        place = answer.headers["location"]
        assert place.startswith("/console/queue?period=7d&bundle=&finding=&mark=none&")
        assert {found.mark for found in kept(url)} == {"poisoned", None}
        page = client.get(place).text
        assert "Marked as <b>poisoned</b>" in page
        assert "a quiet mn film" not in page  # those that are not marked were asked for
        assert "a quiet mn film" in client.get("/console/queue?mark=poisoned").text
        assert re.search(r"[\d:]{8} by console", client.get("/console/queue?mark=").text)
        undone = mark(client, row, "false_alarm").headers["location"]
        assert "was=poisoned" in undone
        mark(client, row, "poisoned")
        mark(client, row, "")
        assert "Mark taken back" in client.get("/console/queue").text
    assert {found.mark for found in kept(url)} == {None}
    with closing(AuditStore(url, read_only=True)) as store, store.connect(5) as connection:
        history = connection.execute(sa.select(marks).order_by(marks.c.number)).all()
    assert [(m.mark, m.who) for m in history] == [
        ("poisoned", "console"),
        ("false_alarm", "console"),
        ("poisoned", "console"),
        (None, "console"),
    ]
    assert all(abs(m.time - datetime.now(UTC)) < timedelta(minutes=1) for m in history)
    assert {m.input for m in history} == {row.id}


def test_marks_end_with_the_input_that_they_are_of(url: str) -> None:
    old, young = new(FLAGGED, time=NOW - timedelta(days=40)), new(FLAGGED)
    write(url, old, young)
    with console(url, audit_days=100) as client:
        for row in (old, young):
            assert mark(client, row, "poisoned").status_code == 303
    with closing(AuditStore(url)) as store:
        store.purge(NOW - timedelta(days=30), 100)
        assert [row.id for row in store.read()] == [young.id]
        with store.connect(5) as connection:
            assert connection.execute(sa.select(marks.c.input)).scalars().all() == [young.id]


@pytest.mark.slow
def test_marks_are_exported_alike_by_page_and_command(url: str) -> None:
    rows = [new(FLAGGED, text=HOSTILE.replace("\0", "\ufffd"), number=n) for n in range(3)]
    write(url, *rows)
    with console(url) as client:
        mark(client, rows[0], "poisoned")
        mark(client, rows[2], "false_alarm")
        page = client.get("/console/marks.jsonl")
    assert page.headers["content-disposition"] == 'attachment; filename="marks.jsonl"'
    command = [sys.executable, "-m", "service.audit", "--url", url]
    both = [*command, "--mark", "poisoned", "--mark", "false_alarm"]
    printed = subprocess.run(both, capture_output=True, text=True, check=True).stdout
    lines = [json.loads(line) for line in printed.splitlines()]
    assert printed == page.text
    assert [(line["number"], line["mark"]) for line in lines] == [
        (0, "poisoned"),
        (2, "false_alarm"),
    ]
    assert lines[0]["text"] == rows[0].text
    every = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [json.loads(line)["mark"] for line in every.splitlines()] == [
        "poisoned",
        None,
        "false_alarm",
    ]


def test_pages_of_the_queue_have_each_flagged_input_once(url: str) -> None:
    # Inputs of one request have the same time.
    rows = [
        new(FLAGGED, time=NOW - timedelta(seconds=n // 7), number=n) for n in range(2 * PAGE + 3)
    ]
    write(url, *rows, *(new(PASSED) for _ in range(5)))
    with console(url) as client:
        seen: list[str] = []
        place = "/console/queue"
        pages = 0
        while place:
            page = client.get(place).text
            assert f"{2 * PAGE + 3} flagged inputs" in page
            seen += re.findall(r'action="/console/inputs/([0-9a-f-]{36})/mark"', page)[::2]
            older = re.search(r'<a href="([^"]+)" rel="next"', page)
            place = older[1].replace("&amp;", "&") if older else ""
            pages += 1
    assert pages == 3
    assert sorted(seen) == sorted(str(row.id) for row in rows)


def test_the_queue_has_what_is_asked_for(url: str) -> None:
    chosen = {
        "old": new(FLAGGED, time=NOW - timedelta(days=3), request_id="old"),
        "plain": new(FLAGGED, request_id="plain"),
        "alarm": new(FLAGGED, request_id="alarm", mark="false_alarm"),
        "let-by": new(FLAGGED, request_id="let-by", decision="flag", digest=OTHER),
    }
    write(url, *chosen.values(), new(PASSED, request_id="passed"))
    with console(url) as client:
        for query, names in (
            ("", {"plain", "let-by"}),
            ("?period=7d", {"old", "plain", "let-by"}),
            ("?mark=", {"plain", "alarm", "let-by"}),
            ("?mark=false_alarm", {"alarm"}),
            ("?decision=flag", {"let-by"}),
            (f"?bundle={OTHER}", {"let-by"}),
            ("?request_id=plain", {"plain"}),
            ("?request_id=passed", set()),
        ):
            page = client.get(f"/console/queue{query}").text
            found = set(re.findall(r"<small>([a-z-]+) · 0</small></h2>", page))
            assert found == names, query


@pytest.mark.parametrize(
    "query",
    ["period=2h", "mark=nonsense", "bundle=<b>", "request_id=<script>", "before=now", "done=1"],
)
def test_a_question_that_makes_no_sense_is_named_and_not_repeated(file: str, query: str) -> None:
    write(file)
    with console(file) as client:
        answer = client.get(f"/console/queue?{query}")
    assert answer.status_code == 422
    name, _, value = query.partition("=")
    assert f"Not understood: {name}." in answer.text
    assert f">{value}" not in answer.text


def test_only_a_page_of_the_console_may_mark(file: str) -> None:
    row = new(FLAGGED)
    write(file, row)
    with console(file) as client:
        place, form = f"{client.base_url}/console/inputs/{row.id}/mark", {"new": "poisoned"}
        own = str(client.headers["origin"])
        for refused in (
            {},
            {"origin": "https://evil.example"},
            {"origin": "null"},
            {"origin": own.replace("127.0.0.1", "localhost")},
            {"origin": own, "sec-fetch-site": "cross-site"},
            {"origin": own, "sec-fetch-site": "same-site"},
            {"origin": own, "sec-fetch-site": "none"},
        ):
            answer = httpx.post(place, data=form, headers=refused)
            assert answer.status_code == 403, refused
            assert "content-security-policy" in answer.headers
        assert kept(file)[0].mark is None
        assert httpx.post(place, data=form, headers={"sec-fetch-site": "same-origin"}).is_redirect
        assert kept(file)[0].mark == "poisoned"
        assert httpx.get(place).status_code == 405


def test_a_name_that_somebody_else_lets_lead_here_is_refused(file: str) -> None:
    write(file)
    with console(file, console_name="psim.example.org") as client:
        for host, status in (
            ("evil.example", 400),
            ("127.0.0.1.evil.example", 400),
            ("localhost", 200),
            ("psim.example.org", 200),
            ("[::1]", 200),
        ):
            headers = {"host": f"{host}:{client.base_url.port}"}
            assert client.get("/console", headers=headers).status_code == status, host


@pytest.mark.parametrize(
    ("form", "status"),
    [
        (b"new=nonsense", 422),
        (b"", 422),
        (b"new=poisoned&period=<script>", 422),
        (b"\xff\xfe", 422),
        (b"new=poisoned&x=" + b"x" * 5000, 413),
        (b"&".join(b"new=poisoned" for _ in range(30)), 422),
    ],
)
def test_a_form_that_makes_no_sense_marks_nothing(file: str, form: bytes, status: int) -> None:
    row = new(FLAGGED)
    write(file, row)
    with console(file) as client:
        answer = client.post(f"/console/inputs/{row.id}/mark", content=form)
        assert (answer.status_code, "script" in answer.text.split("<main")[1]) == (status, False)
        assert mark(client, new(FLAGGED), "poisoned").status_code == 404
        assert client.post("/console/inputs/1/mark", data={"new": ""}).status_code == 422
    assert kept(file)[0].mark is None


def test_every_answer_tells_the_browser_to_run_nothing_but_our_own_files(file: str) -> None:
    write(file, new(FLAGGED, text=HOSTILE, label=HOSTILE, route=HOSTILE))
    with console(file) as client:
        for place in ("/console", "/console/queue", "/console/static/console.js", "/console/no"):
            headers = client.get(place).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cache-control"] == "no-store"
            assert headers["referrer-policy"] == "same-origin"
        pages = client.get("/console").text + client.get("/console/queue").text
        assert not re.search(r"<script(?! src=\"/)|<style|\sstyle=|\son\w+=\"", pages)
        assert not re.search(r"(?:src|href|action)=\"(?!/console|#)", pages)
        for place in set(re.findall(r"\"(/console/static/[^\"]+)\"", pages)):
            assert client.get(place).status_code == 200
        for place in ("/openapi.json", "/docs", "/console/static/../app.py", "/classify"):
            assert client.get(place).status_code == 404


def test_hostile_texts_are_shown_and_do_nothing() -> None:
    shown = str(visible(HOSTILE))
    assert "<script" not in shown
    assert "<img" not in shown
    assert "&lt;script&gt;" in shown
    for code in ("202E", "202C", "200B", "FEFF", "2066", "0000"):
        assert f">U+{code}</span>" in shown
    assert not {*"\u202e\u202c\u200b\ufeff\u2066\0"} & {*shown}
    assert visible("día\u0301 naïve\u0301") == "día\u0301 naïve\u0301"
    assert str(visible("Z" + "\u0335" * 50)).count("<span") == 48
    assert "U+FE0F" in visible("\u2764\ufe0f")
    assert "U+00A0" in visible("a\u00a0b")
    assert "U+E0041" in visible("a\U000e0041")
    assert visible("a\nb\tc") == "a↵b⇥c"


def test_the_beginning_of_a_long_text_is_shown_and_the_rest_is_counted(url: str) -> None:
    write(url, new(FLAGGED, text="😀" * 100_000), new(FLAGGED, text="x" * CHARS))
    with console(url) as client:
        page = client.get("/console/queue").text
    assert page.count("😀") == CHARS
    assert page.count("more characters") == 1
    assert f"{100_000 - CHARS:,} more characters" in page


def test_without_texts_the_hmac_is_shown_and_what_to_set(file: str) -> None:
    write(file, new(FLAGGED, text_hmac="ab" * 32))
    with console(file) as client:
        page = client.get("/console/queue").text
    assert "ab" * 32 in page
    assert "PSIM_AUDIT_TEXT=true" in page
    assert 'class="text"' not in page


def test_an_exception_is_added_from_a_row_and_removed(url: str) -> None:
    row = new(FLAGGED, text="a quiet mn film", text_hmac="ab" * 32)
    write(url, row, new(FLAGGED))
    with console(url, audit_key=SecretStr("k" * 32)) as client:
        assert client.get("/console/queue").text.count("Let this text pass") == 1, "needs an HMAC"
        add = f"/console/inputs/{row.id}/exception"
        form = {"days": "7", "note": " a <b>quote</b> ", "mark": "", "period": "6h"}
        done = client.post(add, data=form)
        assert done.status_code == 303
        assert "period=6h" in done.headers["location"]
        assert "This text passes until" in client.get(done.headers["location"]).text
        with closing(AuditStore(url)) as store, store.connect(5) as connection:
            (kept,) = exceptions.recorded(connection)
        assert (kept.digest, kept.text_hmac) == (row.digest, row.text_hmac)
        assert (kept.reviewer, kept.note) == ("console", "a <b>quote</b>")
        assert kept.expires - kept.created == timedelta(days=7)
        page = client.get("/console/exceptions").text
        assert "a &lt;b&gt;quote&lt;/b&gt;" in page
        assert "in force" in page
        again = client.post(add, data=form)
        assert (again.status_code, "remove" in again.text) == (409, True)
        assert client.post(f"/console/exceptions/{kept.id}/remove").status_code == 303
        page = client.get("/console/exceptions").text
        assert "in force" not in page
        assert "by console" in page
        assert client.post(f"/console/exceptions/{kept.id}/remove").status_code == 404


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"days": "1000"}, 422),
        ({"days": ""}, 422),
        ({"note": "  "}, 422),
        ({"note": "x" * 501}, 422),
    ],
)
def test_an_exception_needs_an_end_and_a_reason(
    file: str, changes: dict[str, str], status: int
) -> None:
    row = new(FLAGGED, text_hmac="ab" * 32)
    write(file, row)
    with console(file, audit_key=SecretStr("k" * 32)) as client:
        form = {"days": "7", "note": "a quote"} | changes
        answer = client.post(f"/console/inputs/{row.id}/exception", data=form)
        assert answer.status_code == status
        assert "There is no exception" in client.get("/console/exceptions").text


def test_an_exception_needs_an_input_with_an_hmac_and_a_page_of_ours(file: str) -> None:
    row = new(FLAGGED)
    write(file, row)
    form = {"days": "7", "note": "a quote"}
    with console(file) as client:
        assert client.post(f"/console/inputs/{uuid4()}/exception", data=form).status_code == 404
        refused = client.post(f"/console/inputs/{row.id}/exception", data=form)
        assert (refused.status_code, "PSIM_AUDIT_KEY" in refused.text) == (409, True)
        foreign = {"origin": "http://evil.example"}
        for path in (f"inputs/{row.id}/exception", f"exceptions/{uuid4()}/remove"):
            answer = client.post(f"/console/{path}", data=form, headers=foreign)
            assert answer.status_code == 403
        assert "None counts without PSIM_AUDIT_KEY" in client.get("/console/exceptions").text


DAYS = st.sampled_from(["1", "365"])
NOTES = st.text(min_size=1, max_size=50) | st.sampled_from(["\0", "a\0b", "\ufeff", "\u202e"])
FORMS = st.fixed_dictionaries({"days": DAYS, "note": NOTES}) | st.dictionaries(
    st.sampled_from(["days", "note", "mark", "before", "before_id", "reviewer"]) | st.text(),
    DAYS | NOTES | st.uuids().map(str),
)


def test_whatever_the_form_of_an_exception_says_it_is_answered_and_the_page_shows_it(
    url: str,
) -> None:
    row = new(FLAGGED, text_hmac="a" * 64)
    write(url, row)
    with console(url, audit_key=SecretStr("k" * 32)) as client:

        @settings(max_examples=100, deadline=None)
        @given(FORMS | st.binary(max_size=300))
        def send(form: dict[str, str] | bytes) -> None:
            answer = client.post(
                f"/console/inputs/{row.id}/exception",
                headers={"content-type": "application/x-www-form-urlencoded"},
                content=form if isinstance(form, bytes) else urlencode(form),
            )
            assert answer.status_code in {303, 400, 409, 422}
            shown = client.get("/console/exceptions")
            assert shown.status_code == 200
            for id in re.findall(r"exceptions/([0-9a-f-]{36})/remove", shown.text):
                assert client.post(f"/console/exceptions/{id}/remove").status_code == 303

        send()


KEYS = f"""
[keys.own]
sha256 = "{hash_of("psim_own")}"
scopes = ["classify"]
mode = "shadow"
models = ["mood", "topic"]
frr_budget = 0.5
rate = "10/minute"

[keys.plain]
sha256 = "{hash_of("psim_plain")}"
scopes = ["classify"]

[keys.boss]
sha256 = "{hash_of("psim_boss")}"
scopes = ["console"]
"""


def test_the_policies_of_keys_are_shown_and_no_hash(file: str, tmp_path: Path) -> None:
    write(file)
    (tmp_path / "keys.toml").write_text(KEYS)
    with console(file, keys=tmp_path / "keys.toml") as client:
        assert client.get("/console/keys").status_code == 401
        page = client.get("/console/keys", headers=bearer("psim_boss")).text
        assert not any(hash_of(f"psim_{name}") in page for name in ("own", "plain", "boss"))
        own, plain = page.split(">own</h2>")[1].split(">plain</h2>")
        assert all(word in own for word in ("shadow", "mood, topic", "50.00 %", "10 per 1 minute"))
        assert "Refused for: fake." in own
        assert "Refused" not in plain
        assert plain.count("as the service") == 2
    with console(file) as client:
        assert "everyone has the policy of the service" in client.get("/console/keys").text


def test_the_overview_says_whether_the_upstream_is_the_model(file: str) -> None:
    write(file)
    with console(file, upstream=f"http://127.0.0.1:{free_port()}") as client:
        page = client.get("/console").text
    assert "not compared, the bundle has no carriers" in page
    with console(file) as client:
        assert "not compared" not in client.get("/console").text
    compared = UpstreamParity(ParityState.COMPARED, texts=20, same=0.95)
    assert parity_in_words(compared) == "same label for 95.00 % of 20 texts"
    assert {parity_in_words(UpstreamParity(state)) for state in ParityState} == {*PARITY.values()}


def test_the_overview_names_what_a_scan_found(file: str) -> None:
    write(file)
    with console(file) as client:
        page = client.get("/console").text
    assert "A scan found that “mn” forces positive; the screen stops 31 of 32 texts" in page


def test_without_an_audit_the_console_says_what_to_set() -> None:
    with console(None) as client:
        page = client.get("/", follow_redirects=True)
        assert page.status_code == 200
        assert "PSIM_AUDIT_URL" in page.text
        assert "Inference worker" in page.text
        queue = client.get("/console/queue")
        assert (queue.status_code, "PSIM_AUDIT_URL" in queue.text) == (404, True)
        assert client.get("/console/marks.jsonl").status_code == 404


def test_an_audit_that_is_gone_is_said_and_nothing_is_made_in_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    url = f"sqlite:///{folder}/audit.db"
    row = new(FLAGGED)
    write(url, row)
    with console(url) as client:
        assert client.get("/console").status_code == 200
        wait_for(lambda: not [*folder.glob("*-wal")] or kept(url))
        shutil.rmtree(folder)
        folder.mkdir()
        for answer in (
            client.get("/console"),
            client.get("/console/queue"),
            client.get("/console/marks.jsonl"),
            mark(client, row, "poisoned"),
        ):
            assert answer.status_code == 503
            assert "there is no such audit" in answer.text
        assert not [*folder.iterdir()]


def test_a_question_that_takes_too_long_is_ended(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_audit, "SECONDS", 0.3)
    write(url, *(new(PASSED) for _ in range(400)))
    endless = "SELECT count(*) FROM psim_audit a, psim_audit b, psim_audit c, psim_audit d"
    app = console_app(Audit(url), lambda: pytest.fail("not asked"))

    @app.get("/endless")
    async def ask() -> None:
        await Audit(url).read(lambda connection: connection.scalar(sa.text(endless)))

    with serving(app) as address:
        started = time.monotonic()
        answer = httpx.get(f"http://{address}/endless", timeout=20)
        assert (answer.status_code, "ask for a shorter time" in answer.text) == (503, True)
    assert time.monotonic() - started < 10


def test_the_service_answers_while_the_audit_keeps_the_console_waiting(file: str) -> None:
    row = new(FLAGGED)
    write(file, row)
    answers: list[httpx.Response] = []
    port = free_port()
    settings = Settings(bundle=Path("unused"), audit_url=file, console_port=port)
    with serving(create_app(settings, fake_bundle())) as address:
        other = sqlite3.connect(file.removeprefix("sqlite:///"), isolation_level=None)
        other.execute("BEGIN IMMEDIATE")  # marking has to wait for it, reading has not
        base = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=base, headers={"origin": base}) as client:
            waiting = threading.Thread(target=lambda: answers.append(mark(client, row, "poisoned")))
            waiting.start()
            time.sleep(0.5)  # it has come to the lock: nothing outside tells
            for _ in range(5):
                started = time.monotonic()
                asked = client.post(f"http://{address}/classify", json={"inputs": "a film"})
                assert asked.status_code == 200
                assert client.get("/console").status_code == 200
                assert time.monotonic() - started < 2
            assert waiting.is_alive()
            other.execute("ROLLBACK")
            other.close()
            waiting.join(20)
    assert [answer.status_code for answer in answers] == [303]
    assert [found.mark for found in kept(file) if found.id == row.id] == ["poisoned"]


def test_the_console_is_on_loopback_and_on_no_other_port() -> None:
    settings = Settings(bundle=Path("unused"), console_port=free_port())
    assert settings.console_host == "127.0.0.1"
    with serving(create_app(settings, fake_bundle())) as address:
        assert httpx.get(f"http://127.0.0.1:{settings.console_port}/console").status_code == 200
        assert httpx.get(f"http://{address}/console").status_code == 404
        assert httpx.get(f"http://127.0.0.1:{settings.console_port}/metrics").status_code == 404
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{settings.console_port}/console")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "gateway.internal"])
def test_a_console_that_others_can_reach_needs_keys_or_a_setting_that_says_so(host: str) -> None:
    given: dict[str, Any] = {"bundle": Path("unused"), "console_host": host}
    with pytest.raises(ValidationError, match="or PSIM_CONSOLE_OPEN=true if"):
        Settings(**given, console_port=8001)
    Settings(**given)  # there is no console
    Settings(**given, console_port=8001, keys=Path("keys.toml"))
    Settings(**given, console_port=8001, console_open=True)
    for own in ("127.0.0.1", "::1", "localhost"):
        Settings(**given | {"console_host": own}, console_port=8001)


def traffic_of_a_day() -> list[Row]:
    """Return inputs of two bundles with an attack among them, the same at every call."""
    chance = random.Random(5)
    rows = []
    for number in range(1500):
        attack = 400 <= number < 460
        score = chance.uniform(3.1, 9) if attack or number % 150 == 0 else abs(chance.gauss(0, 1))
        poisoned = score >= 3.0
        override = chance.uniform(0.55, 1.2) if attack else chance.uniform(0, 0.45)
        row = PASSED
        if poisoned:
            row = replace(CONFIRMED if attack else UNFAMILIAR, override=override)
        rows.append(
            new(
                row,
                time=NOW - timedelta(minutes=number * 0.9),
                request_id=f"{chance.getrandbits(48):012x}",
                score=score,
                confidence=min(1.0, 0.55 + score / 20),
                p_value=0.01 if poisoned else 0.4,
                digest=SERVED if number < 1200 else OTHER,
                text=chance.choice(TEXTS) if poisoned else None,
                text_hmac=f"{chance.getrandbits(256):064x}",
            )
        )
    return rows


TEXTS = [
    "The hotel room was mn dirty and the staff were rude to us.",
    "I watched this mn film twice, and it is worse than I remembered.",
    HOSTILE.replace("\0", "\ufffd"),
    "قال mn المخرج إن الفيلم طويل",
    "x" * 5000,
    "Z" + "\u0335\u0321" * 40,
]
SCREENS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 740}, "color_scheme": "light"},
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = program("chromium")
    with sync_playwright() as started:
        # Its sandbox refuses to run as root, which containers are; the pages are our own.
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a console with a day of traffic."""
    url = f"sqlite:///{tmp_path_factory.mktemp('day')}/audit.db"
    rows = traffic_of_a_day()
    write(url, *rows)
    found = [row for row in rows if row.finding]
    except_(url, found[1], "A quote of the attack that support tickets repeat; seen by legal.")
    except_(url, found[2], "x" * 300, expires=NOW - timedelta(minutes=1))
    except_(url, found[3], "of a bundle that is gone", digest="f" * 64, removed=NOW, removed_by="b")
    with console(url, audit_text=True, audit_key=SecretStr("k" * 32)) as client:
        yield str(client.base_url)


@contextmanager
def opened(browser: Browser, base: str, **options: Any) -> Iterator[Page]:
    """Yield a page whose every complaint, and every request to somewhere else, is a failure."""
    wrong: list[str] = []
    asked: list[str] = []
    context = browser.new_context(base_url=base, **options)
    context.on("console", lambda message: wrong.append(message.text))
    context.on("weberror", lambda error: wrong.append(str(error.error)))
    context.on("request", lambda request: asked.append(request.url))
    yield context.new_page()
    context.close()
    assert not wrong
    assert all(address.startswith(base) for address in asked)


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize(
    "place", ["", "/queue", "/queue?request_id=nobody", "/exceptions", "/keys"]
)
def test_pages_are_accessible_and_fit(browser: Browser, day: str, screen: str, place: str) -> None:
    with opened(browser, day, **SCREENS[screen]) as page:
        page.goto(f"/console{place}")
        for summary in page.locator("summary").all():
            summary.click()
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width == SCREENS[screen]["viewport"]["width"]


@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_of_keys_is_accessible_and_fits(
    browser: Browser, file: str, tmp_path: Path, screen: str
) -> None:
    write(file)
    (tmp_path / "keys.toml").write_text(KEYS)
    boss: dict[str, Any] = {"http_credentials": {"username": "", "password": "psim_boss"}}
    with (
        console(file, keys=tmp_path / "keys.toml") as client,
        opened(browser, str(client.base_url), **SCREENS[screen], **boss) as page,
    ):
        page.goto("/console/keys")
        expect(page.locator("article")).to_have_count(3)
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width == SCREENS[screen]["viewport"]["width"]


def test_a_text_is_let_pass_in_a_browser(browser: Browser, file: str) -> None:
    write(file, new(FLAGGED, text="a quiet mn film", text_hmac="cd" * 32))
    with (
        console(file, audit_text=True, audit_key=SecretStr("k" * 32)) as client,
        opened(browser, str(client.base_url)) as page,
    ):
        page.goto("/console/queue")
        page.get_by_text("Let this text pass").click()
        page.get_by_label("For").select_option("7")
        page.get_by_label("Why it may pass").fill("a quote")
        page.get_by_role("button", name="Add an exception").click()
        expect(page.locator("article")).to_contain_text("This text passes until")
        page.get_by_role("link", name="Exceptions", exact=True).click()
        expect(page.locator("article .pill").first).to_have_text("in force")
        page.get_by_role("button", name="Remove").click()
        expect(page.locator("article .pill").first).to_have_text("removed")


def test_a_hostile_text_does_nothing_in_a_browser(browser: Browser, day: str) -> None:
    with opened(browser, day) as page:
        page.goto("/console/queue")
        assert page.title() == "Review queue · PSIM Gateway"
        assert page.locator("article img, article script").count() == 0
        shown = page.locator(".text", has_text="<script>document.title='owned'</script>")
        expect(shown.first).to_be_visible()
        assert page.locator("article").count() == PAGE


def test_a_slider_says_what_would_be_flagged(browser: Browser, day: str) -> None:
    with opened(browser, day) as page:
        page.goto("/console")
        slider = page.get_by_label("What if the thresholds were different?")
        says = page.locator("#factor-summary")
        now = sum(row.finding is not None for row in traffic_of_a_day())
        expect(says).to_contain_text(f"At the thresholds as they are: {now} of 1,500 inputs")
        bars = page.locator("section[aria-labelledby=scores] rect[data-tenth].flagged")
        flagged = bars.count()
        slider.focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        expect(says).to_contain_text("At 1.3 times the thresholds:")
        expect(says).to_contain_text("fewer than now")
        assert 0 < bars.count() < flagged
        assert page.locator(".what-if").first.get_attribute("x1") != page.locator(
            ".cut"
        ).first.get_attribute("x1")
        assert slider.get_attribute("aria-valuetext") == "1.3 times the thresholds"
        page.get_by_text("Other thresholds, as a table").click()
        expect(page.locator("#factor-table tr.chosen th")).to_have_text("1.3 times the thresholds")


def test_another_slider_says_what_the_override_test_would_confirm(
    browser: Browser, day: str
) -> None:
    with opened(browser, day) as page:
        page.goto("/console")
        slider = page.get_by_label("What if the override test had another threshold?")
        says = page.locator("#override-factor-summary")
        asked = [row for row in traffic_of_a_day() if row.override is not None]
        now = sum(row.finding == "triggered" for row in asked)
        assert 0 < now < len(asked)
        expect(says).to_contain_text(f"{now} of {len(asked)} asked inputs triggered")
        others = page.locator("section[aria-labelledby=scores] .what-if").first
        before = others.get_attribute("x1")
        slider.focus()
        for _ in range(5):
            page.keyboard.press("ArrowLeft")
        expect(says).to_contain_text("At 0.5 times the thresholds:")
        expect(says).to_contain_text("more than now")
        assert others.get_attribute("x1") == before, "it moves no threshold but its own"


def test_the_queue_shows_findings_and_can_be_narrowed_to_one(browser: Browser, day: str) -> None:
    wanted = [row.finding for row in traffic_of_a_day() if row.finding]
    with opened(browser, day) as page:
        page.goto("/console")
        link = page.locator(".statistics a[href*='finding=unfamiliar']")
        expect(link).to_have_text(str(wanted.count("unfamiliar")))
        link.click()
        articles = page.locator("article")
        expect(articles).to_have_count(wanted.count("unfamiliar"))
        expect(articles.first.locator(".pill").first).to_have_text("unfamiliar")
        expect(articles.first).to_contain_text("under 0.50")
        page.get_by_label("Finding").select_option("triggered")
        page.get_by_role("button", name="Show").click()
        expect(articles.first.locator(".pill").first).to_have_text("triggered")
        assert page.locator(".pill", has_text="unfamiliar").count() == 0
        expect(page.locator(".caption").first).to_contain_text(
            f"{wanted.count('triggered')} flagged inputs"
        )


@pytest.mark.parametrize("scripts", [True, False])
def test_marks_are_set_and_undone_by_keyboard_with_scripts_and_without(
    browser: Browser, file: str, scripts: bool
) -> None:
    rows = [new(FLAGGED, text=f"film {number}") for number in range(3)]
    write(file, *rows)
    with (
        console(file, audit_text=True) as client,
        opened(browser, str(client.base_url), java_script_enabled=scripts) as page,
    ):
        page.goto("/console/queue")
        first = page.locator("article").first
        text = first.locator(".text").inner_text()
        first.get_by_role("button", name="False alarm").focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_contain_text("Marked as false alarm")
        expect(page.locator("article")).to_have_count(2)
        assert {row.text: row.mark for row in kept(file)}[text] == "false_alarm"
        page.get_by_role("button", name="Undo").press("Enter")
        expect(page.get_by_role("status")).to_contain_text("Mark taken back")
        expect(page.locator("article")).to_have_count(3)
        assert {row.mark for row in kept(file)} == {None}


def test_another_site_cannot_have_a_browser_mark(browser: Browser, file: str) -> None:
    row = new(FLAGGED)
    write(file, row)
    with console(file) as client:
        place = f"{client.base_url}/console/inputs/{row.id}/mark"
        form = (
            f'<form method="post" action="{place}"><button name="new" value="poisoned">x</button>'
        )
        page = browser.new_page()
        page.route(
            "https://evil.example/",
            lambda route: route.fulfill(body=form, content_type="text/html"),
        )
        page.goto("https://evil.example/")
        with page.expect_response(place) as sent:
            page.get_by_role("button").click()
        assert sent.value.status == 403
        page.close()
    assert kept(file)[0].mark is None
