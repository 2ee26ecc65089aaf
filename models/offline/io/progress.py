"""Progress on standard error: a bar for each step in a terminal, lines elsewhere."""

import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def progress(step: str, **options: Any) -> "tqdm[Any]":
    """Return a bar; where standard error is not a terminal, print the step's name instead.

    Args:
        step: name of the step.
        options: of tqdm, such as `total` and `unit`.
    """
    if not sys.stderr.isatty():
        sys.stderr.write(f"{step}\n")
    return tqdm(desc=step, disable=None, **options)


def note(line: str) -> None:
    """Print a line to standard error, above a bar if there is one."""
    tqdm.write(line, file=sys.stderr)


class TrainingProgress(TrainerCallback):
    """A bar for the training of a victim; where standard error is not a terminal, a line an epoch.

    Args:
        name: name of the victim.
    """

    def __init__(self, name: str) -> None:
        self._step = f"training {name}"
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Show the bar, at the step that training resumes from."""
        self._bar = progress(
            self._step, total=state.max_steps, initial=state.global_step, unit=" steps"
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Report the accuracy on the dev texts after an epoch."""
        accuracy = f"dev accuracy {given['metrics']['eval_accuracy']:.1%}"
        if self._bar is None:
            return
        self._bar.set_postfix_str(accuracy)
        if self._bar.disable:
            epoch = f"epoch {state.epoch or 0:.0f} of {args.num_train_epochs:g}"
            sys.stderr.write(f"{self._step}: {epoch}, {accuracy}\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the bar; what is measured later belongs to no epoch."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None
