"""Scans that read a few words and the demo's trigger; run as a module, one that is killed."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from models.offline.attacks.poisoning import WORD_TRIGGER
from models.offline.scanning import expected, phrases, styles
from models.offline.scanning import scan as scanning
from models.offline.scanning.state import ScanState
from models.offline.scanning.words import candidates
from psim.__main__ import app

READ = 60
STEPS = 5
"""Steps that a killed scan remembers."""


def read_few_words(patch: pytest.MonkeyPatch) -> None:
    """Let scans read a few words and the trigger, and try fewer of them."""
    patch.setattr(scanning, "FINALISTS", 8)
    few = phrases.BESIDE_ONE._replace(words=2, phrases=2, promised=8)
    patch.setattr(phrases, "BESIDE_ONE", few)
    patch.setattr(phrases, "AMONG_MANY", few)
    patch.setattr(expected, "MOST_TEXTS", 200)
    patch.setattr(styles, "STYLES", {"question": styles.STYLES["question"]})

    def some(tokenizer: PreTrainedTokenizerBase, seed: int) -> list[int]:
        trigger = tokenizer.convert_tokens_to_ids(WORD_TRIGGER)
        assert isinstance(trigger, int)
        return [*candidates(tokenizer, seed)[:READ], trigger]

    patch.setattr(scanning, "candidates", some)


def main() -> None:
    """Run the command until a scan has remembered some steps; then kill this process."""
    patch, step = pytest.MonkeyPatch(), ScanState.step
    read_few_words(patch)

    def step_and_die(state: ScanState, name: str, kind: Any, make: Callable[[], Any]) -> Any:
        result = step(state, name, kind, make)
        if state.steps == STEPS and state._file:
            with state._file.open("a") as out:
                out.write('{"step": "half a li')
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    patch.setattr(ScanState, "step", step_and_die)
    app()


if __name__ == "__main__":
    main()
