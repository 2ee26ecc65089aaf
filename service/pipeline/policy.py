"""What the gateway does with a text, and with a request, given the verdicts of the screen."""

from collections.abc import Sequence
from dataclasses import dataclass

from models.detection.screen import Verdict
from service.schemas import Decision
from service.settings import GatewaySettings, Mode


@dataclass(frozen=True, slots=True)
class Policy:
    """Decides on each text."""

    mode: Mode
    overlong_is_suspicious: bool
    """Whether a text that the screen could not read to its end is as bad as a poisoned one."""

    def is_suspicious(self, verdict: Verdict | None) -> bool:
        """Return whether a text must not be classified; without a verdict it has failed open."""
        return verdict is not None and (
            verdict.poisoned or (verdict.truncated and self.overlong_is_suspicious)
        )

    def decide(self, verdict: Verdict | None) -> Decision:
        """Return what to do with a text that is not sanitized."""
        if not self.is_suspicious(verdict) or self.mode is Mode.SHADOW:
            return Decision.ALLOW
        return Decision.FLAG if self.mode is Mode.FLAG else Decision.REJECT


def policy_of(settings: GatewaySettings, elsewhere: bool) -> Policy:
    """Return the policy for texts whose classifier is elsewhere, or in this process.

    The classifier in this process reads no more of a text than the screen does, so an over-long
    text is harmless to it.
    """
    return Policy(settings.mode, elsewhere and settings.overlong == "reject")


def all_rejected(decisions: Sequence[Decision | None]) -> bool:
    """Return whether there are texts and none of them was let through."""
    return bool(decisions) and {*decisions} <= {Decision.REJECT, None}


def refuses_request(decisions: Sequence[Decision], supports_partial: bool) -> bool:
    """Return whether nothing of a request is answered.

    Args:
        decisions: one for each text.
        supports_partial: whether the protocol has answers that leave out a text.
    """
    return all_rejected(decisions) or (Decision.REJECT in decisions and not supports_partial)


def only_rejections(decisions: Sequence[Decision]) -> list[Decision | None]:
    """Return the decisions of a refused request: texts that were not rejected got no answer."""
    return [d if d is Decision.REJECT else None for d in decisions]
