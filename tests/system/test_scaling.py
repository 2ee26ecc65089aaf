"""The simulated cluster against queueing theory, and its figures against the page they are from."""

import math
from typing import Any

import numpy as np
import pytest
import scaling
from scaling import Costs, Load, Run, Scaling, Setup, simulate

from tests.support.paths import ROOT

PAGE = ROOT / "docs/performance.md"
ONE_BY_ONE: dict[str, Any] = {"window": 1, "batch_tokens": 1}


def waits(run: Run, service: float) -> float:
    """Return the mean time in the queue, without the first tenth of the run."""
    return float(np.mean(run.took[len(run.took) // 10 :])) - service


@pytest.mark.parametrize("utilization", [0.5, 0.8])
def test_one_at_a_time_with_equal_times_is_an_m_d_1_queue(utilization: float) -> None:
    service = 0.01
    costs = Costs(step=service, token=0, request=0)
    load = Load(utilization / service)
    run = simulate(Setup(load, 1, 1000, costs, **ONE_BY_ONE))
    expected = utilization * service / (2 * (1 - utilization))
    assert waits(run, service) == pytest.approx(expected, rel=0.07)


def test_each_of_several_replicas_behind_a_random_balancer_is_an_m_g_1_queue() -> None:
    costs, load = Costs(step=0.002, token=0.0003, request=0), Load(1, sigma=0.8)
    lengths = np.array(load.lengths(np.random.default_rng(1), 100_000))
    times = costs.step + costs.token * lengths
    replicas, utilization = 4, 0.7
    each = utilization / times.mean()
    busy = Load(replicas * each, sigma=0.8)
    run = simulate(Setup(busy, replicas, 400, costs, least=False, **ONE_BY_ONE))
    # Pollaczek and Khinchine.
    expected = each * (times**2).mean() / (2 * (1 - utilization))
    assert waits(run, times.mean()) == pytest.approx(expected, rel=0.08)


def test_what_is_inside_is_what_comes_in_times_how_long_it_stays() -> None:
    run = simulate(Setup(Load(900), 6, 60))
    came = len(run.inputs) / 60
    assert np.mean(run.inputs) == pytest.approx(came * np.mean(run.took), rel=0.02)


def test_batches_cost_about_what_was_measured() -> None:
    costs, load = Costs(request=0), Load(1)
    lengths = load.lengths(np.random.default_rng(0), 4096)
    sorted_by_length = [sorted(lengths[i : i + 64], reverse=True) for i in range(0, 4096, 64)]
    for batches, measured in (([[n] for n in lengths], 185), (sorted_by_length, 323)):
        assert 4096 / sum(map(costs.of, batches)) == pytest.approx(measured, rel=0.1)


def test_every_request_ends_in_one_way_and_a_replica_takes_with_it_what_it_holds() -> None:
    setup = Setup(Load(400), 4, 60, lost=2, lost_at=20, least=False)
    run = simulate(setup)
    ended = sum(map(len, run.at.values()))
    assert 0 <= len(run.inputs) - ended < 100  # the rest is inside at the end
    assert run.at["lost"]
    # Half of ten seconds' requests, and what was inside.
    assert len(run.at["lost"]) == pytest.approx(0.5 * 400 * setup.noticed_s, rel=0.15)
    retried = simulate(Setup(Load(400), 4, 60, lost=2, lost_at=20, retries=True))
    assert 0 < len(retried.at["lost"]) < 100


def test_more_than_can_be_done_is_refused_and_replicas_are_added() -> None:
    alone = simulate(Setup(Load(1500), 2, 60))
    assert alone.share("shed") > 0.3
    scaled = simulate(Setup(Load(1500), 2, 60, scaling=Scaling(start_s=5)))
    assert scaled.replicas[-1][1] > 6
    assert scaled.share("shed") < alone.share("shed") / 2
    assert scaled.percentile(99, 50) < scaling.GOAL_S
    back = scaled.recovery(0, 60)
    assert back is not None
    assert 5 < back < 50
    assert alone.recovery(0, 60) is None


def test_few_requests_take_replicas_away_but_not_all_and_lose_nothing() -> None:
    run = simulate(Setup(Load(20), 8, 200, scaling=Scaling(calm_s=60)))
    assert run.replicas[-1][1] == Scaling().low
    assert run.share("answered") == 1


def test_the_same_seed_gives_the_same_run() -> None:
    assert simulate(Setup(Load(200), 2, 10)) == simulate(Setup(Load(200), 2, 10))


def test_figures_of_the_plan_are_read_off_the_page() -> None:
    found = scaling.measured(PAGE.read_text())
    assert found.http.keys() == {"float32", "bfloat16"}
    assert all(rate > 0 and peak_mb > 100 for rate, peak_mb in found.http.values())
    assert {layers for _, layers in found.growth} == {6, 12, 24}
    assert found.growth[512, 24] > found.growth[16, 6]
    one_by_hand = 1e9 / 86_400 * scaling.PEAK / (100 * scaling.UTILIZATION) * scaling.SPARE
    assert scaling.replicas_for(100) == math.ceil(one_by_hand)
