"""What becomes of a text, and of a request, given the verdicts."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from models.detection.screen import Finding, Verdict
from service.pipeline.policy import (
    Policy,
    all_rejected,
    only_rejections,
    policy_of,
    reason_for,
    refuses_request,
)
from service.schemas import Decision
from service.settings import Mode, Settings

ALLOW, FLAG, REJECT = Decision.ALLOW, Decision.FLAG, Decision.REJECT
CLEAN = Verdict(0.5, 0.0, "confidence", 3.0, 0.5, False, predicted=0, finding=None)
TRIGGERED = replace(CLEAN, finding=Finding.TRIGGERED)
UNFAMILIAR = replace(CLEAN, finding=Finding.UNFAMILIAR)
OVERLONG = replace(CLEAN, truncated=True)


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
        assert policy.decide(TRIGGERED) is suspicious
        overlong = suspicious if policy.overlong_is_suspicious else ALLOW
        assert policy.decide(OVERLONG) is overlong


@pytest.mark.parametrize(
    ("mode", "unfamiliar", "decision"),
    [
        (Mode.ENFORCE, "flag", FLAG),
        (Mode.ENFORCE, "reject", REJECT),
        (Mode.ENFORCE, "allow", ALLOW),
        (Mode.SANITIZE, "flag", FLAG),
        (Mode.SANITIZE, "reject", REJECT),
        (Mode.SANITIZE, "allow", ALLOW),
        (Mode.FLAG, "flag", FLAG),
        (Mode.FLAG, "reject", FLAG),
        (Mode.FLAG, "allow", ALLOW),
        (Mode.SHADOW, "flag", ALLOW),
        (Mode.SHADOW, "reject", ALLOW),
        (Mode.SHADOW, "allow", ALLOW),
    ],
)
def test_unfamiliar_texts_have_a_policy_of_their_own(
    mode: Mode, unfamiliar: Literal["flag", "reject", "allow"], decision: Decision
) -> None:
    settings = Settings(bundle=Path("unused"), mode=mode, unfamiliar=unfamiliar)
    for elsewhere in (True, False):
        policy = policy_of(settings, elsewhere)
        assert policy.decide(UNFAMILIAR) is decision
        assert policy.enforced(UNFAMILIAR) is Decision(unfamiliar)
        assert policy.enforced(TRIGGERED) is REJECT
        too_long = policy.enforced(replace(UNFAMILIAR, truncated=True))
        assert too_long is (REJECT if elsewhere else Decision(unfamiliar))


def test_unfamiliar_texts_are_flagged_by_default() -> None:
    assert policy_of(Settings(bundle=Path("unused")), True).decide(UNFAMILIAR) is FLAG


def test_a_reason_names_every_finding_once() -> None:
    assert "(triggered)" in (triggered := reason_for([TRIGGERED, TRIGGERED]))
    assert "unfamiliar" not in triggered
    assert "(unfamiliar)" in (unfamiliar := reason_for([UNFAMILIAR]))
    assert "triggered" not in unfamiliar
    assert "longer" not in triggered + unfamiliar
    assert reason_for([OVERLONG]) == "it is longer than PSIM reads"
    assert reason_for([OVERLONG, UNFAMILIAR, TRIGGERED]).count(", or ") == 2


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
