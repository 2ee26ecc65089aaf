"""Dynamic batches in one inference thread: engine and tokenizer are not thread-safe.

Batches form while the device is busy; nothing waits for company. Callers take turns, text by text,
in a window of texts that are tokenized. Of what waits there, sorted by length and cut by a token
budget, the batch of the shortest and that of the oldest text run in turns: a short text does not
wait for long ones, and no text waits for ever. Classifying goes before screening, since it finishes
requests.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from models.bundle.load import Bundle
from models.detection.screen import FloatArray, Verdict
from models.engines.base import ClassifierState, Encoding
from models.engines.batching import length_sorted_batches
from models.errors import ScreenError
from service.errors import ClassifyFailed, NotReady, Overloaded, ScreenFailed, TimedOut
from service.inference.worker import Health, Worker
from service.observability.metrics import ModelMetrics
from service.settings import InferenceSettings

log = logging.getLogger(__name__)

WINDOW = 64
"""Texts among which a batch is chosen, and states that are classified before more are screened."""

Given = TypeVar("Given")
Answer = TypeVar("Answer")
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True, slots=True)
class Screened:
    """A screened input: the verdict, and what the classifier needs."""

    verdict: Verdict | None
    """None if screening failed; never to be read as clean."""
    state: ClassifierState
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
_ClassifyJob = _Job[ClassifierState, FloatArray]


class Screener(Protocol):
    """Whoever screens texts."""

    @property
    def health(self) -> Health:
        """How whoever does it is."""

    async def screen(self, texts: Sequence[str]) -> list[Timed[Screened]]:
        """Screen texts, as `Batcher.screen` does."""


class Batcher:
    """Owns the engine of `bundle`; methods are called on one event loop.

    Raises from `screen` and `classify`:
        Overloaded: the queue is full; nothing was queued.
        NotReady: the worker does not run, or died with the input in hand.
    """

    def __init__(self, bundle: Bundle, settings: InferenceSettings, metrics: ModelMetrics) -> None:
        self._engine, self._screen = bundle.engine, bundle.screen
        self._settings, self._metrics = settings, metrics
        metrics.max_queue_inputs.set(settings.queue_inputs)
        metrics.max_queue_characters.set(settings.queue_chars)
        metrics.max_queue_seconds.set(settings.queue_s)
        self._inputs = self._chars = 0
        self._callers: set[tuple[_ScreenJob, ...]] = set()
        self._to_screen: deque[deque[_ScreenJob]] = deque()
        """By caller; the next one first."""
        self._to_classify: deque[_ClassifyJob] = deque()
        self._window: list[tuple[_ScreenJob, Encoding]] = []
        """Oldest first. Only the worker changes it."""
        self._taken: Sequence[_Job[Any, Any]] = ()
        """What is in hand; set before it is taken from where it waits, so that none gets lost."""
        self._oldest_next = False
        self._recent: deque[float] = deque([0.0], maxlen=16)
        self._pace = 0.0
        """Seconds that an input takes, by the last `WINDOW` of them or so."""
        self._worker = Worker(
            self._step, self._probe, self._answer_taken, self._answer_all, settings, metrics
        )

    def start(self) -> None:
        """Start the inference thread, from the event loop that will call."""
        self._loop = asyncio.get_running_loop()
        self._worker.start()

    @property
    def health(self) -> Health:
        """How the inference thread is."""
        return self._worker.health

    @property
    def alive(self) -> bool:
        """True while the worker answers."""
        return self.health is Health.RUNNING

    @property
    def queued_characters(self) -> int:
        """How many characters wait or run."""
        return self._chars

    async def close(self) -> None:
        """Answer what is queued, then stop the worker; later calls raise `NotReady`."""
        await self._worker.close(self._settings.drain_s)

    async def screen(self, texts: Sequence[str]) -> list[Timed[Screened]]:
        """Screen texts; one that cannot even be tokenized fails the call with `ScreenFailed`.

        Raises:
            TimedOut: the queue was so long that the answer would have been late.
        """
        chars = sum(map(len, texts))
        self._admit(len(texts), chars)
        jobs = tuple(_ScreenJob(text, self._loop.create_future()) for text in texts)
        self._callers.add(jobs)
        try:
            self._enqueue(self._to_screen, [deque(jobs)])
            return await _all(jobs)
        finally:
            self._callers.discard(jobs)
            self._account(-len(texts), -chars)

    async def classify(self, states: Sequence[ClassifierState]) -> list[Timed[FloatArray]]:
        """Return the classifier's probabilities, each of shape (C,); any failure fails the call."""
        jobs = [_ClassifyJob(state, self._loop.create_future()) for state in states]
        self._enqueue(self._to_classify, jobs)
        return await _all(jobs)

    def _admit(self, inputs: int, chars: int) -> None:
        for reason, amount, limit in (
            ("inputs", self._inputs + inputs, self._settings.queue_inputs),
            ("characters", self._chars + chars, self._settings.queue_chars),
            ("seconds", self._wait(inputs), self._settings.queue_s),
        ):
            if amount > limit:
                self._metrics.overload[reason].inc()
                raise Overloaded(reason, self._retry_after())
        self._account(inputs, chars)

    def _wait(self, inputs: int) -> float:
        """Return how many seconds of work go before the last of so many inputs of a new caller.

        Callers take turns: what one of them has more of than the new one comes after. None, as long
        as all fit into the window, of which batches are made: slow models need company too.
        """
        if self._inputs + inputs <= WINDOW:
            return 0.0
        left = (sum(not job.future.done() for job in jobs) for jobs in self._callers)
        return self._pace * sum(min(inputs, one) for one in left)

    def _retry_after(self) -> int:
        """Return after how many seconds all that waits now will be answered."""
        seconds = min(self._pace * self._inputs, self._settings.request_timeout_s)
        return max(1, math.ceil(seconds))

    def _account(self, inputs: int, chars: int) -> None:
        self._inputs += inputs
        self._chars += chars
        # Not set where it counts: after a reload the one before may still have some of the model.
        self._metrics.queue_inputs.inc(inputs)
        self._metrics.queue_characters.inc(chars)
        self._metrics.queue_seconds.set(self._pace * self._inputs)

    def _enqueue(self, queue: "deque[_In]", items: "Iterable[_In]") -> None:
        with self._worker.wake:
            # A worker that is being restarted will soon be back, or answer everybody.
            if self.health not in (Health.RUNNING, Health.RESTARTING):
                raise NotReady(f"the inference worker {self.health}")
            queue.extend(items)
            self._worker.wake.notify()

    # Everything below runs in the inference thread.

    def _step(self) -> bool:
        """Classify what waits, or else screen a batch; return False when closed and all is done."""
        worker = self._worker
        with worker.wake:
            if not self._window:
                worker.wake.wait_for(lambda: self._to_classify or self._to_screen or worker.closing)
            states = self._next_states()
            fresh = [] if states else self._next_texts(WINDOW - len(self._window))
        started, screened = time.perf_counter(), 0
        if states:
            self._run_classify(states)
        else:
            self._tokenize(fresh)
            batch = self._next_batch()
            screened = len(batch)
            self._run_screen(batch)
        self._taken = ()
        seconds = time.perf_counter() - started
        self._recent.append(seconds)
        # A step with nothing screened counts for the inputs of others: each takes both kinds.
        self._pace += (seconds - screened * self._pace) / WINDOW
        return bool(states or fresh or self._window) or not worker.closing

    def _next_states(self) -> list[_ClassifyJob]:
        taken: list[_ClassifyJob] = []
        self._taken = taken
        while self._to_classify and len(taken) < WINDOW:
            taken.append(self._to_classify.popleft())
        return taken

    def _next_texts(self, most: int) -> list[_ScreenJob]:
        """Take texts off the queue, one of each caller in turn, so that nobody waits for a crowd.

        Those whose caller has gone are dropped before they cost anything.
        """
        taken: list[_ScreenJob] = []
        self._taken = taken
        while self._to_screen and len(taken) < most:
            caller = self._to_screen.popleft()
            job = caller.popleft()
            if caller:
                self._to_screen.append(caller)
            if not job.future.cancelled():
                taken.append(job)
        return taken

    def _tokenize(self, jobs: list[_ScreenJob]) -> None:
        texts = [job.given for job in jobs]
        encodings = self._outputs("tokenize", jobs, texts, self._engine.encode)
        refused = ScreenFailed("an input could not be tokenized")
        for job, encoding in zip(jobs, encodings, strict=True):
            if encoding is None:
                self._post([(job, refused)])
            else:
                self._window.append((job, encoding))

    def _next_batch(self) -> list[tuple[_ScreenJob, Encoding]]:
        """Take from the window the batch that is to run, which may be none."""
        self._drop_the_gone_and_the_late()
        lengths = [len(encoding) for _, encoding in self._window]
        batches = list(length_sorted_batches(lengths, self._settings.batch_tokens))
        if not batches:
            return []
        self._oldest_next = not self._oldest_next
        chosen = next(b for b in batches if 0 in b) if self._oldest_next else batches[-1]
        batch, taken = [self._window[i] for i in chosen], set(chosen)
        self._taken = [job for job, _ in batch]
        self._window = [one for i, one in enumerate(self._window) if i not in taken]
        return batch

    def _drop_the_gone_and_the_late(self) -> None:
        """Spend nothing on answers that come too late: under overload all of them would.

        A text may need two steps more, and of others that go first.
        """
        limit = self._settings.request_timeout_s
        born = time.perf_counter() - limit + min(2 * max(self._recent), limit / 2)
        late = [
            (job, TimedOut("the queue is too long")) for job, _ in self._window if job.queued < born
        ]
        self._post(late)
        self._window = [
            (job, encoding)
            for job, encoding in self._window
            if job.queued >= born and not job.future.cancelled()
        ]

    def _run_screen(self, batch: list[tuple[_ScreenJob, Encoding]]) -> None:
        jobs = [job for job, _ in batch]
        encodings = [encoding for _, encoding in batch]
        self._start(jobs, encodings)

        def screen(inputs: Sequence[Encoding]) -> Iterable[tuple[FloatArray, ClassifierState]]:
            return zip(*self._engine.screen(inputs), strict=True)

        rows = self._outputs("screen", jobs, encodings, screen)
        judged = [
            Screened(None, encoding) if row is None else self._judge(encoding, *row)
            for encoding, row in zip(encodings, rows, strict=True)
        ]
        self._post(list(zip(jobs, judged, strict=True)))

    def _judge(self, encoding: Encoding, readings: FloatArray, state: ClassifierState) -> Screened:
        try:
            return Screened(self._screen.judge(readings, encoding.truncated), state)
        except ScreenError:
            log.error("screen gave no finite readings")
            return Screened(None, state)

    def _run_classify(self, waiting: list[_ClassifyJob]) -> None:
        lengths = [len(job.given) for job in waiting]
        for batch in length_sorted_batches(lengths, self._settings.batch_tokens):
            jobs = [waiting[i] for i in batch if not waiting[i].future.cancelled()]
            states = [job.given for job in jobs]
            self._start(jobs, states)
            rows = self._outputs("classify", jobs, states, self._engine.classify)
            self._post([(job, _probabilities(row)) for job, row in zip(jobs, rows, strict=True)])

    def _start(self, jobs: Sequence[_Job[Any, Any]], states: Sequence[ClassifierState]) -> None:
        """Note how long the inputs of a batch have waited, and its size."""
        if not jobs:
            return
        now = time.perf_counter()
        for job in jobs:
            waited = now - job.queued - job.stages.get("tokenize", 0.0)
            self._metrics.stage_seconds["queue"].observe(waited)
            job.stages["queue"] = waited
        self._metrics.batch_inputs.observe(len(jobs))
        self._metrics.batch_tokens.observe(len(jobs) * max(map(len, states)))

    def _outputs(
        self,
        stage: str,
        jobs: Sequence[_Job[Any, Any]],
        inputs: Sequence[_In],
        run: Callable[[Sequence[_In]], Iterable[_Out]],
    ) -> list[_Out | None]:
        """Return what the engine makes of a batch; if it fails, each row is tried alone.

        None is for rows that fail again, and for those whose caller has gone meanwhile. Tokenizers
        in Rust panic past `Exception`.

        Raises:
            BaseException: every row failed, and a text that is known to be good did too.
        """
        if not inputs:
            return []
        started = time.perf_counter()
        outputs = self._together(stage, inputs, run)
        if outputs is None:
            outputs = [
                None if job.future.cancelled() else self._alone(stage, one, run)
                for job, one in zip(jobs, inputs, strict=True)
            ]
            if all(output is None for output in outputs):
                self._probe()
        seconds = time.perf_counter() - started
        self._metrics.stage_seconds[stage].observe(seconds)
        for job in jobs:
            job.stages[stage] = seconds
        return outputs

    def _together(
        self, stage: str, inputs: Sequence[_In], run: Callable[[Sequence[_In]], Iterable[_Out]]
    ) -> list[_Out | None] | None:
        """Return what the engine makes of a batch, or None if it fails.

        Rows are not tried in here: the exception holds what the batch has allocated, and after an
        out-of-memory error that is the memory that the rows need.
        """
        try:
            with self._worker.busy():
                return list(run(inputs))
        except BaseException as error:
            log.warning(
                "%s failed for a batch of %d, each is tried alone: %s",
                stage,
                len(inputs),
                type(error).__name__,
            )
            return None

    def _alone(
        self, stage: str, one: _In, run: Callable[[Sequence[_In]], Iterable[_Out]]
    ) -> _Out | None:
        try:
            with self._worker.busy():
                return next(iter(run([one])))
        except BaseException as error:
            # The type only: messages of tokenizers may quote the text.
            log.error("%s failed for one input: %s", stage, type(error).__name__)
            return None

    def _probe(self) -> None:
        """Raise unless the engine screens and classifies a text that is known to be good."""
        with self._worker.busy():
            readings, states = self._engine.screen(self._engine.encode(["warm up"]))
            self._screen.judge(readings[0])
            self._engine.classify(states)

    def _answer_taken(self) -> None:
        self._post([(job, NotReady("the inference worker died")) for job in self._taken])
        self._taken = ()

    def _answer_all(self) -> None:
        with self._worker.wake:
            waiting = [job for caller in self._to_screen for job in caller]
            left = [*self._taken, *(job for job, _ in self._window), *waiting, *self._to_classify]
            self._to_screen.clear()
            self._to_classify.clear()
        self._post([(job, NotReady("the inference worker stopped")) for job in left])

    def _post(self, answers: "Sequence[tuple[_Job[Given, Answer], Answer | Exception]]") -> None:
        if not answers:
            return
        try:
            self._loop.call_soon_threadsafe(_deliver, answers)
        except RuntimeError:
            log.warning("the event loop is gone; %d answers have no taker", len(answers))


def _probabilities(row: FloatArray | None) -> FloatArray | Exception:
    if row is None:
        return ClassifyFailed("the classifier failed on an input")
    if not (row == row).all():
        return ClassifyFailed("the classifier gave no finite probabilities")
    return row


async def _all(jobs: "Sequence[_Job[Given, Answer]]") -> "list[Timed[Answer]]":
    """Await all answers; the first failure is raised once every one is there."""
    answers = await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return [answer for answer in answers if not isinstance(answer, BaseException)]


def _deliver(answers: "Sequence[tuple[_Job[Given, Answer], Answer | Exception]]") -> None:
    """Set results; runs on the event loop. A waiter may have been cancelled in between."""
    for job, answer in answers:
        if job.future.done():
            continue
        if isinstance(answer, Exception):
            job.future.set_exception(answer)
        else:
            job.future.set_result(Timed(answer, job.stages))
