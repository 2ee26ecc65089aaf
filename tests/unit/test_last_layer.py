"""The last layer by rows says what transformers says, in every family, whatever the batch is."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    PreTrainedTokenizerBase,
)

from models.engines.base import Encoding, Withheld
from models.engines.pytorch import TorchEngine, collate
from models.network.adapters import lora_config
from models.network.guarded import Guarded, guard
from models.network.last_layer import LEAST_PEAK
from models.network.unrolled import rolled_name
from models.offline.study.ablations import PsimVariant, with_variant
from tests.support.families import TAILED, VOCABULARY, guarded_victim, tiny_victim, trained

CPU = torch.device("cpu")


guarded_of = cache(guarded_victim)


@cache
def eager_of(family: str) -> Any:
    """Return the victim of `guarded_of`, without adapters, which tells its attention."""
    victim: Any = tiny_victim(family)
    victim.set_attn_implementation("eager")
    bare: Any = guarded_of(family).psim.get_base_model()
    kept = {
        rolled_name(bare, name.replace(".base_layer", "")): weights
        for name, weights in bare.state_dict().items()
        if ".lora_" not in name
    }
    victim.load_state_dict(kept)
    return victim


def whole(guarded: Guarded, inputs: Any) -> torch.Tensor:
    """Return probabilities by checkpoint, by transformers and PEFT."""
    probabilities = []
    for checkpoint in guarded.checkpoints:
        guarded.psim.set_adapter(checkpoint, inference_mode=True)
        probabilities.append(guarded.victim(**inputs).logits.softmax(-1))
    return torch.stack(probabilities, 1)


def psim_of(guarded: Guarded, inputs: Any) -> torch.Tensor:
    """Return probabilities by checkpoint, as the screen reads them."""
    return guarded.screen(inputs)[0][:, : guarded.layout.checkpoints]


def some_inputs() -> Any:
    ids = torch.arange(5, 25)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", TAILED)
def test_an_adapter_is_trained_as_by_whole_layers(family: str) -> None:
    guarded, inputs = guarded_of(family), some_inputs()
    name = guarded.checkpoints[-1]
    guarded.psim.set_adapter(name)
    trained = [p for n, p in guarded.psim.named_parameters() if f".{name}." in n]
    logits = guarded.training_logits(inputs), guarded.psim_logits(inputs)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    fast, slow = (torch.autograd.grad(own.log_softmax(-1).sum(), trained) for own in logits)
    assert any(gradient.any() for gradient in slow)
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", TAILED)
@settings(max_examples=20, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=40), min_size=1, max_size=5
    )
)
@torch.inference_mode()
def test_rows_agree_with_whole_layers(family: str, texts: list[list[int]]) -> None:
    guarded = guarded_of(family)
    assert (guarded.last_layer is None, guarded.forward_passes) == (False, 1)
    encodings = [Encoding(tuple(text), False) for text in texts]
    inputs = collate(encodings, 0, CPU)
    readings, own = guarded.screen(inputs)
    assert own is not None
    torch.testing.assert_close(psim_of(guarded, inputs), whole(guarded, inputs), rtol=0, atol=1e-5)
    torch.testing.assert_close(own, guarded.classify(inputs), rtol=0, atol=1e-5)
    # And a text does not mind its batch-mates.
    for number, encoding in enumerate(encodings):
        alone, _ = guarded.screen(collate([encoding], 0, CPU))
        torch.testing.assert_close(readings[number], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", TAILED)
@settings(max_examples=10, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=30), min_size=1, max_size=4
    )
)
@torch.inference_mode()
def test_the_peak_is_that_of_the_victims_own_attention(family: str, texts: list[list[int]]) -> None:
    guarded, victim = guarded_of(family), eager_of(family)
    # What some families take for padding would end a text.
    inputs = collate([Encoding((*text, 9), False) for text in texts], 0, CPU)
    peaks = guarded.screen(inputs)[0][:, -1]
    assert guarded.layout.attention
    torch.testing.assert_close(peaks, peaks[:, :1].expand_as(peaks), rtol=0, atol=0)
    attention = victim(**inputs, output_attentions=True).attentions[-1].mean(1)
    for number, text in enumerate(texts):
        read = len(text) if guarded.trunk.reads_last else 0
        inner = attention[number, read, 1 : len(text)].tolist()
        expected = max(max(inner, default=0) * max(len(inner), 1) ** 0.25, LEAST_PEAK)
        assert peaks[number, 0].item() == pytest.approx(expected, abs=1e-5)


@torch.inference_mode()
def test_a_decoder_reads_before_tokens_that_it_takes_for_padding() -> None:
    """Where a tokenizer ends texts with the token that pads them."""
    victim: Any = tiny_victim("llama")
    end = victim.config.pad_token_id = 102
    guarded = trained(guard(victim, lora_config(victim, 1), 2))
    texts = (5, 6, 7, end), (8, 9, 10, 11, 12, end), (end,)
    inputs = collate([Encoding(text, False) for text in texts], end, CPU)
    _, own = guarded.screen(inputs)
    assert own is not None
    torch.testing.assert_close(psim_of(guarded, inputs), whole(guarded, inputs), rtol=0, atol=1e-5)
    torch.testing.assert_close(own, guarded.classify(inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", TAILED)
@torch.inference_mode()
def test_checkpoints_differ_and_none_is_the_victim(family: str) -> None:
    guarded, inputs = guarded_of(family), some_inputs()
    said = torch.cat([psim_of(guarded, inputs)[0], guarded.classify(inputs)])
    assert torch.pdist(said).min() > 1e-4


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("deberta", PsimVariant()),
        ("bert", PsimVariant(layers=2)),
        ("bert", PsimVariant(head="trained")),
        ("bert", PsimVariant(adapter="prompt-encoder")),
    ],
)
@torch.inference_mode()
def test_what_has_no_tail_runs_whole_passes(family: str, config: PsimVariant) -> None:
    guarded = with_variant(tiny_victim(family), config)
    assert guarded.last_layer is None
    assert guarded.forward_passes > 2
    readings, own = guarded.screen(some_inputs())
    assert (readings.shape, own) == ((1, len(config.keep_at), 3), None)


@pytest.mark.parametrize("family", ["bert", "llama", "deberta"])
@torch.inference_mode()
def test_an_untrained_checkpoint_is_the_victim_and_costs_nothing(family: str) -> None:
    victim, inputs = tiny_victim(family), some_inputs()
    guarded = trained(guard(victim, lora_config(victim, 1), 3))
    first = guarded.checkpoints[0]
    for name, weights in guarded.psim.named_parameters():
        if f".lora_B.{first}." in name:
            weights.zero_()
    before, passes = guarded.screen(inputs)[0], guarded.forward_passes
    guarded.reuse_untrained()
    readings, own = guarded.screen(inputs)
    torch.testing.assert_close(readings, before, rtol=0, atol=1e-6)
    torch.testing.assert_close(own, guarded.classify(inputs), rtol=0, atol=1e-6)
    torch.testing.assert_close(own, readings[:, 0], rtol=0, atol=0)
    expected = passes - 1 if family == "deberta" else 1
    assert guarded.forward_passes == pytest.approx(expected)


@torch.inference_mode()
def test_checkpoints_that_are_all_trained_leave_the_victim_a_pass_of_its_own() -> None:
    guarded = trained(guard(victim := tiny_victim("deberta"), lora_config(victim, 1), 3))
    guarded.reuse_untrained()
    readings, own = guarded.screen(some_inputs())
    assert (len(readings), own) == (1, None)
    assert guarded.forward_passes > 2


def test_modernbert_that_reads_the_mean_of_all_tokens_has_no_tail() -> None:
    victim: Any = tiny_victim("modernbert")
    victim.config.classifier_pooling = "mean"
    assert guard(victim, lora_config(victim, 1)).last_layer is None


@torch.inference_mode()
def test_mpnet_says_what_it_said_while_its_adapters_are_off() -> None:
    victim: Any = tiny_victim("mpnet")
    inputs = collate([Encoding((0, *range(5, 25), 2), False), Encoding((0, 7, 2), False)], 1, CPU)
    bare = victim(**inputs).logits.softmax(-1)
    guarded = with_variant(victim, PsimVariant(keep_at=(0.9, 0.5)))
    for name, weights in guarded.psim.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weights, std=0.5)
    torch.testing.assert_close(guarded.classify(inputs), bare, rtol=0, atol=1e-6)
    readings = psim_of(guarded, inputs)
    torch.testing.assert_close(readings, whole(guarded, inputs), rtol=0, atol=1e-5)
    assert (readings - bare[:, None]).abs().max() > 1e-3, "the adapters matter"
    torch.testing.assert_close(guarded.classify(inputs), bare, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_an_adapter_on_values_only_has_a_tail_too() -> None:
    config = PsimVariant(adapter="value", keep_at=(0.9, 0.5))
    guarded, inputs = trained(with_variant(tiny_victim("bert"), config)), some_inputs()
    assert guarded.last_layer is not None
    torch.testing.assert_close(psim_of(guarded, inputs), whole(guarded, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_goes_on_where_screening_ended(
    dtype: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = TorchEngine(guarded_victim("bert"), tokenizer, 64, dtype)
    batch = engine.encode(["good", "a slow film was not bad", "the room"])
    states = engine.screen(batch).states
    assert all(isinstance(state, Withheld) and len(state) == 0 for state in states)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(engine.classify(states), engine.classify(batch), atol=tolerance)
    with pytest.raises(TypeError, match="not both"):
        engine.classify([states[0], batch[0]])
