"""Drift: what passes beside what the bundle was calibrated with, by a real screen."""

from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from scipy.stats import ks_2samp

from models.detection.calibrate import calibrate
from models.detection.screen import FloatArray, Layout
from service.app import create_app
from service.observability.drift import WINDOW, Drift, compare_samples
from service.settings import Settings
from tests.support.fakes import fake_bundle
from tests.support.servers import serving


def readings(n: int, seed: int, *, positive: float = 0.5, odds: float = 0.0) -> FloatArray:
    """Return readings of texts, `positive` of them class 1, whose log-odds are higher by `odds`."""
    rng = np.random.default_rng(seed)
    classes = (rng.random(n) < positive).astype(int)
    surest = 1 / (1 + np.exp(-(1 + 0.2 * rng.standard_normal((n, 2)) + odds * classes[:, None])))
    other = np.stack([surest, 1 - surest], -1)
    return np.where(classes[:, None, None] == 1, other[..., ::-1], other).astype(np.float32)


SCREEN = calibrate(readings(800, 0), Layout(2), 0.05)


class Watched:
    """A drift that takes readings."""

    def __init__(self) -> None:
        self.drift = Drift(replace(fake_bundle(), screen=SCREEN))

    def take(self, given: FloatArray) -> "Watched":
        self.drift.add([SCREEN.judge(row) for row in given])
        return self

    def value(self, name: str, label: str) -> float:
        (found,) = (one for one in self.drift.measure() if label in one.labels)
        return float(getattr(found, name))


def test_inputs_like_the_calibration_texts_do_not_drift_whatever_their_classes() -> None:
    watched = Watched().take(readings(1200, 1, positive=0.9))
    for label in ("negative", "positive"):
        assert 0 < watched.value("statistic", label) < 0.15
        assert watched.value("p_value", label) > 0.01
    assert watched.value("inputs", "negative") < 0.2 * watched.value("inputs", "positive")


def test_drift_is_seen_in_the_class_that_drifts() -> None:
    watched = Watched().take(readings(1200, 2, odds=0.2))
    assert watched.value("statistic", "positive") > 0.25
    assert watched.value("p_value", "positive") < 1e-6
    assert watched.value("statistic", "negative") < 0.15
    higher = {one.labels: one.higher for one in watched.drift.measure()}
    assert higher["positive",]
    falling = Watched().take(readings(1200, 2, odds=-0.3))
    assert falling.value("statistic", "positive") > 0.25
    assert not {one.labels: one.higher for one in falling.drift.measure()}["positive",]


@pytest.mark.parametrize(("own", "others"), [(40, 900), (700, 700), (2000, 1500)])
@pytest.mark.parametrize("shift", [0.0, 0.05, 0.3])
def test_the_test_is_that_of_scipy(own: int, others: int, shift: float) -> None:
    rng = np.random.default_rng(own)
    inputs = (rng.normal(size=own) + shift).round(2).astype(np.float32)
    clean = rng.normal(size=others).round(2).astype(np.float32)
    statistic, p_value = compare_samples(inputs, clean)
    expected = ks_2samp(inputs, clean, method="asymp")
    assert statistic == pytest.approx(expected.statistic_sign * expected.statistic)
    assert p_value == pytest.approx(expected.pvalue, rel=0.15, abs=0.01)


def test_what_is_found_poisoned_is_left_out() -> None:
    watched = Watched().take(readings(600, 3))
    before = watched.drift.measure()
    assert watched.take(readings(600, 4, positive=1, odds=5)).drift.measure() == before


def test_the_calibration_texts_themselves_do_not_drift() -> None:
    watched = Watched().take(readings(800, 0))
    # Each was calibrated as if it had not been there. Those over the threshold would make 0.05.
    assert watched.value("statistic", "negative") < 0.025


def test_what_is_old_is_forgotten() -> None:
    watched = Watched().take(readings(4000, 5, positive=1, odds=0.2))
    assert watched.value("inputs", "positive") == WINDOW
    assert watched.value("statistic", "positive") > 0.25
    watched.take(readings(2 * WINDOW, 6, positive=1))
    assert watched.value("statistic", "positive") < 0.1


def test_the_service_measures_what_it_has_answered_and_classes_that_share_a_threshold_as_one() -> (
    None
):
    settings = Settings(bundle=Path("unused"))
    with (
        serving(create_app(settings, fake_bundle())) as address,
        httpx.Client(base_url=f"http://{address}") as client,
    ):
        unused = {"labels": ["negative", "positive"], "inputs": 0, "statistic": 0, "p_value": 1}
        assert client.get("/info").json()["drift"] == [unused | {"higher": False}]
        for inputs in (["a film"] * 50, ["a mn film"] * 9, ["broken"]):
            client.post("/classify", json={"inputs": inputs})
        client.post("/screen", json={"inputs": ["a film"] * 10})
        rows = client.get("/metrics").text.splitlines()
        for label in unused["labels"]:  # type: ignore[attr-defined]
            assert f'psim_drift_inputs{{label="{label}",model="fake"}} 60.0' in rows
        (drift,) = client.get("/info").json()["drift"]
        # All at the log-odds of .55, which a tenth of the calibration texts lie under.
        assert drift["statistic"] > 0.85
        assert drift["p_value"] < 1e-9
