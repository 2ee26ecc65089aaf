"""What the gateway does with a text, and with a request, given the verdicts of the screen."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.detection.screen import Finding, Verdict
from service.schemas import Decision
from service.security.keys.file import Key
from service.settings import GatewaySettings, Mode

if TYPE_CHECKING:  # importing it takes memory, and many services have no audit
    from service.audit.exceptions_reader import Exceptions

REASONS = {
    Finding.TRIGGERED: "PSIM finds a backdoor trigger in it (triggered)",
    Finding.UNFAMILIAR: "PSIM finds it unlike the clean texts that it knows (unfamiliar)",
}
OVERLONG = "it is longer than PSIM reads"


@dataclass(frozen=True, slots=True)
class Policy:
    """Decides on each text."""

    mode: Mode
    overlong_is_suspicious: bool
    """Whether a text that the screen could not read to its end is as bad as a triggered one."""
    unfamiliar: Decision = Decision.FLAG
    """Decision on an unfamiliar text, in the modes that reject triggered ones."""

    def decide(self, verdict: Verdict | None) -> Decision:
        """Return what to do with a text that is not sanitized."""
        if self.mode is Mode.SHADOW:
            return Decision.ALLOW
        decision = self.enforced(verdict)
        if self.mode is Mode.FLAG and decision is Decision.REJECT:
            return Decision.FLAG
        return decision

    def enforced(self, verdict: Verdict | None) -> Decision:
        """Return what `enforce` does with a text; without a verdict it has failed open."""
        if verdict is None:
            return Decision.ALLOW
        if verdict.poisoned or (verdict.truncated and self.overlong_is_suspicious):
            return Decision.REJECT
        return self.unfamiliar if verdict.finding else Decision.ALLOW

    def flags(self, verdict: Verdict | None) -> bool:
        """Return whether `enforce` would reject a text; mode `shadow` leaves hooks alone too."""
        return self.enforced(verdict) is Decision.REJECT and self.mode is not Mode.SHADOW


def policy_of(settings: GatewaySettings, elsewhere: bool, key: Key | None = None) -> Policy:
    """Return the policy for texts whose classifier is elsewhere, or in this process.

    What the caller's key leaves open, the settings decide.

    The classifier in this process reads no more of a text than the screen does, so an over-long
    text is harmless to it.
    """
    overlong_is_suspicious = elsewhere and settings.overlong == "reject"
    mode = (key and key.mode) or settings.mode
    unfamiliar = (key and key.unfamiliar) or settings.unfamiliar
    return Policy(mode, overlong_is_suspicious, Decision(unfamiliar))


class Decider:
    """Decides on the texts of one request, by a policy and by the reviewed exceptions.

    What it has once said of a text it says again, even if an exception ends meanwhile: a request
    must not be half of one opinion.

    Args:
        policy: decides on texts without an exception.
        digest: of the bundle that screens them.
        exceptions: None if there can be none.
    """

    def __init__(self, policy: Policy, digest: str, exceptions: "Exceptions | None") -> None:
        self.policy, self._digest, self._exceptions = policy, digest, exceptions
        self._covered: dict[str, bool] = {}

    def excepts(self, text: str, verdict: Verdict | None) -> bool:
        """Return whether an exception sets aside what `enforce` would do with a text."""
        if self._exceptions is None or self.policy.enforced(verdict) is Decision.ALLOW:
            return False
        if text not in self._covered:
            self._covered[text] = self._exceptions.covers(self._digest, text)
        return self._covered[text]

    def decide(self, text: str, verdict: Verdict | None) -> Decision:
        """Return what to do with a text that is not sanitized."""
        return Decision.ALLOW if self.excepts(text, verdict) else self.policy.decide(verdict)

    def rejects(self, text: str, verdict: Verdict | None) -> bool:
        """Return whether a text that is not sanitized is rejected."""
        return self.decide(text, verdict) is Decision.REJECT

    def would_reject(self, text: str, verdict: Verdict | None) -> bool:
        """Return whether `enforce` would reject a text."""
        rejects = self.policy.enforced(verdict) is Decision.REJECT
        return rejects and not self.excepts(text, verdict)


def reason_for(rejected: Iterable[Verdict | None]) -> str:
    """Return why texts were rejected, given their verdicts."""
    reasons: set[str] = set()
    for verdict in rejected:
        if verdict is None:
            continue
        if verdict.finding:
            reasons.add(REASONS[verdict.finding])
        if verdict.truncated and not verdict.poisoned:
            reasons.add(OVERLONG)
    return ", or ".join(reason for reason in (*REASONS.values(), OVERLONG) if reason in reasons)


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
