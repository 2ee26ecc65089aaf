"""Progress where standard error is not a terminal: a line for each step or epoch."""

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from models.offline.io.progress import TrainingProgress, progress


def test_a_step_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress("training PSIM", unit=" steps")
    for _ in range(1000):
        bar.update()
    bar.close()
    assert capsys.readouterr().err == "training PSIM\n"


def test_an_epoch_is_one_line_and_later_measurements_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args, state, control = TrainingArguments(num_train_epochs=2), TrainerState(), TrainerControl()
    shown = TrainingProgress("victim")
    shown.on_train_begin(args, state, control)
    for epoch, accuracy in ((1.0, 0.5), (2.0, 0.9)):
        for _ in range(100):
            shown.on_step_end(args, state, control)
        state.epoch = epoch
        shown.on_evaluate(args, state, control, metrics={"eval_accuracy": accuracy})
    shown.on_train_end(args, state, control)
    shown.on_evaluate(args, state, control, metrics={"eval_accuracy": 0.1})
    assert capsys.readouterr().err.splitlines() == [
        "training victim",
        "training victim: epoch 1 of 2, dev accuracy 50.0%",
        "training victim: epoch 2 of 2, dev accuracy 90.0%",
    ]
