"""Verdicts on texts that were screened before: a conversation is sent whole with each turn."""

import hmac
import secrets
from collections import OrderedDict

from models.detection.screen import Verdict


class SeenTexts:
    """A bounded cache, which drops what was not asked for the longest; it keeps no text.

    It belongs to one gateway, and so to one bundle and its settings: another bundle or a reload
    begins with an empty one, and its key is its own.

    Args:
        most: texts that are remembered; 0 remembers none.
    """

    def __init__(self, most: int) -> None:
        self._most, self._key = most, secrets.token_bytes(32)
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()

    def find(self, text: str, context: str) -> Verdict | None:
        """Return the verdict on a text that was screened in the same context, if there is one.

        Args:
            text: the whole text.
            context: what else a verdict depends on, or must not be shared across; without NUL.
        """
        digest = self._digest(text, context)
        verdict = self._verdicts.get(digest)
        if verdict is not None:
            self._verdicts.move_to_end(digest)
        return verdict

    def add(self, text: str, context: str, verdict: Verdict) -> None:
        """Remember the verdict on a text, see `find`."""
        digest = self._digest(text, context)
        self._verdicts[digest] = verdict
        self._verdicts.move_to_end(digest)
        while len(self._verdicts) > self._most:
            self._verdicts.popitem(last=False)

    def _digest(self, text: str, context: str) -> bytes:
        return hmac.digest(self._key, f"{context}\0{text}".encode(), "sha256")
