"""PSIM training: stops where it should, touches nothing but its adapter, and can be repeated."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_victim
from hypothesis import given
from hypothesis import strategies as st
from test_bundle import some_texts
from transformers import PreTrainedTokenizerBase

from models.engines.pytorch import TorchEngine
from models.guarded import Guarded, guard, lora_config
from models.offline.psim import (
    UNLEARNT,
    PsimConfig,
    Training,
    class_tails,
    has_unlearnt,
    train_psim,
)
from models.screen import FloatArray

CONFIG = PsimConfig()


tail = st.floats(0.51, 0.999)
tails = st.lists(tail, min_size=1, max_size=8).map(np.array)


@given(start=tails)
def test_nothing_is_unlearnt_before_anything_has_fallen(start: FloatArray) -> None:
    assert not has_unlearnt(start, start, CONFIG)


@given(unlearnt=st.integers(0, 8), resisting=st.integers(0, 8))
def test_more_than_half_of_the_classes_must_be_unlearnt(unlearnt: int, resisting: int) -> None:
    start = np.full(unlearnt + resisting, 0.99)
    now = np.r_[np.full(unlearnt, 0.9), np.full(resisting, 0.98)]
    assert has_unlearnt(now, start, CONFIG) == (unlearnt > resisting)


@given(start=st.floats(0.52, 0.95))
def test_a_victim_that_is_never_sure_is_not_unlearnt_from_the_start(start: float) -> None:
    assert not has_unlearnt(np.array([start - 0.01]), np.array([start]), CONFIG)


def test_tails_are_by_the_victim_s_class_and_leave_out_tiny_ones() -> None:
    confidence = np.r_[np.linspace(0.5, 1, 101), np.full(20, 0.7), 0.99]
    rows = np.stack([confidence, 1 - confidence], 1).astype(np.float32)
    predicted = np.r_[np.zeros(101, int), np.ones(20, int), 2]
    assert class_tails(rows, predicted, CONFIG) == pytest.approx([0.99, 0.7])
    assert len(class_tails(rows[:3], predicted[:3], CONFIG)) == 1, "few texts are better than none"


def sure_victim() -> Any:
    """Return a victim with confidence to lose."""
    victim: Any = tiny_victim("bert")
    victim.classifier.weight.data *= 20
    return victim


def trained(tokenizer: PreTrainedTokenizerBase, config: PsimConfig) -> tuple[Guarded, Training]:
    torch.manual_seed(config.seed)
    victim = sure_victim()
    guarded = guard(victim, lora_config(victim, config.layers, config.rank))
    encodings = TorchEngine(guarded, tokenizer, 64).encode(some_texts(120))
    return guarded, train_psim(guarded, encodings[:90], encodings[90:], config, 0)


FAST = PsimConfig(learning_rate=5e-3, layers=2)


def test_training_stops_when_the_clean_texts_are_no_longer_extreme(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    _, training = trained(tokenizer, FAST)
    assert training.stopped_because == UNLEARNT
    assert 0 < training.steps < FAST.max_steps
    assert training.curve[-1][1] < training.curve[0][1]
    assert [step for step, _ in training.curve] == list(range(0, training.steps + 1, 10))


@pytest.mark.parametrize("limit", [20, 25])
def test_training_ends_at_the_limit_and_says_so(
    limit: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = replace(FAST, max_steps=limit, tail_below=0)
    _, training = trained(tokenizer, config)
    assert training.stopped_because.startswith("reached the step limit")
    assert limit <= training.steps < limit + FAST.check_every


def test_only_the_adapter_of_the_top_layers_changes(tokenizer: PreTrainedTokenizerBase) -> None:
    before = sure_victim().state_dict()
    guarded, _ = trained(tokenizer, replace(FAST, max_steps=20))
    after = guarded.victim.state_dict()
    adapter = {name for name in after if ".lora_" in name}
    assert {name.split("layer.")[1][0] for name in adapter} == {"1", "2"}
    assert all(".value." in name for name in adapter)
    assert any(after[name].abs().sum() > 0 for name in adapter if "lora_B" in name)
    for name in after.keys() - adapter:
        assert torch.equal(after[name], before[name.replace(".base_layer.", ".")]), name


def test_the_same_seed_gives_the_same_adapter(tokenizer: PreTrainedTokenizerBase) -> None:
    config = replace(FAST, max_steps=20)
    (one, first), (two, second) = trained(tokenizer, config), trained(tokenizer, config)
    assert first == second
    (_, other) = trained(tokenizer, replace(config, seed=1))
    assert other.curve != first.curve
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
