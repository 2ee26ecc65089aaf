"""Dynamic batches in one inference thread: engine and tokenizer are not thread-safe.

Batches form while the device is busy; no text waits for others to arrive. Callers take turns, text
by text, at entering a window of tokenized texts. The window is sorted by length and cut into
batches by a token budget. The batch with the shortest text and the batch with the oldest text run
alternately: a short text does not wait for long ones, and no text waits for ever. Classifying goes
before screening, since it finishes requests. Whole long texts are tokenized in a thread of their
own, so that no batch waits for them.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from models.bundle.load import Bundle
from models.detection.screen import FloatArray, Verdict, worst_verdict
from models.engines.base import ClassifierState, Encoding, IntArray, Withheld
from models.engines.batching import length_sorted_batches
from service.errors import ClassifyFailed, NotReady, ScreenFailed, TimedOut
from service.inference.admission import Admission
from service.inference.worker import Health, Worker
from service.observability.metrics import ModelMetrics
from service.settings import InferenceSettings

log = logging.getLogger(__name__)

WINDOW = 64
"""Texts that a batch is chosen from at least, and states that one step classifies at most."""
BATCH_TOKENS = {"cpu": 1536, "cuda": 16384}
"""Padded tokens per forward pass, by device. A CPU takes as long for each token. A GPU takes hardly
longer for 4,096 than for 32, and under twice as long for 16,384 (BERT base on an H100)."""
SHORT = 32
"""Tokens of a short text: batches of such texts should be as large as the others."""

PASS_TOKENS = 512
"""What a pass on a long text is counted by: it counts as one for each so many tokens begun."""
CHARACTERS_PER_TOKEN = 4
"""As in English; passes are charged before a text is tokenized."""

Charge = Callable[[int], Awaitable[None]]
"""Charges somebody for passes before they are run; raises if they are not to be run."""
Input = TypeVar("Input")
Answer = TypeVar("Answer")
_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class Screened:
    """A screened input: its verdict, and its state for the classifier."""

    verdict: Verdict | None
    """None if screening failed; this does not mean clean."""
    state: ClassifierState
    """Where the classifier continues."""
    tokens: int
    """How many tokens were screened, with special tokens."""
    ids: IntArray
    """Those tokens, without special tokens."""
    readings: FloatArray | None
    """What the verdict is from, shape (V, C); None if screening failed."""
    by_view: Sequence[Verdict] = ()
    """Verdicts of the first stage in all views of the classifier, the worst of which is the
    verdict."""
    settled: bool = True
    """False if the override test was due and could not be run, so that the verdict may change."""


@dataclass(frozen=True, slots=True)
class Timed(Generic[Answer]):
    """An answer, with the seconds that each stage took."""

    value: Answer
    stages: dict[str, float]


@dataclass(eq=False, slots=True)
class _Job(Generic[Input, Answer]):
    input: Input
    future: "asyncio.Future[Timed[Answer]]"
    stages: dict[str, float] = field(default_factory=dict)
    queued: float = field(default_factory=time.perf_counter)


_ScreenJob = _Job[str | Encoding, Screened]
_ClassifyJob = _Job[ClassifierState, FloatArray]


async def free(passes: int) -> None:
    """Charge nobody: the service's own work."""


class Screener(Protocol):
    """Screens texts."""

    @property
    def health(self) -> Health:
        """State of the inference worker."""

    @property
    def override_test(self) -> str | None:
        """See `TwoStageScreener.override_test`; without a test, there is no `keep`."""

    async def screen(self, texts: Sequence[str], charge: Charge) -> list[Timed[Screened]]:
        """Screen texts, as `Batcher.screen` does."""

    async def keep(
        self, parts: Sequence[str], text: str, verdict: Verdict, charge: Charge
    ) -> list[float]:
        """Return override scores of parts of a text, see `TwoStageScreener.keep`."""


class Batcher:
    """Owns the engine of `bundle`; methods are called on one event loop.

    Raises from `screen` and `classify`:
        Overloaded: the queue is full; nothing was queued.
        NotReady: the worker is not running, or died while it worked on the input.
    """

    def __init__(self, bundle: Bundle, settings: InferenceSettings, metrics: ModelMetrics) -> None:
        self._engine, self._screen = bundle.engine, bundle.screen
        self._settings, self._metrics = settings, metrics
        self._batch_tokens = settings.batch_tokens or BATCH_TOKENS[self._engine.device_type]
        self._window_size = max(WINDOW, self._batch_tokens // SHORT)
        self._admission = Admission(settings, metrics, self._window_size)
        self._to_screen: deque[deque[_ScreenJob]] = deque()
        """One queue per caller; the next caller comes first."""
        self._to_classify: deque[_ClassifyJob] = deque()
        self._window: list[tuple[_ScreenJob, Encoding]] = []
        """Oldest first. Only the worker changes it."""
        self._taken: Sequence[_Job[Any, Any]] = ()
        """Jobs in the worker's hands; set before they leave their queue, so that none is lost."""
        self._oldest_next = False
        self._recent: deque[float] = deque([0.0], maxlen=16)
        """Seconds of the latest steps."""
        self._tokenizing = ThreadPoolExecutor(1, "tokenizing")
        self._worker = Worker(
            self._step, self._probe, self._fail_taken, self._fail_all, settings, metrics
        )

    def start(self) -> None:
        """Start the inference thread, from the event loop that will call."""
        self._loop = asyncio.get_running_loop()
        self._worker.start()

    @property
    def health(self) -> Health:
        """State of the inference thread."""
        return self._worker.health

    @property
    def alive(self) -> bool:
        """Whether the worker is running."""
        return self.health is Health.RUNNING

    @property
    def window_length(self) -> int:
        """How many tokens of a text the model reads at once, beside the special tokens."""
        return self._engine.window_length

    @property
    def queued_characters(self) -> int:
        """How many characters wait or run."""
        return self._admission.characters

    async def close(self) -> None:
        """Answer all queued jobs, then stop the worker; later calls raise `NotReady`."""
        await self._worker.close(self._settings.drain_s)
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    async def screen(self, texts: Sequence[str], charge: Charge = free) -> list[Timed[Screened]]:
        """Screen texts, each in one pass, which counts as several if it is long.

        Raises:
            ServiceError: `charge` refuses the passes.
            ScreenFailed: a text cannot be tokenized.
            TimedOut: the queue was so long that the answer would have been late.
        """
        return await self._screen_all(texts, charge)

    async def screen_tokens(
        self, windows: Sequence[IntArray], charge: Charge = free
    ) -> list[Timed[Screened]]:
        """Screen parts of texts, each of up to `window_length` tokens, as `screen` does."""
        return await self._screen_all([self._engine.window(ids) for ids in windows], charge)

    async def token_ids(self, text: str) -> Timed[IntArray]:
        """Tokenize a whole text, without special tokens.

        Raises:
            ScreenFailed: it cannot be tokenized.
        """
        self._require_worker()
        started = time.perf_counter()
        ids = await self._loop.run_in_executor(self._tokenizing, self._tokenize_whole, text)
        if ids is None:
            raise ScreenFailed("an input could not be tokenized")
        seconds = time.perf_counter() - started
        self._metrics.stage_seconds["tokenize"].observe(seconds)
        return Timed(ids, {"tokenize": seconds})

    async def classify(self, states: Sequence[ClassifierState]) -> list[Timed[FloatArray]]:
        """Return the classifier's probabilities, each of shape (C,); any failure fails the call."""
        jobs = [_ClassifyJob(state, self._loop.create_future()) for state in states]
        known = [(job, job.input.probabilities) for job in jobs if isinstance(job.input, Withheld)]
        _deliver([(job, _probabilities(row)) for job, row in known])
        if len(known) < len(jobs):
            self._enqueue(self._to_classify, [job for job in jobs if not job.future.done()])
        return await _all(jobs)

    async def _screen_all(
        self, inputs: Sequence[str | Encoding], charge: Charge
    ) -> list[Timed[Screened]]:
        await charge(sum(map(self._passes, inputs)))
        jobs = [_ScreenJob(input, self._loop.create_future()) for input in inputs]
        with self._admission.admit(tuple(job.future for job in jobs), sum(map(len, inputs))):
            self._enqueue(self._to_screen, [deque(jobs)])
            return await _all(jobs)

    def _passes(self, input: str | Encoding) -> int:
        """Return as how many passes an input is charged."""
        tokens = len(input) / CHARACTERS_PER_TOKEN if isinstance(input, str) else len(input)
        return max(1, math.ceil(min(tokens, self.window_length) / PASS_TOKENS))

    def _tokenize_whole(self, text: str) -> IntArray | None:
        """Return None if it fails; runs in the tokenizing thread."""
        try:
            return self._engine.token_ids(text)
        except BaseException as error:  # as tokenizers in Rust panic
            log.error("tokenize failed for a whole input: %s", type(error).__name__)
            return None

    def _require_worker(self) -> None:
        # A worker that is being restarted will soon run again, or fail all jobs.
        if self.health not in (Health.RUNNING, Health.RESTARTING):
            raise NotReady(f"the inference worker {self.health}")

    def _enqueue(self, queue: "deque[Input]", items: "Iterable[Input]") -> None:
        with self._worker.wake:
            self._require_worker()
            queue.extend(items)
            self._worker.wake.notify()

    # Everything below runs in the inference thread.

    def _step(self) -> bool:
        """Classify all states, or else screen a batch; return False when closed and done."""
        worker = self._worker
        with worker.wake:
            if not self._window:
                worker.wake.wait_for(lambda: self._to_classify or self._to_screen or worker.closing)
            states = self._next_states()
            texts = [] if states else self._next_texts(self._window_size - len(self._window))
        started, screened = time.perf_counter(), 0
        if states:
            self._run_classify(states)
        else:
            self._tokenize(texts)
            batch = self._next_batch()
            screened = len(batch)
            self._run_screen(batch)
        self._taken = ()
        seconds = time.perf_counter() - started
        self._recent.append(seconds)
        self._admission.measure(seconds, screened)
        return bool(states or texts or self._window) or not worker.closing

    def _next_states(self) -> list[_ClassifyJob]:
        taken: list[_ClassifyJob] = []
        self._taken = taken
        while self._to_classify and len(taken) < WINDOW:
            taken.append(self._to_classify.popleft())
        return taken

    def _next_texts(self, limit: int) -> list[_ScreenJob]:
        """Take texts off the queue, one of each caller in turn, so that no caller blocks others.

        Texts whose caller has gone are dropped before they cost anything.
        """
        taken: list[_ScreenJob] = []
        self._taken = taken
        while self._to_screen and len(taken) < limit:
            caller = self._to_screen.popleft()
            job = caller.popleft()
            if caller:
                self._to_screen.append(caller)
            if not job.future.cancelled():
                taken.append(job)
        return taken

    def _tokenize(self, jobs: list[_ScreenJob]) -> None:
        """Put jobs into the window; those of parts of texts are tokenized already."""
        ready = [(job, job.input) for job in jobs if isinstance(job.input, Encoding)]
        self._window += ready
        texts = [(job, job.input) for job in jobs if isinstance(job.input, str)]
        unread = [job for job, _ in texts]
        encodings = self._outputs(
            "tokenize", unread, [text for _, text in texts], self._engine.encode
        )
        refused = ScreenFailed("an input could not be tokenized")
        for job, encoding in zip(unread, encodings, strict=True):
            if encoding is None:
                self._post([(job, refused)])
            else:
                self._window.append((job, encoding))

    def _next_batch(self) -> list[tuple[_ScreenJob, Encoding]]:
        """Take the next batch out of the window; it may be empty."""
        self._drop_cancelled_and_late()
        lengths = [len(encoding) for _, encoding in self._window]
        batches = list(length_sorted_batches(lengths, self._batch_tokens, self._window_size))
        if not batches:
            return []
        self._oldest_next = not self._oldest_next
        chosen = next(b for b in batches if 0 in b) if self._oldest_next else batches[-1]
        batch, taken = [self._window[i] for i in chosen], set(chosen)
        self._taken = [job for job, _ in batch]
        self._window = [pair for i, pair in enumerate(self._window) if i not in taken]
        return batch

    def _drop_cancelled_and_late(self) -> None:
        """Spend nothing on answers that would be late: under overload, all would be.

        A text may take two more steps, since another batch may go first.
        """
        limit = self._settings.request_timeout_s
        oldest = time.perf_counter() - limit + min(2 * max(self._recent), limit / 2)
        late = [
            (job, TimedOut("the queue is too long"))
            for job, _ in self._window
            if job.queued < oldest
        ]
        self._post(late)
        self._window = [
            (job, encoding)
            for job, encoding in self._window
            if job.queued >= oldest and not job.future.cancelled()
        ]

    def _run_screen(self, batch: list[tuple[_ScreenJob, Encoding]]) -> None:
        jobs = [job for job, _ in batch]
        encodings = [encoding for _, encoding in batch]
        self._observe_batch(jobs, encodings)

        def screen(inputs: Sequence[Encoding]) -> Iterable[tuple[FloatArray, ClassifierState]]:
            return zip(*self._engine.screen(inputs), strict=True)

        rows = self._outputs("screen", jobs, encodings, screen)
        self._post([*zip(jobs, self._judge(encodings, rows), strict=True)])

    def _judge(
        self,
        encodings: Sequence[Encoding],
        rows: Sequence[tuple[FloatArray, ClassifierState] | None],
    ) -> list[Screened]:
        """Return what is known of each text, given its readings and state; None if it failed."""
        readings = [row[0] for row in rows if row]
        truncated = [text.truncated for text, row in zip(encodings, rows, strict=True) if row]
        judged = iter(
            self._screen.verdicts_of_batch(np.stack(readings), truncated) if readings else ()
        )
        return [
            self._screened(encoding, *row, next(judged)) if row else self._failed(encoding)
            for encoding, row in zip(encodings, rows, strict=True)
        ]

    def _screened(
        self,
        encoding: Encoding,
        readings: FloatArray,
        state: ClassifierState,
        by_view: Sequence[Verdict] | None,
    ) -> Screened:
        if by_view is None:
            log.error("screen gave no finite readings")
        verdict = worst_verdict(by_view) if by_view else None
        ids = self._engine.content(encoding)
        return Screened(verdict, state, len(encoding), ids, readings, by_view or ())

    def _failed(self, encoding: Encoding) -> Screened:
        return Screened(None, encoding, len(encoding), self._engine.content(encoding), None)

    def _run_classify(self, waiting: list[_ClassifyJob]) -> None:
        lengths = [len(job.input) for job in waiting]
        for batch in length_sorted_batches(lengths, self._batch_tokens):
            jobs = [waiting[i] for i in batch if not waiting[i].future.cancelled()]
            states = [job.input for job in jobs]
            self._observe_batch(jobs, states)
            rows = self._outputs("classify", jobs, states, self._engine.classify)
            self._post([(job, _probabilities(row)) for job, row in zip(jobs, rows, strict=True)])

    def _observe_batch(
        self, jobs: Sequence[_Job[Any, Any]], states: Sequence[ClassifierState]
    ) -> None:
        """Record the size of a batch, and how long its inputs have waited."""
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
        inputs: Sequence[Input],
        run: Callable[[Sequence[Input]], Iterable[_Row]],
    ) -> list[_Row | None]:
        """Run the engine on a batch; if that fails, on each input alone.

        None stands for inputs that fail alone too, or whose caller has gone meanwhile. Tokenizers
        in Rust panic past `Exception`.

        Raises:
            BaseException: every input failed, and so did a text that is known to be good.
        """
        if not inputs:
            return []
        started = time.perf_counter()
        outputs = self._run_batch(stage, inputs, run)
        if outputs is None:
            outputs = [
                None if job.future.cancelled() else self._run_alone(stage, input, run)
                for job, input in zip(jobs, inputs, strict=True)
            ]
            if all(output is None for output in outputs):
                self._probe()
        seconds = time.perf_counter() - started
        self._metrics.stage_seconds[stage].observe(seconds)
        for job in jobs:
            job.stages[stage] = seconds
        return outputs

    def _run_batch(
        self, stage: str, inputs: Sequence[Input], run: Callable[[Sequence[Input]], Iterable[_Row]]
    ) -> list[_Row | None] | None:
        """Run the engine on a batch; return None if it fails.

        Inputs are not retried in here: the exception keeps alive what the batch has allocated, and
        after an out-of-memory error the retries need that memory.
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

    def _run_alone(
        self, stage: str, input: Input, run: Callable[[Sequence[Input]], Iterable[_Row]]
    ) -> _Row | None:
        try:
            with self._worker.busy():
                return next(iter(run([input])))
        except BaseException as error:
            # Only the type: messages of tokenizers may quote the text.
            log.error("%s failed for one input: %s", stage, type(error).__name__)
            return None

    def _probe(self) -> None:
        """Raise unless the engine screens and classifies a text that is known to be good."""
        with self._worker.busy():
            readings, states = self._engine.screen(self._engine.encode(["warm up"]))
            self._screen.judge(readings[0])
            self._engine.classify(states)

    def _fail_taken(self) -> None:
        self._post([(job, NotReady("the inference worker died")) for job in self._taken])
        self._taken = ()

    def _fail_all(self) -> None:
        with self._worker.wake:
            waiting = [job for caller in self._to_screen for job in caller]
            left = [*self._taken, *(job for job, _ in self._window), *waiting, *self._to_classify]
            self._to_screen.clear()
            self._to_classify.clear()
        self._post([(job, NotReady("the inference worker stopped")) for job in left])

    def _post(self, answers: "Sequence[tuple[_Job[Input, Answer], Answer | Exception]]") -> None:
        if not answers:
            return
        try:
            self._loop.call_soon_threadsafe(_deliver, answers)
        except RuntimeError:
            log.warning("the event loop is gone; %d answers are lost", len(answers))


def _probabilities(row: FloatArray | None) -> FloatArray | Exception:
    if row is None:
        return ClassifyFailed("the classifier failed on an input")
    if not (row == row).all():
        return ClassifyFailed("the classifier gave no finite probabilities")
    return row


async def _all(jobs: "Sequence[_Job[Input, Answer]]") -> "list[Timed[Answer]]":
    """Await all answers, then raise the first failure if there is one."""
    answers = await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return [answer for answer in answers if not isinstance(answer, BaseException)]


def _deliver(answers: "Sequence[tuple[_Job[Input, Answer], Answer | Exception]]") -> None:
    """Set results, on the event loop; a waiter may have been cancelled meanwhile."""
    for job, answer in answers:
        if job.future.done():
            continue
        if isinstance(answer, Exception):
            job.future.set_exception(answer)
        else:
            job.future.set_result(Timed(answer, job.stages))
