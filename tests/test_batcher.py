"""The batcher: every caller gets the answer to its own text, whatever the others do."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import BROKEN, TRIGGER, FakeEngine, fake_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from models.batching import length_sorted_batches
from service.batcher import Batcher, Screened
from service.errors import NotReady, Overloaded
from service.metrics import Metrics
from service.settings import Mode, Settings

words = st.sampled_from(["film", "quiet", TRIGGER, BROKEN, "x"])
texts = st.lists(words, min_size=1, max_size=12).map(" ".join)


@asynccontextmanager
async def running(engine: FakeEngine, **changes: Any) -> AsyncIterator[Batcher]:
    bundle = fake_bundle(engine)
    batcher = Batcher(
        bundle, Settings(bundle=Path("unused"), **changes), Metrics(bundle, Mode.ENFORCE)
    )
    batcher.start()
    yield batcher
    engine.gate.set()
    await batcher.close()


def run(check: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(check(), 20)

    asyncio.run(bounded())


def is_answer_to(text: str, screened: Screened) -> bool:
    if BROKEN in text:
        return screened.verdict is None
    verdict = screened.verdict
    return verdict is not None and verdict.poisoned == (TRIGGER in text)


@settings(max_examples=60, deadline=None)
@given(calls=st.lists(st.tuples(st.lists(texts, min_size=1, max_size=5), st.booleans())))
def test_every_text_gets_its_own_answer_among_cancelled_and_broken_mates(
    calls: list[tuple[list[str], bool]],
) -> None:
    async def check() -> None:
        engine = FakeEngine()
        async with running(engine, batch_tokens=24) as batcher:
            engine.gate.clear()
            tasks = [asyncio.create_task(batcher.screen(inputs)) for inputs, _ in calls]
            await asyncio.sleep(0.001)
            for task, (_, cancelled) in zip(tasks, calls, strict=True):
                if cancelled:
                    task.cancel()
            engine.gate.set()
            for task, (inputs, cancelled) in zip(tasks, calls, strict=True):
                if cancelled:
                    with pytest.raises(asyncio.CancelledError):
                        await task
                else:
                    answers = [timed.value for timed in await task]
                    assert all(map(is_answer_to, inputs, answers))
                    assert len(answers) == len(inputs)
            # Cancelled or not, every place in the queue is free again.
            assert batcher._inputs == batcher._chars == 0

    run(check)


def test_what_waits_while_the_device_is_busy_becomes_one_batch() -> None:
    async def check() -> None:
        engine = FakeEngine()
        async with running(engine) as batcher:
            engine.gate.clear()
            first = asyncio.create_task(batcher.screen(["one"]))
            await asyncio.sleep(0.05)
            rest = [asyncio.create_task(batcher.screen(["a b"])) for _ in range(20)]
            await asyncio.sleep(0.05)
            engine.gate.set()
            await asyncio.gather(first, *rest)
            assert engine.batches == [1, 20]

    run(check)


def test_batches_of_callers_that_have_gone_are_not_run() -> None:
    async def check() -> None:
        engine = FakeEngine()
        async with running(engine, batch_tokens=4) as batcher:
            engine.gate.clear()
            taken = asyncio.create_task(batcher.screen(["a b c"] * 9))
            await asyncio.sleep(0.05)  # the first of its nine batches is in the engine
            taken.cancel()
            await asyncio.sleep(0.01)
            engine.gate.set()
            await batcher.screen(["two"])
            assert engine.batches == [1, 1]

    run(check)


def test_cancelled_callers_cost_nothing() -> None:
    async def check() -> None:
        engine = FakeEngine()
        async with running(engine) as batcher:
            engine.gate.clear()
            first = asyncio.create_task(batcher.screen(["one"]))
            await asyncio.sleep(0.05)
            gone = [asyncio.create_task(batcher.screen(["a"])) for _ in range(5)]
            await asyncio.sleep(0.01)
            for task in gone:
                task.cancel()
            await asyncio.sleep(0.01)
            engine.gate.set()
            await first
            await batcher.screen(["two"])
            assert engine.batches == [1, 1]

    run(check)


@pytest.mark.parametrize("limit", [{"queue_inputs": 3}, {"queue_chars": 3}])
def test_a_full_queue_refuses_at_once_and_recovers(limit: dict[str, int]) -> None:
    async def check() -> None:
        engine = FakeEngine()
        async with running(engine, **limit) as batcher:
            engine.gate.clear()
            waiting = asyncio.create_task(batcher.screen(["a", "b", "c"]))
            await asyncio.sleep(0.01)
            with pytest.raises(Overloaded):
                await batcher.screen(["d"])
            engine.gate.set()
            await waiting
            await batcher.screen(["d"])

    run(check)


def test_closing_answers_what_is_queued_and_refuses_what_comes_after() -> None:
    async def check() -> None:
        engine = FakeEngine()
        async with running(engine) as batcher:
            engine.gate.clear()
            queued = [asyncio.create_task(batcher.screen([f"text {i}"])) for i in range(9)]
            await asyncio.sleep(0.01)
            engine.gate.set()
            await batcher.close()
            assert len(await asyncio.gather(*queued)) == 9
            with pytest.raises(NotReady):
                await batcher.screen(["late"])

    run(check)


def test_a_dead_worker_leaves_nobody_waiting() -> None:
    async def check() -> None:
        engine = FakeEngine()
        async with running(engine) as batcher:
            engine.gate.clear()
            engine.dies = True
            calls = [asyncio.create_task(batcher.screen(["a"])) for _ in range(4)]
            await asyncio.sleep(0.05)
            engine.gate.set()
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(answer, NotReady) for answer in answers)
            assert not batcher.alive

    run(check)


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
