"""PSIM training: stops where it should, touches nothing but its adapter, and can be repeated."""

from dataclasses import replace

import pytest
import torch
from families import tiny_victim
from hypothesis import given
from hypothesis import strategies as st
from test_bundle import some_texts
from transformers import PreTrainedTokenizerBase

from models.engines.pytorch import TorchEngine
from models.guarded import Guarded, guard, lora_config
from models.offline.psim import PsimConfig, Training, has_levelled_off, train_psim

CONFIG = PsimConfig()


@given(flat=st.floats(0.5, 1), looks=st.integers(1, 30))
def test_the_plateau_before_anything_happens_is_none(flat: float, looks: int) -> None:
    assert not has_levelled_off([flat] * looks, CONFIG)


@given(fall=st.floats(0.02, 0.3), looks=st.integers(1, 30))
def test_it_has_not_levelled_off_while_it_falls(fall: float, looks: int) -> None:
    assert not has_levelled_off([1 - fall * i for i in range(looks)], CONFIG)


@given(level=st.floats(0, 0.48), noise=st.lists(st.floats(-0.004, 0.004), min_size=4, max_size=9))
def test_a_low_plateau_is_recognised_in_spite_of_noise(level: float, noise: list[float]) -> None:
    assert has_levelled_off([1, 0.8, 0.5, *(level + n for n in noise)], CONFIG)


def trained(tokenizer: PreTrainedTokenizerBase, config: PsimConfig) -> tuple[Guarded, Training]:
    torch.manual_seed(config.seed)
    victim = tiny_victim("bert")
    guarded = guard(victim, lora_config(victim, config.layers, config.rank))
    encodings = TorchEngine(guarded, tokenizer, 64).encode(some_texts(120))
    return guarded, train_psim(guarded, encodings[:90], encodings[90:], config, 0)


FAST = PsimConfig(learning_rate=5e-3, layers=2)


def test_training_stops_on_the_plateau(tokenizer: PreTrainedTokenizerBase) -> None:
    _, training = trained(tokenizer, FAST)
    assert training.stopped_because.startswith("levelled off")
    assert training.steps < FAST.max_steps
    assert training.curve[-1][1] < training.curve[0][1]
    assert [step for step, _ in training.curve] == list(range(0, training.steps + 1, 10))


@pytest.mark.parametrize("limit", [20, 25])
def test_training_ends_at_the_limit_and_says_so(
    limit: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    _, training = trained(tokenizer, replace(FAST, max_steps=limit))
    assert training.stopped_because.startswith("reached the step limit")
    assert limit <= training.steps < limit + FAST.check_every


def test_only_the_adapter_of_the_top_layers_changes(tokenizer: PreTrainedTokenizerBase) -> None:
    before = tiny_victim("bert").state_dict()
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
