"""What becomes of a text, and of a request, given the verdicts."""

from dataclasses import replace
from pathlib import Path

import pytest

from models.detection.screen import Verdict
from service.pipeline.policy import (
    Policy,
    all_rejected,
    only_rejections,
    policy_of,
    refuses_request,
)
from service.schemas import Decision
from service.settings import Mode, Settings

ALLOW, FLAG, REJECT = Decision.ALLOW, Decision.FLAG, Decision.REJECT
CLEAN = Verdict(0.5, 0.0, "confidence", 3.0, 0.5, False, False, predicted=0)
POISONED, OVERLONG = replace(CLEAN, poisoned=True), replace(CLEAN, truncated=True)


@pytest.mark.parametrize(
    ("mode", "suspicious"),
    [
        (Mode.ENFORCE, REJECT),
        (Mode.SANITIZE, REJECT),
        (Mode.FLAG, FLAG),
        (Mode.SHADOW, ALLOW),
    ],
)
def test_the_mode_decides_on_suspicious_texts_only(mode: Mode, suspicious: Decision) -> None:
    for policy in (Policy(mode, overlong_is_suspicious=False), Policy(mode, True)):
        assert policy.decide(CLEAN) is ALLOW
        assert policy.decide(None) is ALLOW, "it got here only by failing open"
        assert policy.decide(POISONED) is suspicious
        overlong = suspicious if policy.overlong_is_suspicious else ALLOW
        assert policy.decide(OVERLONG) is overlong


def test_a_text_is_over_long_only_for_a_classifier_that_may_read_on() -> None:
    reject = Settings(bundle=Path("unused"))
    allow = reject.model_copy(update={"overlong": "allow"})
    assert policy_of(reject, elsewhere=True).overlong_is_suspicious
    assert not policy_of(reject, elsewhere=False).overlong_is_suspicious
    assert not policy_of(allow, elsewhere=True).overlong_is_suspicious


def test_a_request_is_refused_if_no_text_passes_or_its_answer_can_lack_none() -> None:
    for partial in (True, False):
        assert refuses_request([REJECT, REJECT], partial)
        assert not refuses_request([ALLOW, FLAG], partial)
        assert refuses_request([ALLOW, REJECT], partial) is not partial
    assert only_rejections([ALLOW, REJECT]) == [None, REJECT]
    assert all_rejected(only_rejections([ALLOW, REJECT]))
    assert not all_rejected([])
