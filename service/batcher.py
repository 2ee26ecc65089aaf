"""Dynamic batches in one inference thread: engine and tokenizer are not thread-safe.

Batches form while the device is busy: whatever waits when it is free is taken, sorted by length and
cut into batches by a token budget. Nothing waits for company. Classifying goes before screening,
since it finishes requests.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from models.batching import length_sorted_batches
from models.bundle import Bundle
from models.engines import Encoding, State
from models.errors import ScreenError
from models.screen import FloatArray, Verdict
from service.errors import ClassifyFailed, NotReady, Overloaded, ScreenFailed
from service.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)

MAX_TAKEN = 64
"""Inputs taken from the queue at once, so that a long queue does not keep classifying waiting."""

Given = TypeVar("Given")
Answer = TypeVar("Answer")
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True, slots=True)
class Screened:
    """A screened input: the verdict, and what the classifier needs."""

    verdict: Verdict | None
    """None if screening failed; never to be read as clean."""
    state: State
    """Where the classifier goes on."""


@dataclass(frozen=True, slots=True)
class Timed(Generic[Answer]):
    """An answer with the seconds that each stage took on its way."""

    value: Answer
    stages: dict[str, float]


@dataclass(eq=False, slots=True)
class _Job(Generic[Given, Answer]):
    given: Given
    future: "asyncio.Future[Timed[Answer]]"
    stages: dict[str, float] = field(default_factory=dict)
    queued: float = field(default_factory=time.perf_counter)


_ScreenJob = _Job[str, Screened]
_ClassifyJob = _Job[State, FloatArray]


class Screener(Protocol):
    """Whoever screens texts."""

    @property
    def alive(self) -> bool:
        """True while it does."""

    async def screen(self, texts: Sequence[str]) -> list[Timed[Screened]]:
        """Screen texts, as `Batcher.screen` does."""


class Batcher:
    """Owns the engine of `bundle`; methods are called on one event loop.

    Raises from `screen` and `classify`:
        Overloaded: the queue is full; nothing was queued.
        NotReady: the worker is not running.
    """

    def __init__(self, bundle: Bundle, settings: Settings, metrics: Metrics) -> None:
        self._engine, self._screen = bundle.engine, bundle.screen
        self._settings, self._metrics = settings, metrics
        self._inputs = self._chars = 0
        self._to_screen: deque[_ScreenJob] = deque()
        self._to_classify: deque[_ClassifyJob] = deque()
        self._taken: Sequence[_ScreenJob | _ClassifyJob] = ()
        self._wake = threading.Condition()
        self._closing = False
        self._worker = threading.Thread(target=self._work, name="inference", daemon=True)

    def start(self) -> None:
        """Start the inference thread, from the event loop that will call."""
        self._loop = asyncio.get_running_loop()
        self._worker.start()

    @property
    def alive(self) -> bool:
        """True while the worker takes jobs."""
        return self._worker.is_alive() and not self._closing

    async def close(self) -> None:
        """Answer what is queued, then stop the worker; later calls raise `NotReady`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._worker.join)
        await asyncio.sleep(0)  # lets the answers that the worker posted reach their futures

    async def screen(self, texts: Sequence[str]) -> list[Timed[Screened]]:
        """Screen texts; one that cannot even be tokenized fails the call with `ScreenFailed`."""
        chars = sum(map(len, texts))
        self._admit(len(texts), chars)
        jobs = [_ScreenJob(text, self._loop.create_future()) for text in texts]
        try:
            self._enqueue(self._to_screen, jobs)
            return await _all(jobs)
        finally:
            self._release(len(texts), chars)

    async def classify(self, states: Sequence[State]) -> list[Timed[FloatArray]]:
        """Return the victim's probabilities, each of shape (C,); any failure fails the call."""
        jobs = [_ClassifyJob(state, self._loop.create_future()) for state in states]
        self._enqueue(self._to_classify, jobs)
        return await _all(jobs)

    def _admit(self, inputs: int, chars: int) -> None:
        for reason, amount, limit in (
            ("inputs", self._inputs + inputs, self._settings.queue_inputs),
            ("characters", self._chars + chars, self._settings.queue_chars),
        ):
            if amount > limit:
                self._metrics.overload.labels(reason).inc()
                raise Overloaded(reason)
        self._account(inputs, chars)

    def _release(self, inputs: int, chars: int) -> None:
        self._account(-inputs, -chars)

    def _account(self, inputs: int, chars: int) -> None:
        self._inputs += inputs
        self._chars += chars
        self._metrics.queue_inputs.set(self._inputs)
        self._metrics.queue_characters.set(self._chars)

    def _enqueue(
        self, queue: "deque[_Job[Given, Answer]]", jobs: "list[_Job[Given, Answer]]"
    ) -> None:
        with self._wake:
            if not self.alive:
                raise NotReady("the inference worker is not running")
            queue.extend(jobs)
            self._wake.notify()

    # Everything below runs in the inference thread.

    def _work(self) -> None:
        try:
            while self._step():
                pass
        except BaseException:
            log.exception("the inference worker died")
        finally:
            with self._wake:
                self._closing = True
                left: list[_Job[Any, Any]] = [
                    *self._taken,
                    *self._to_classify,
                    *self._to_screen,
                ]
                self._to_classify.clear()
                self._to_screen.clear()
            for job in left:
                self._post([(job, NotReady("the inference worker stopped"))])

    def _step(self) -> bool:
        """Take what waits and answer it; return False when closed and nothing is left."""
        with self._wake:
            self._wake.wait_for(lambda: self._to_classify or self._to_screen or self._closing)
            classify, screen = _take(self._to_classify), []
            if not classify:
                screen = _take(self._to_screen)
            self._taken = classify or screen
            finished = self._closing and not self._taken
        self._run_classify(classify)
        self._run_screen(screen)
        self._taken = ()
        return not finished

    def _run_screen(self, jobs: list[_ScreenJob]) -> None:
        self._start_clock(jobs)
        texts = [job.given for job in jobs]
        refused = ScreenFailed("an input could not be tokenized")
        encodings = self._answer(jobs, texts, self._engine.encode, "tokenize", lambda _: refused)

        def judge(indices: list[int]) -> None:
            batch = [encodings[i] for i in indices]
            chosen = [jobs[i] for i in indices]
            rows: dict[int, tuple[FloatArray, State]] = self._answer(
                chosen, batch, self._screen_rows, "screen", lambda one: Screened(None, one)
            )
            self._post([(chosen[i], self._judge(batch[i], *row)) for i, row in rows.items()])

        self._in_batches(jobs, encodings, judge)

    def _screen_rows(self, batch: Sequence[Encoding]) -> Iterable[tuple[FloatArray, State]]:
        return zip(*self._engine.screen(batch), strict=True)

    def _judge(self, encoding: Encoding, readings: FloatArray, state: State) -> Screened:
        try:
            return Screened(self._screen.judge(readings, encoding.truncated), state)
        except ScreenError:
            log.error("screen gave no finite readings")
            return Screened(None, state)

    def _run_classify(self, jobs: list[_ClassifyJob]) -> None:
        self._start_clock(jobs)

        def classify(indices: list[int]) -> None:
            chosen = [jobs[i] for i in indices]
            batch = [job.given for job in chosen]
            failed = ClassifyFailed("the classifier failed on an input")
            rows = self._answer(chosen, batch, self._engine.classify, "classify", lambda _: failed)
            self._post([(chosen[i], self._finite(row)) for i, row in rows.items()])

        self._in_batches(jobs, {i: job.given for i, job in enumerate(jobs)}, classify)

    @staticmethod
    def _finite(row: FloatArray) -> FloatArray | Exception:
        if not (row == row).all():
            return ClassifyFailed("the classifier gave no finite probabilities")
        return row

    def _start_clock(self, jobs: Sequence[_ScreenJob | _ClassifyJob]) -> None:
        now = time.perf_counter()
        for job in jobs:
            waited = now - job.queued
            self._metrics.stage_seconds.labels("queue").observe(waited)
            job.stages["queue"] = waited

    def _in_batches(
        self,
        jobs: Sequence[_ScreenJob | _ClassifyJob],
        encodings: Mapping[int, State],
        run: Callable[[list[int]], None],
    ) -> None:
        """Call `run` with indices of jobs, batch by batch, leaving out callers that have gone."""
        keys = list(encodings)
        lengths = [len(encodings[key]) for key in keys]
        for batch in length_sorted_batches(lengths, self._settings.batch_tokens):
            waiting = [i for i in batch if not jobs[keys[i]].future.cancelled()]
            if waiting:
                self._metrics.batch_inputs.observe(len(waiting))
                self._metrics.batch_tokens.observe(len(waiting) * max(lengths[i] for i in waiting))
                run([keys[i] for i in waiting])

    def _answer(
        self,
        jobs: "Sequence[_Job[Given, Answer]]",
        inputs: "Sequence[_In]",
        forward: "Callable[[Sequence[_In]], Iterable[_Out]]",
        stage: str,
        fallback: "Callable[[_In], Answer | Exception]",
    ) -> "dict[int, _Out]":
        """Return outputs by index; where a batch fails, each row is tried alone, and the rows that
        fail again are answered with `fallback`."""
        started = time.perf_counter()
        outputs: dict[int, _Out] = {}
        failed: list[int] = []
        try:
            outputs = dict(enumerate(forward(inputs))) if inputs else {}
        except Exception:
            for index, one in enumerate(inputs):
                try:
                    outputs[index] = next(iter(forward([one])))
                except Exception as error:
                    # The type only: messages of tokenizers may quote the text.
                    log.error("%s failed for one input: %s", stage, type(error).__name__)
                    failed.append(index)
        seconds = time.perf_counter() - started
        self._metrics.stage_seconds.labels(stage).observe(seconds)
        for job in jobs:
            job.stages[stage] = seconds
        self._post([(jobs[i], fallback(inputs[i])) for i in failed])
        return outputs

    def _post(self, answers: "Sequence[tuple[_Job[Given, Answer], Answer | Exception]]") -> None:
        if not answers:
            return
        try:
            self._loop.call_soon_threadsafe(_deliver, answers)
        except RuntimeError:
            log.warning("the event loop is gone; %d answers have no taker", len(answers))


async def _all(jobs: "Sequence[_Job[Given, Answer]]") -> "list[Timed[Answer]]":
    """Await all answers; the first failure is raised once every one is there."""
    answers = await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return [answer for answer in answers if not isinstance(answer, BaseException)]


def _take(queue: "deque[_Job[Given, Answer]]") -> "list[_Job[Given, Answer]]":
    """Take jobs off a queue; those whose caller has gone are dropped before they cost anything."""
    jobs: list[_Job[Given, Answer]] = []
    while queue and len(jobs) < MAX_TAKEN:
        job = queue.popleft()
        if not job.future.cancelled():
            jobs.append(job)
    return jobs


def _deliver(answers: "Sequence[tuple[_Job[Given, Answer], Answer | Exception]]") -> None:
    """Set results; runs on the event loop. A waiter may have been cancelled in between."""
    for job, answer in answers:
        if job.future.done():
            continue
        if isinstance(answer, Exception):
            job.future.set_exception(answer)
        else:
            job.future.set_result(Timed(answer, job.stages))
