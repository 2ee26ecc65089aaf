"""The batcher: every caller gets the answer to its own text, whatever the others do."""

import asyncio
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.engines.base import Encoding, Screening
from models.engines.batching import length_sorted_batches
from service.errors import ClassifyFailed, NotReady, Overloaded, ScreenFailed, TimedOut
from service.inference.batcher import Batcher, Screened
from service.inference.worker import Health
from tests.support.batchers import running, value
from tests.support.fakes import BROKEN, CLASSLESS, NAN, PANIC, TRIGGER, UNREADABLE, FakeEngine
from tests.support.waiting import until

pytestmark = pytest.mark.within(seconds=20)

SPECIAL = [TRIGGER, BROKEN, NAN, PANIC, CLASSLESS]
words = st.sampled_from(["film", "quiet", "x", *SPECIAL])
texts = st.lists(words, min_size=1, max_size=12).map(" ".join)


def is_answer_to(text: str, screened: Screened) -> bool:
    if any(word in text for word in (BROKEN, NAN, PANIC)):
        return screened.verdict is None
    verdict = screened.verdict
    return verdict is not None and verdict.poisoned == (TRIGGER in text)


calls = st.tuples(st.lists(texts, min_size=1, max_size=6), st.booleans(), st.booleans())
steps = st.one_of(
    calls, st.integers(0, 9), st.sampled_from(["open", "close", "pause"]), st.just("pause")
)


async def outcome(batcher: Batcher, inputs: list[str], classify: bool) -> None:
    """Screen, perhaps classify, and check that what comes is due to these inputs alone."""
    unreadable = any(UNREADABLE in text for text in inputs)
    classless = classify and any(CLASSLESS in text for text in inputs)
    try:
        screened = [timed.value for timed in await batcher.screen(inputs)]
        assert not unreadable
        assert len(screened) == len(inputs)
        assert all(map(is_answer_to, inputs, screened))
        rows = await batcher.classify([one.state for one in screened] if classify else [])
        assert not classless
        for text, row in zip(inputs, rows, strict=False):
            assert row.value.argmax() == len(text.split()) % 2
    except Overloaded:
        pass
    except ScreenFailed:
        assert unreadable
    except ClassifyFailed:
        assert classless


@settings(max_examples=80, deadline=None)
@given(schedule=st.lists(steps, max_size=30), batch_tokens=st.integers(8, 64))
def test_every_caller_gets_its_own_answer_once_in_any_order_of_events(
    schedule: list[Any], batch_tokens: int
) -> None:
    """Callers that come and go, texts that fail in every way, a device that stops and goes on."""

    async def check() -> None:
        engine = FakeEngine()
        tasks: list[asyncio.Task[None]] = []
        async with running(engine, batch_tokens=batch_tokens, queue_inputs=16) as batcher:
            for number, step in enumerate(schedule):
                match step:
                    case (inputs, unreadable, classify):
                        own = [f"{text} t{number}-{i}" for i, text in enumerate(inputs)]
                        own += [f"{UNREADABLE} t{number}"] * unreadable
                        tasks.append(asyncio.create_task(outcome(batcher, own, classify)))
                    case "open":
                        engine.gate.set()
                    case "close":
                        engine.gate.clear()
                    case "pause":
                        await asyncio.sleep(0.001)
                    case _ if tasks:
                        tasks[step % len(tasks)].cancel()
            engine.gate.set()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert not [e for e in ended if isinstance(e, Exception)]
            assert batcher.alive
            assert value(batcher, "worker_restarts") == 0
            screened = Counter(engine.screened)
            del screened[engine.encode(["warm up"])[0].input_ids]  # how the engine is probed
            assert max(screened.values(), default=1) == 1, "a text was screened twice"

    asyncio.run(asyncio.wait_for(check(), 20))


async def test_what_waits_while_the_device_is_busy_becomes_one_batch_longest_first() -> None:
    """In order, an engine that takes a batch apart has little to pad."""

    engine = FakeEngine()
    lengths = random.Random(0).sample(range(1, 21), 20)
    async with running(engine) as batcher:
        engine.gate.clear()
        first = asyncio.create_task(batcher.screen(["one"]))
        await until(lambda: engine.waits)
        rest = [asyncio.create_task(batcher.screen(["a " * length])) for length in lengths]
        await until(lambda: value(batcher, "queue_inputs") == 21)
        engine.gate.set()
        await asyncio.gather(first, *rest)
        assert engine.batches == [1, 20]
        assert [len(ids) for ids in engine.screened[1:]] == sorted(lengths, reverse=True)


@pytest.mark.parametrize(("device", "largest"), [("cpu", 48), ("cuda", 100)])
async def test_a_gpu_gets_larger_batches(device: str, largest: int) -> None:
    engine = FakeEngine()
    engine.device_type = device
    text = "a " * 32
    async with running(engine) as batcher:
        engine.gate.clear()
        first = asyncio.create_task(batcher.screen(["one"]))
        await until(lambda: engine.waits)
        rest = asyncio.create_task(batcher.screen([text] * 100))
        await until(lambda: value(batcher, "queue_inputs") == 101)
        engine.gate.set()
        await asyncio.gather(first, rest)
    assert max(engine.batches) == largest


async def test_batches_of_callers_that_have_gone_are_not_run() -> None:
    engine = FakeEngine()
    async with running(engine, batch_tokens=4) as batcher:
        engine.gate.clear()
        taken = asyncio.create_task(batcher.screen(["a b c"] * 9))
        await until(lambda: engine.waits)  # by the first of its nine batches
        taken.cancel()
        await asyncio.wait([taken])
        engine.gate.set()
        await batcher.screen(["two"])
        assert engine.batches == [1, 1]


async def test_cancelled_callers_cost_nothing() -> None:
    engine = FakeEngine()
    async with running(engine) as batcher:
        engine.gate.clear()
        first = asyncio.create_task(batcher.screen(["one"]))
        await until(lambda: engine.waits)
        gone = [asyncio.create_task(batcher.screen(["a"])) for _ in range(5)]
        await until(lambda: value(batcher, "queue_inputs") == 6)
        for task in gone:
            task.cancel()
        await asyncio.wait(gone)
        engine.gate.set()
        await first
        await batcher.screen(["two"])
        assert engine.batches == [1, 1]


@pytest.mark.parametrize("limit", [{"queue_inputs": 3}, {"queue_chars": 3}])
async def test_a_full_queue_refuses_at_once_and_recovers(limit: dict[str, int]) -> None:
    engine = FakeEngine()
    async with running(engine, **limit) as batcher:
        engine.gate.clear()
        waiting = asyncio.create_task(batcher.screen(["a", "b", "c"]))
        await until(lambda: value(batcher, "queue_inputs") == 3)
        with pytest.raises(Overloaded):
            await batcher.screen(["d"])
        engine.gate.set()
        await waiting
        await batcher.screen(["d"])


async def test_nobody_waits_longer_than_allowed_by_the_pace_of_late() -> None:
    class Slow(FakeEngine):
        def screen(self, batch: Sequence[Encoding]) -> Screening:
            time.sleep(0.01 * len(batch))
            return super().screen(batch)

    async with running(Slow(), queue_s=0.5) as batcher:
        await batcher.screen(["a"] * 128)  # more than a second, but nothing goes before it
        crowd = asyncio.create_task(batcher.screen(["b"] * 128))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="seconds") as refused:
            await batcher.screen(["c"] * 128)
        left = value(batcher, "queue_seconds")
        assert left > 1.2
        assert refused.value.retry_after_s == math.ceil(left)
        await batcher.screen(["c"])  # it takes turns with the crowd
        assert not crowd.done()
        await crowd
        await batcher.screen(["c"] * 2)
        # Some .6 s, but no more than one window.
        await asyncio.gather(*(batcher.screen([f"d{number}"]) for number in range(64)))


async def test_closing_answers_what_is_queued_and_refuses_what_comes_after() -> None:
    engine = FakeEngine()
    async with running(engine) as batcher:
        engine.gate.clear()
        queued = [asyncio.create_task(batcher.screen([f"text {i}"])) for i in range(9)]
        await until(lambda: value(batcher, "queue_inputs") == 9)
        engine.gate.set()
        await batcher.close()
        assert len(await asyncio.gather(*queued)) == 9
        with pytest.raises(NotReady):
            await batcher.screen(["late"])


async def test_a_worker_that_dies_is_started_again_and_only_what_it_held_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine()
    async with running(engine) as batcher:
        verdicts, failures = (
            batcher._screen.verdicts_of_batch,
            iter([ValueError("hunter" + str(2))]),
        )

        def fail_once(*args: Any) -> Any:
            for error in failures:
                raise error
            return verdicts(*args)

        monkeypatch.setattr(batcher._screen, "verdicts_of_batch", fail_once)
        engine.gate.clear()
        held = asyncio.create_task(batcher.screen(["one"]))
        await until(lambda: batcher._taken)
        queued = asyncio.create_task(batcher.screen(["two"]))
        await asyncio.sleep(0)
        engine.gate.set()
        with pytest.raises(NotReady):
            await held
        assert is_answer_to("two", (await queued)[0].value)
        assert batcher.health is Health.RUNNING
        assert value(batcher, "worker_restarts") == 1
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert "fail_once" in record.__dict__["where"]
    assert "hunter2" not in str(record.__dict__)


async def test_an_engine_that_fails_on_everything_is_given_up_and_nobody_is_left_waiting() -> None:
    engine = FakeEngine()
    async with running(engine, restarts=2) as batcher:
        engine.gate.clear()
        engine.dies = True
        calls = [asyncio.create_task(batcher.screen(["a"])) for _ in range(4)]
        await until(lambda: value(batcher, "queue_inputs") == 4)
        engine.gate.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(answer, NotReady) for answer in answers)
        await until(lambda: batcher.health is Health.DEAD)
        assert value(batcher, "worker_restarts") == 2
        with pytest.raises(NotReady):
            await batcher.screen(["late"])


async def test_a_worker_that_dies_while_classifying_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = FakeEngine()
    async with running(engine, batch_tokens=2, restarts=1) as batcher:
        screened = [timed.value for timed in await batcher.screen(["a b"] * 5)]

        def die(batch: object) -> None:
            raise SystemExit

        monkeypatch.setattr(engine, "classify", die)
        with pytest.raises(NotReady):  # five batches, of which the first one kills it
            await batcher.classify([one.state for one in screened])
        monkeypatch.undo()
        await batcher.screen(["c"])


async def test_an_engine_that_recovers_is_served_again() -> None:
    engine = FakeEngine()
    async with running(engine) as batcher:
        engine.dies = True
        with pytest.raises(NotReady):
            await batcher.screen(["a"])
        assert not batcher.alive
        waits = asyncio.create_task(batcher.screen(["b"]))
        await asyncio.sleep(0)
        engine.dies = False
        await waits
        assert batcher.alive


async def test_a_forward_pass_that_hangs_is_noticed_and_does_not_hold_up_the_end() -> None:
    engine = FakeEngine()
    async with running(engine, stall_s=0.05, drain_s=0) as batcher:
        engine.gate.clear()
        hangs = asyncio.create_task(batcher.screen(["a"]))
        await until(lambda: batcher.health is Health.STALLED)
        with pytest.raises(NotReady):
            await batcher.screen(["b"])
        engine.gate.set()
        await hangs
        assert batcher.health is Health.RUNNING
        engine.gate.clear()
        hangs = asyncio.create_task(batcher.screen(["c"]))
        await until(lambda: batcher.health is Health.STALLED)
        await batcher.close()
        with pytest.raises(NotReady):
            await hangs


async def test_what_would_be_answered_too_late_is_not_screened() -> None:
    engine = FakeEngine()
    async with running(engine, request_timeout_s=0.4) as batcher:
        engine.gate.clear()
        first = asyncio.create_task(batcher.screen(["one"]))
        await until(lambda: batcher._taken)
        late = asyncio.create_task(batcher.screen(["two"]))
        await asyncio.sleep(0.3)  # so long does a step take, and 0.1 s is left to the second
        engine.gate.set()
        await first
        with pytest.raises(TimedOut):
            await late
        await batcher.screen(["three"])
        assert engine.batches == [1, 1]


@pytest.mark.parametrize(
    ("lone", "crowd", "most"),
    [
        ("short", "long text " * 8, 4),  # two batches of two
        ("long text " * 8, "short", 150),  # of 300
    ],
)
async def test_a_short_text_does_not_wait_for_a_crowd_nor_a_long_one_for_short_ones(
    lone: str, crowd: str, most: int
) -> None:
    engine = FakeEngine()
    async with running(engine, batch_tokens=32) as batcher:
        engine.gate.clear()
        first = asyncio.create_task(batcher.screen([f"{i} {crowd}" for i in range(300)]))
        await until(lambda: batcher._taken)
        second = asyncio.create_task(batcher.screen([lone]))
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(first, second)
        (encoding,) = engine.encode([lone])
        assert engine.screened.index(encoding.input_ids) <= most


@given(
    lengths=st.lists(st.integers(1, 600), max_size=200),
    tokens=st.integers(1, 2000),
    rows=st.integers(1, 64),
)
def test_batches_keep_the_budget_and_lose_nothing(
    lengths: list[int], tokens: int, rows: int
) -> None:
    batches = list(length_sorted_batches(lengths, tokens, rows))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= rows
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens


@pytest.mark.parametrize("reads, passes", [(128, [1, 1, 1]), (8190, [1, 2, 16])])
async def test_a_text_is_charged_by_what_the_model_reads_of_it(
    reads: int, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "window_length", reads)
    charged = []

    async def charge(passes: int) -> None:
        charged.append(passes)

    async with running(FakeEngine()) as batcher:
        for characters in (1, 4 * 512 + 1, 10**6):
            await batcher.screen(["x" * characters], charge)
        await batcher.screen(["x", "x" * 10**6], charge)
        await batcher.screen_tokens([np.arange(1, reads + 1)], charge)
    assert charged == [*passes, 1 + passes[-1], passes[-1]]
