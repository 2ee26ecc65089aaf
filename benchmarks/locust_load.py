"""Load on one server, by Locust as a library; runs in Locust's own environment.

Levels run one after another on the same server, each with so many keep-alive connections. Without a
rate, each sends its next request when it has the answer. With one, requests come at random moments
(a Poisson process) whether or not earlier ones are answered, and times count from the moment at
which a request was due.

    python benchmarks/locust_load.py < spec.json > results.json
"""

import itertools
import json
import random
import sys
import time
from typing import Any

import gevent
import locust
from locust.contrib.fasthttp import FastHttpUser
from locust.env import Environment

GIVE_UP_S = 60.0
"""For answers that never come: a hung server is a result too."""


class Sender(FastHttpUser):  # type: ignore[misc]
    """One connection."""

    connection_timeout = network_timeout = GIVE_UP_S
    bodies: "itertools.cycle[bytes]"
    path = "/"
    rate: float | None = None
    """Requests per second of this connection alone."""
    answers: "list[tuple[float, float, int]]"
    """When a request ended, how many seconds it took, and its status."""

    def on_start(self) -> None:
        """Begin at a random moment, so that connections with a rate do not march in step."""
        self.due = time.perf_counter()
        gevent.sleep(self.wait_time())

    def wait_time(self) -> float:
        """Return the time to the next request."""
        if self.rate is None:
            return 0
        self.due += random.expovariate(self.rate)
        return max(0.0, self.due - time.perf_counter())

    @locust.task  # type: ignore[untyped-decorator]
    def post(self) -> None:
        """Send one request."""
        started = time.perf_counter() if self.rate is None else self.due
        response = self.client.post(
            self.path, data=next(self.bodies), headers={"content-type": "application/json"}
        )
        now = time.perf_counter()
        self.answers.append((now, now - started, response.status_code))


def run(spec: dict[str, Any], level: dict[str, Any], bodies: "itertools.cycle[bytes]") -> Any:
    """Return answers per second after the warm-up, and times and statuses of what was sent then.

    Refusals come fast and cost little; only their statuses are counted.
    """
    connections, rate = level["connections"], level.get("rate")
    answers: list[tuple[float, float, int]] = []
    user = type(
        "User",
        (Sender,),
        {
            "host": spec["host"],
            "path": spec["path"],
            "bodies": bodies,
            "rate": rate and rate / connections,
            "answers": answers,
        },
    )
    runner = Environment(user_classes=[user], stop_timeout=GIVE_UP_S).create_local_runner()
    runner.start(connections, spawn_rate=connections)
    gevent.sleep(level["warm_up"])
    started = time.perf_counter()
    gevent.sleep(level["seconds"])
    ended = time.perf_counter()
    runner.quit()  # what was sent is still answered
    counted = [
        (end, took, status) for end, took, status in answers if started <= end - took < ended
    ]
    return {
        **level,
        "per_second": sum(
            started <= end < ended and status in spec["answered"] for end, _, status in answers
        )
        / (ended - started),
        "ms": [1000 * took for _, took, status in counted if status in spec["answered"]],
        "statuses": [status for _, _, status in counted],
    }


def main() -> None:
    """Read a specification, put the load on, write what came back."""
    spec = json.load(sys.stdin)
    bodies = itertools.cycle([json.dumps(body).encode() for body in spec["bodies"]])
    results = [run(spec, level, bodies) for level in spec["levels"]]
    json.dump({"version": locust.__version__, "levels": results}, sys.stdout)


if __name__ == "__main__":
    main()
