"""A cluster of gateways under load, simulated with SimPy; and what a billion requests a day need.

    python benchmarks/scaling.py --docs        # writes tables and plots into docs/scaling.md

Costs of a replica come from docs/performance.md, see `Costs`. What is simplified: requests have
one text; a replica is one server that takes the event loop's work and the forward pass in turn; the
batch is chosen from the window as service/inference/batcher.py does, by its own function, but texts
enter the window in the order of their arrival; classifying is part of the pass; networks take no
time. Admission is as there too, by the pace of the latest texts.
"""

import math
import re
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import simpy
import typer
from matplotlib.figure import Figure
from page import DOCS, fill, markdown

from models.engines.batching import length_sorted_batches
from service.inference.batcher import BATCH_TOKENS, WINDOW
from service.settings import Settings

LIMITS = Settings(bundle=Path("unused"))
GOAL_S = 0.5
"""The 99th percentile under which a cluster has recovered."""

FAILURES = ("shed", "late", "lost")
"""429, 504, and what a dead replica held or was still sent."""
OUTCOMES = ("answered", *FAILURES)
Text = tuple[float, int]
"""When it came, and its length in tokens."""
Steps = Generator[simpy.Event, None, None]


@dataclass(frozen=True)
class Costs:
    """Seconds of a replica with one core.

    The defaults give about what was measured of MiniLM by OpenVINO in float32 on SST-2's test
    texts: 185 and 222 texts a second in batches of 1 and 8, 323 sorted by length; and over HTTP
    196, a lone one in 7 ms.
    """

    step: float = 0.003
    """Of a forward pass, whatever is in it."""
    token: float = 0.00009
    """Of a padded token."""
    request: float = 0.0005
    """Of the event loop."""

    def of(self, lengths: Sequence[int]) -> float:
        """Return the time of a batch, longest first: passes of 8, 4, 2 or 1 texts, each padded."""
        seconds, start = len(lengths) * self.request, 0
        while left := len(lengths) - start:
            rows = min(8, 1 << (left.bit_length() - 1))
            seconds += self.step + rows * lengths[start] * self.token
            start += rows
        return seconds


@dataclass(frozen=True)
class Load:
    """Requests that come at random moments, in bursts, and from `step_at` on at another rate."""

    rate: float
    """Per second, outside bursts and before the step."""
    burst: float = 1
    """Times the rate, for `burst_s` on average, with `calm_s` on average between."""
    burst_s: float = 5
    calm_s: float = 25
    step: float = 1
    step_at: float = math.inf
    tokens: float = 25
    """Mean of a log-normal distribution, cut to what the model reads."""
    sigma: float = 0.5

    def lengths(self, rng: np.random.Generator, count: int) -> list[int]:
        """Return so many lengths in tokens."""
        drawn = rng.lognormal(math.log(self.tokens) - self.sigma**2 / 2, self.sigma, count)
        return [int(length) for length in np.clip(np.rint(drawn), 3, 512)]


@dataclass(frozen=True)
class Scaling:
    """A HorizontalPodAutoscaler as in deploy/k8s, and how fast new replicas come."""

    queue: float | None = 4
    """Target of the inputs that wait in a replica, by the mean of a minute; None: not asked."""
    busy: float | None = 0.7
    """Target of the share of a replica's core that is in use."""
    every_s: float = 15
    start_s: float = 45
    """From the decision to a ready replica: a place, an image that is there, and the start."""
    low: int = 2
    high: int = 40
    calm_s: float = 300
    """How long less is wanted before replicas are taken away."""


@dataclass(frozen=True)
class Setup:
    """What is simulated."""

    load: Load
    replicas: int
    seconds: float
    costs: Costs = Costs()
    scaling: Scaling | None = None
    lost: int = 0
    """Replicas that die at `lost_at` with all they hold; others come in `start_s`."""
    lost_at: float = math.inf
    noticed_s: float = 10
    """How long the balancer still sends to a dead one: two readiness probes."""
    least: bool = True
    """The balancer takes the replica with the fewest requests; else any, as kube-proxy does."""
    retries: bool = False
    """The balancer sends elsewhere what a dead one does not take."""
    window: int = WINDOW
    batch_tokens: int = BATCH_TOKENS["cpu"]
    seed: int = 0


@dataclass
class Run:
    """What came of each request, by when it came."""

    at: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in OUTCOMES})
    took: list[float] = field(default_factory=list)
    """Of those that were answered."""
    replicas: list[tuple[float, int]] = field(default_factory=list)
    """How many the balancer took for ready, over time."""
    inputs: list[int] = field(default_factory=list)
    """In all replicas, found by each request that came."""

    def share(self, *outcomes: str) -> float:
        """Return the share of all requests that ended so."""
        return sum(len(self.at[o]) for o in outcomes) / sum(map(len, self.at.values()))

    def percentile(self, q: float, since: float = 0) -> float:
        """Return a percentile of the time to an answer, of those that came after a while."""
        chosen = np.array(self.took)[np.array(self.at["answered"]) >= since]
        return float(np.percentile(chosen, q)) if len(chosen) else math.inf

    def slowest(self, since: float, until: float) -> list[float]:
        """Return the 99th percentile of each ten seconds, infinite where some request failed."""
        came, took = np.array(self.at["answered"]), np.array(self.took)
        failed = np.array([at for name in FAILURES for at in self.at[name]])
        found = []
        for start in np.arange(since, until, 10):
            chosen = took[(start <= came) & (came < start + 10)]
            fails = ((start <= failed) & (failed < start + 10)).any()
            found.append(math.inf if fails else float(np.percentile(chosen, 99)))
        return found

    def recovery(self, since: float, until: float) -> float | None:
        """Return how long after `since` all ten seconds are good ones again; None if never."""
        bad = [i for i, p99 in enumerate(self.slowest(since, until)) if p99 > GOAL_S]
        back = since + 10 * (bad[-1] + 1) if bad else since
        return None if back >= until else back - since


class Replica:
    """One process of the service."""

    def __init__(self, cluster: "Cluster", delay: float) -> None:
        self._cluster, self._env = cluster, cluster.env
        self._waiting: deque[Text] = deque()
        self._window: list[Text] = []
        self._taken: list[Text] = []
        self._wake = self._env.event()
        self.inputs, self._pace = 0, 0.0
        self.ready = self.dead = self.leaving = False
        self.process = self._env.process(self._run(delay))

    def take(self, text: Text) -> None:
        """Admit a text, or refuse it."""
        full = self.inputs >= LIMITS.queue_inputs or self.inputs * self._pace > LIMITS.queue_s
        if self.dead or full:
            self._cluster.end(text, "lost" if self.dead else "shed")
            return
        self.inputs += 1
        self._cluster.inputs += 1
        self._waiting.append(text)
        if not self._wake.triggered:
            self._wake.succeed()

    def _run(self, delay: float) -> Steps:
        try:
            yield self._env.timeout(delay)
            self.ready = True
            oldest = False
            while not (self.leaving and not self.inputs):
                self._fill()
                if not self._window:
                    self._wake = self._env.event()
                    yield self._wake
                    continue
                oldest = not oldest
                self._taken = self._batch(oldest)
                seconds = self._cluster.setup.costs.of([tokens for _, tokens in self._taken])
                self._cluster.busy_s += seconds
                yield self._env.timeout(seconds)
                self._pace += (seconds - len(self._taken) * self._pace) / WINDOW
                self._end(self._taken, "answered")
                self._taken = []
        except simpy.Interrupt:
            self.dead, self.ready = True, False
            self._end([*self._taken, *self._window, *self._waiting], "lost")

    def _fill(self) -> None:
        room = self._cluster.setup.window - len(self._window)
        self._window += [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        born = self._env.now - LIMITS.request_timeout_s
        late = [text for text in self._window if text[0] < born]
        if late:
            self._window = [text for text in self._window if text[0] >= born]
            self._end(late, "late")

    def _batch(self, oldest: bool) -> list[Text]:
        lengths = [tokens for _, tokens in self._window]
        batches = list(length_sorted_batches(lengths, self._cluster.setup.batch_tokens))
        chosen = next(b for b in batches if 0 in b) if oldest else batches[-1]
        batch, taken = [self._window[i] for i in chosen], set(chosen)
        self._window = [text for i, text in enumerate(self._window) if i not in taken]
        return batch

    def _end(self, texts: list[Text], outcome: str) -> None:
        self.inputs -= len(texts)
        self._cluster.inputs -= len(texts)
        for text in texts:
            self._cluster.end(text, outcome)


class Cluster:
    """Replicas behind a balancer, an autoscaler, and those who ask."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.run = setup, Run()
        self.env = simpy.Environment()
        self.inputs, self.busy_s = 0, 0.0
        self._rng = np.random.default_rng(setup.seed)
        self.replicas = [Replica(self, 0) for _ in range(setup.replicas)]
        self._known: list[Replica] = []
        self.env.process(self._ask())
        if setup.scaling:
            self.env.process(self._scale(setup.scaling))
        if setup.lost:
            self.env.process(self._lose())

    def end(self, text: Text, outcome: str) -> None:
        """Note what became of a text."""
        self.run.at[outcome].append(text[0])
        if outcome == "answered":
            self.run.took.append(self.env.now - text[0])

    def _ask(self) -> Steps:
        load, rng = self.setup.load, self._rng
        burst, until = False, rng.exponential(load.calm_s)
        yield self.env.timeout(1e-9)  # replicas of the start are ready
        self.refresh()
        while True:
            gaps = rng.exponential(1, 1000).tolist()
            for gap, tokens in zip(gaps, load.lengths(rng, 1000), strict=True):
                if self.env.now > until:
                    burst = not burst
                    until = self.env.now + rng.exponential(load.burst_s if burst else load.calm_s)
                rate = load.rate * (load.burst if burst else 1)
                rate *= load.step if self.env.now >= load.step_at else 1
                yield self.env.timeout(gap / rate)
                self._choose().take((self.env.now, tokens))

    def _choose(self) -> Replica:
        self.run.inputs.append(self.inputs)
        known = self._known
        if self.setup.retries:
            known = [one for one in known if not one.dead]
        if self.setup.least:
            return min(known, key=lambda one: one.inputs)
        return known[self._rng.integers(len(known))]

    def refresh(self) -> None:
        """Let the balancer know who is ready; one that died is taken for it until it is noticed."""
        serving = (one for one in self.replicas if one.ready or one.dead)
        self._known = [one for one in serving if not one.leaving]
        self.run.replicas.append((self.env.now, len(self._known)))

    def _add(self, count: int, delay: float) -> Steps:
        self.replicas += [Replica(self, delay) for _ in range(count)]
        yield self.env.timeout(delay + 1e-9)
        self.refresh()

    def _lose(self) -> Steps:
        yield self.env.timeout(self.setup.lost_at)
        for one in self._known[: self.setup.lost]:
            one.process.interrupt()
        yield self.env.timeout(self.setup.noticed_s)
        self.replicas = [one for one in self.replicas if not one.dead]
        self.refresh()
        start = (self.setup.scaling or Scaling()).start_s
        self.env.process(self._add(self.setup.lost, start))

    def _scale(self, scaling: Scaling) -> Steps:
        waiting: deque[float] = deque(maxlen=round(60 / scaling.every_s))
        wanted: deque[int] = deque(maxlen=round(scaling.calm_s / scaling.every_s))
        worked = 0.0
        while True:
            yield self.env.timeout(scaling.every_s)
            there = [one for one in self.replicas if not one.leaving and not one.dead]
            waiting.append(self.inputs)
            busy, worked = (self.busy_s - worked) / scaling.every_s, self.busy_s
            asked = [(float(np.mean(waiting)), scaling.queue), (busy, scaling.busy)]
            now = len(there)
            wanted.append(max(_wanted(now, value, target) for value, target in asked if target))
            count = min(wanted[-1], max(2 * now, now + 4), scaling.high)
            if count > now:
                self.env.process(self._add(count - now, scaling.start_s))
            elif len(wanted) == wanted.maxlen and max(wanted) < now:
                for one in there[max(max(wanted), scaling.low) :]:
                    one.leaving = True
                self.refresh()


def _wanted(now: int, total: float, target: float) -> int:
    """Return how many replicas a metric wants, with Kubernetes' tolerance of a tenth."""
    return now if abs(total / (now * target) - 1) <= 0.1 else math.ceil(total / target)


def simulate(setup: Setup) -> Run:
    """Run a setup to its end."""
    cluster = Cluster(setup)
    cluster.env.run(setup.seconds)
    return cluster.run


# What a replica is, and what it takes to serve so many requests.

BILLION, DAY_S = 1e9, 86_400
PEAK, UTILIZATION = 2.5, 0.6
"""The busiest minute over the mean of the day; how much of what it can do a replica does then."""
SPARE = 1.1
"""A tenth more, so that a zone's or a node's loss is not felt."""


@dataclass(frozen=True)
class Measured:
    """What docs/performance.md has of the gateway."""

    http: dict[str, tuple[float, float]]
    """By dtype: answers a second at best, and the peak of its memory in MB."""
    growth: dict[tuple[int, int], float]
    """By tokens and layers: ms of a text, in the largest batch that was measured."""


def measured(page: str) -> Measured:
    """Read the gateway's figures off the tables of docs/performance.md."""
    rows = re.findall(r"^\| PSIM Gateway \(guarded\).*$", page, re.M)
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    http = {row[1]: (float(row[5].split()[0]), float(row[7])) for row in cells}
    growth: dict[tuple[int, int], float] = {}
    _, table = page.split("<!-- bench:growth -->")
    header, _, *lines = re.findall(r"^\| .*$", table, re.M)[:7]
    layers = [int(name.split()[0]) for name in header.split("|")[2:-1]]
    for line in lines:
        tokens, *times = (cell.strip() for cell in line.split("|")[1:-1])
        for of, time in zip(layers, times, strict=True):
            if time != "-":
                growth[int(tokens), of] = float(time.split()[0])  # larger batches come later
    return Measured(http, growth)


def replicas_for(per_second: float, requests: float = BILLION) -> int:
    """Return how many replicas that can each answer so many serve a day's requests."""
    peak = requests / DAY_S * PEAK
    return math.ceil(peak / (per_second * UTILIZATION) * SPARE)


def plan_tables(found: Measured) -> tuple[str, str]:
    """Return the tables of a billion requests: as measured over HTTP, and by size of the model."""
    rows = [
        [dtype, f"{rate:.0f}", f"{rate * UTILIZATION:.0f}", f"{replicas_for(rate):,}",
         f"{replicas_for(rate) * peak_mb / 1024:,.0f}"]
        for dtype, (rate, peak_mb) in found.http.items()
    ]  # fmt: skip
    over_http = markdown(
        ["MiniLM, SST-2", "texts/s per core", "planned texts/s per core", "cores", "memory, GB"],
        rows,
    )
    layers = sorted({of for _, of in found.growth})
    by_size = []
    for tokens in sorted({t for t, _ in found.growth}):
        rates = [1000 / (found.growth[tokens, of] + 1000 * Costs.request) for of in layers]
        by_size.append([str(tokens), *(f"{r:.0f} / {replicas_for(r):,}" for r in rates)])
    return over_http, markdown(["tokens", *(f"{of} layers" for of in layers)], by_size)


# What is simulated for docs/scaling.md.

REPLICAS = 10
LOADS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.3, 1.5)
STEP = 3
WAYS = {"random": (False, 1.0), "fewest": (True, 1.0), "fewest, bursts": (True, 1.6)}
"""Whether the balancer takes the one with the fewest, and how many times the rate a burst is."""
SIGNALS = {
    "queue": Scaling(busy=None), "processor": Scaling(queue=None), "both": Scaling(),
    "neither": None,
}  # fmt: skip


def saturated(seed: int = 0) -> float:
    """Return how many texts a second one replica answers that always has more to do."""
    seconds = 20
    return len(simulate(Setup(Load(400), 1, seconds, seed=seed)).took) / seconds


def sweep(one: float) -> dict[str, list[Run]]:
    """Return runs for each way to balance, and each load as a share of what was measured."""
    runs: dict[str, list[Run]] = {}
    for name, (least, burst) in WAYS.items():
        # Bursts are part of the mean.
        mean = 1 + (burst - 1) * Load.burst_s / (Load.burst_s + Load.calm_s)
        loads = [Load(REPLICAS * one * share / mean, burst) for share in LOADS]
        runs[name] = [simulate(Setup(load, REPLICAS, 60, least=least)) for load in loads]
    return runs


def load_table(runs: dict[str, list[Run]]) -> str:
    """Return p50, p99 and what was refused by load and way."""
    rows = []
    for number, share in enumerate(LOADS):
        cells = [
            f"{1000 * run.percentile(50, 10):.0f} / {1000 * run.percentile(99, 10):,.0f}"
            + (f" ({run.share(*FAILURES):.1%} refused)" if run.share(*FAILURES) else "")
            for run in (found[number] for found in runs.values())
        ]
        rows.append([f"{share:.0%}", *cells])
    return markdown(["load", *(f"{name}, ms" for name in runs)], rows)


def events(one: float) -> dict[str, tuple[Setup, Run]]:
    """Return what autoscaling makes of a load that triples, and what is lost with replicas."""
    base = Setup(Load(REPLICAS * one * UTILIZATION), REPLICAS, 420)
    step = replace(base, load=replace(base.load, step=STEP, step_at=60))
    setups = {
        f"load triples, scaled by {name}": replace(step, scaling=s) for name, s in SIGNALS.items()
    }
    for lost in (1, REPLICAS // 2):
        loss = replace(base, lost=lost, lost_at=60)
        name = f"{lost} of {REPLICAS} replicas lost"
        setups[f"{name}, random"] = replace(loss, least=False)
        setups[f"{name}, fewest"] = loss
        setups[f"{name}, fewest, retried"] = replace(loss, retries=True)
    return {name: (setup, simulate(setup)) for name, setup in setups.items()}


def event_table(found: dict[str, tuple[Setup, Run]]) -> str:
    """Return what became of the requests, and how long it took to be as before."""
    rows = []
    for name, (setup, run) in found.items():
        back = run.recovery(60, setup.seconds)
        rows.append([
            name, f"{run.percentile(50, 60):.2f} / {run.percentile(99, 60):.2f}",
            *(f"{run.share(outcome):.2%}" for outcome in FAILURES),
            "never" if back is None else f"{back:.0f}", str(run.replicas[-1][1]),
        ])  # fmt: skip
    return markdown(
        ["event", "p50 / p99, s", "429", "504", "lost", "recovery, s", "replicas at the end"],
        rows,
    )


def plot(runs: dict[str, list[Run]], found: dict[str, tuple[Setup, Run]]) -> Figure:
    """Plot p99 over load, and p99 and replicas over time where the load doubles."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, those in runs.items():
        left.plot(LOADS, [1000 * run.percentile(99, 10) for run in those], "o-", label=name)
    left.set(
        title="99th percentile by load",
        xlabel="load / measured capacity",
        ylabel="ms",
        yscale="log",
    )
    left.legend(fontsize="small")
    count = right.twinx()
    for name, (setup, run) in found.items():
        if setup.load.step > 1:
            p99 = run.slowest(0, setup.seconds)
            starts = 10 * np.arange(len(p99))
            (line,) = right.plot(starts, p99, label=name.split(", ")[1])
            times, there = zip(*run.replicas, (setup.seconds, run.replicas[-1][1]), strict=True)
            count.step(times, there, ":", where="post", color=line.get_color())
    right.set(
        title="the load triples at 60 s",
        xlabel="s",
        ylabel="99th percentile, s (lines; gaps: refused)",
    )
    right.set(yscale="log")
    count.set(ylabel="replicas (dotted)", ylim=(0, None))
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def main(docs: bool = False) -> None:
    found = measured((DOCS / "performance.md").read_text())
    over_http, by_size = plan_tables(found)
    one, _ = found.http["float32"]
    lone = simulate(Setup(Load(1), 1, 300)).percentile(50)
    one_at_70 = simulate(Setup(Load(0.7 * one), 1, 120))
    replica = markdown(
        ["one replica", "simulated"],
        [
            ["texts/s at saturation", f"{saturated():.0f}"],
            ["p50 of a lone request, ms", f"{1000 * lone:.1f}"],
            ["p99 / p50 at 70 % of the throughput measured over HTTP",
             f"{one_at_70.percentile(99, 10) / one_at_70.percentile(50, 10):.1f}"],
        ],
    )  # fmt: skip
    runs, happened = sweep(one), events(one)
    parts = {
        "plan": over_http, "size": by_size, "replica": replica,
        "load": load_table(runs), "events": event_table(happened),
    }  # fmt: skip
    for name, part in parts.items():
        print(f"{name}\n\n{part}\n")
    if docs:
        fill(DOCS / "scaling.md", "scaling", parts)
        plot(runs, happened).savefig(DOCS / "img/scaling.png", dpi=110)


if __name__ == "__main__":
    typer.run(main)
