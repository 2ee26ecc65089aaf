"""PSIM training: stops where it should, touches nothing but its adapter, and can be repeated."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from models.engines.pytorch import TorchEngine
from models.network.adapters import lora_config
from models.network.guarded import Guarded, guard
from models.offline.fitting.psim import UNLEARNT, PsimConfig, Training, retention, train_psim
from models.offline.fitting.split import Split
from models.offline.study.ablations import PsimVariant, train_variant
from tests.support.bundles import some_texts
from tests.support.families import tiny_victim


@given(classes=st.integers(2, 20), start=st.floats(0.6, 1), share=st.floats(0, 1))
def test_retention_is_the_share_of_the_confidence_above_chance(
    classes: int, start: float, share: float
) -> None:
    now = 1 / classes + share * (start - 1 / classes)
    assert retention(now, start, classes) == pytest.approx(share, abs=1e-6)
    assert retention(0.5, 0.5, 2) <= 1, "a victim at chance has nothing to lose"


def sure_victim() -> Any:
    """Return a victim with confidence to lose."""
    victim: Any = tiny_victim("bert")
    victim.classifier.weight.data *= 20
    return victim


def trained(tokenizer: PreTrainedTokenizerBase, config: PsimConfig) -> tuple[Guarded, Training]:
    torch.manual_seed(config.seed)
    victim = sure_victim()
    guarded = guard(victim, lora_config(victim, config.layers), len(config.keep_at))
    engine = TorchEngine(guarded, tokenizer, 64)
    encodings = engine.encode(some_texts(120))
    trains = guarded.layout.checkpoints - 1

    def look(step: int, confidence: float) -> None:
        # Looking changes nothing, and what is kept of the held-out texts stays true.
        own = engine.screen(encodings[90:]).readings[:, trains].max(1).mean()
        assert confidence == pytest.approx(own, abs=0.02)

    return guarded, train_psim(guarded, encodings[:90], encodings[90:], config, 0, look)


FAST = PsimConfig(learning_rate=5e-3, layers=2, keep_at=(1.0, 0.7, 0.4))


def test_checkpoints_are_kept_while_the_clean_texts_fall(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    guarded, training = trained(tokenizer, FAST)
    assert training.stopped_because == UNLEARNT
    assert 0 < training.steps < FAST.max_steps
    assert [step for step, _ in training.curve] == list(
        range(0, training.steps + 1, FAST.check_every)
    )
    (_, confident), *_ = training.curve
    for share, kept in zip(FAST.keep_at, training.checkpoints, strict=True):
        left = {step: retention(confidence, confident, 3) for step, confidence in training.curve}
        assert kept == min(step for step in left if left[step] <= share)
    assert training.checkpoints[-1] == training.steps
    # What screens are the adapters as they were at those steps.
    assert training.checkpoints[0] == 0
    start = [p for n, p in guarded.named_parameters() if "lora_B.checkpoint0." in n]
    assert start and not any(p.any() for p in start), "the first one is the victim"
    for number, kept in list(enumerate(training.checkpoints))[1:]:
        again, _ = trained(tokenizer, replace(FAST, keep_at=(0, -1, -2), max_steps=kept))
        name = f"checkpoint{number}"
        own = [p for n, p in guarded.named_parameters() if f".{name}." in n]
        others = [p for n, p in again.named_parameters() if ".checkpoint2." in n]
        assert own
        assert all(torch.equal(a, b) for a, b in zip(own, others, strict=True))


@pytest.mark.parametrize("limit", [20, 25])
def test_training_ends_at_the_limit_and_says_so(
    limit: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = replace(FAST, max_steps=limit, keep_at=(0.5, -1.0, -2.0))
    _, training = trained(tokenizer, config)
    assert training.stopped_because.startswith("reached the step limit")
    assert limit <= training.steps < limit + FAST.check_every
    assert training.checkpoints[1:] == [training.steps] * 2


def test_only_the_adapter_of_the_top_layers_changes(tokenizer: PreTrainedTokenizerBase) -> None:
    before = sure_victim().state_dict()
    guarded, _ = trained(tokenizer, replace(FAST, max_steps=20))
    after = guarded.victim.state_dict()
    adapter = {name for name in after if ".lora_" in name}
    assert {name.split("layer.")[1][0] for name in adapter} == {"1", "2"}
    assert all(".value." in name or ".query." in name for name in adapter)
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


@pytest.mark.parametrize(
    ("change", "trains"),
    [
        ({"labels": "drawn"}, {"query", "value"}),
        ({"adapter": "value"}, {"value"}),
        ({"head": "trained"}, {"query", "value", "classifier"}),
        ({"adapter": "prompt-encoder"}, {"prompt_encoder", "classifier"}),
    ],
)
def test_what_the_study_compares_trains_what_it_says(
    change: dict[str, Any], trains: set[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    config = PsimVariant(**asdict(FAST) | {"max_steps": 20} | change)
    texts = some_texts(120)
    engine, training = train_variant(
        sure_victim(), tokenizer, Split(texts[:90], texts[90:], []), config
    )
    guarded = engine.guarded
    assert training.curve[-1][1] != training.curve[0][1]
    engine.screen(engine.encode(["a " * 2000]))  # prompts take positions
    guarded.psim.set_adapter(guarded.checkpoints[-1])
    trainable = [name for name, p in guarded.psim.named_parameters() if p.requires_grad]
    assert all(any(part in name for part in trains) for name in trainable)
    assert all(any(part in name for name in trainable) for part in trains)
    batch = engine.encode(some_texts(4))
    victim = sure_victim()
    bare = TorchEngine(guard(victim, lora_config(victim, 1)), tokenizer, 64)
    said = engine.screen(batch).readings[:, guarded.layout.checkpoints - 1]
    assert said != pytest.approx(bare.classify(batch), abs=1e-6)
    if config.adapter != "prompt-encoder":  # PEFT 0.21 cannot switch prompts off for a classifier
        assert engine.classify(batch) == pytest.approx(bare.classify(batch), abs=1e-6)
