"""Every model type that transformers can classify with: guarded, or refused in one line."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from models.bundle.load import load_bundle
from models.bundle.save import save_weights
from models.engines.base import Encoding
from models.engines.pytorch import collate, max_input_length
from models.errors import VictimError
from models.network.adapters import (
    adapter_weights,
    layer_stack,
    load_adapter_weights,
    lora_config,
    query_and_value_names,
)
from models.network.guarded import Guarded, guard
from models.network.trunk import Inputs
from models.offline.fitting.fit import fit
from models.offline.fitting.psim import PsimConfig, train_psim
from tests.support.bundles import some_texts
from tests.support.model_types import (
    LAYERS,
    MODEL_TYPES,
    on_page,
    outcome_of,
    pad_id_of,
    some_encodings,
    some_inputs,
    table,
    tiny_model,
)

CPU = torch.device("cpu")
LONGFORMER = "query value query_global value_global".split()
"""Its first token, which is read, goes by projections of its own."""
ROWS: dict[str, str] = {}
"""Row of the table by model type, filled by the first test."""


@torch.inference_mode()
def screened(guarded: Guarded, inputs: Inputs) -> torch.Tensor:
    return guarded.run(inputs).logits


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_each_is_guarded_or_refused(
    model_type: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    try:
        model: Any = tiny_model(model_type)
    except ImportError:
        model = None
    outcome = outcome_of(model_type, model)
    ROWS[model_type] = outcome.row
    assert "\n" not in outcome.row and outcome.row.isprintable()
    guarded = outcome.guarded
    if guarded is None:
        return
    inputs = some_inputs(model)
    bare = tiny_model(model_type)
    with torch.inference_mode():
        said = bare(**inputs).logits
    torch.testing.assert_close(guarded.classify(inputs), said.softmax(-1), rtol=0, atol=0)
    torch.testing.assert_close(screened(guarded, inputs)[:, 0], said, rtol=1e-5, atol=1e-5)

    config = PsimConfig(max_steps=2, check_every=1, keep_at=(1.0, 0.5), learning_rate=0.1)
    train_psim(guarded, some_encodings(), some_encodings(), config, pad_id_of(model))
    torch.testing.assert_close(guarded.classify(inputs), said.softmax(-1), rtol=0, atol=0)
    first, trained = screened(guarded, inputs).unbind(1)
    torch.testing.assert_close(first, said, rtol=1e-5, atol=1e-5)
    assert (trained - said).abs().max() > 1e-6 * said.abs().max(), "training changed the screen"

    reads_all_that_it_may(guarded, model)
    comes_back_as_it_was_saved(guarded, model, tokenizer, tmp_path)
    halved = guarded.to(torch.bfloat16)
    with torch.inference_mode():
        assert halved.screen(inputs)[0].isfinite().all(), "every victim is tried in bfloat16"


@torch.inference_mode()
def reads_all_that_it_may(guarded: Guarded, model: Any) -> None:
    tokenizer = cast(Any, SimpleNamespace(model_max_length=10**9))
    length = min(max_input_length(model.config, tokenizer), 2048)  # others take too much memory
    longest = Encoding((7,) * length, False)
    assert guarded.screen(collate([longest], pad_id_of(model), CPU))[0].isfinite().all()


@torch.inference_mode()
def comes_back_as_it_was_saved(
    guarded: Guarded, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    inputs = some_inputs(model)
    save_weights(folder, model, guarded, tokenizer)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(
        folder / "victim", use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), "as `load_bundle` asks for"
    again = guard(loaded.eval(), lora_config(loaded, 1), 2)
    load_adapter_weights(again.psim, adapter_weights(guarded.psim))
    torch.testing.assert_close(screened(again, inputs), screened(guarded, inputs))


def test_the_page_has_the_table() -> None:
    if ROWS.keys() != {*MODEL_TYPES}:
        pytest.skip("the test above did not run for all model types")
    assert on_page() == table(ROWS), "run python -m tests.support.model_types"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_is_watched_is_the_token_that_is_read(model_type: str) -> None:
    """Where a head reads one token; some read the mean."""
    try:
        model: Any = tiny_model(model_type)
        query_and_value_names(model)
    except (ImportError, VictimError):
        return
    layers = [] if model.config.is_encoder_decoder else layer_stack(model)
    if not layers:
        return
    model.requires_grad_(False)
    states: list[torch.Tensor] = []
    layers[-1].register_forward_hook(lambda _, __, output: _with_gradient(output, states))
    inputs = some_inputs(model)
    logits = model(**inputs).logits
    (gradient,) = torch.autograd.grad((logits * torch.tensor([1.0, 2.0, -4.0])).sum(), states)
    read = [row.any(-1).nonzero().flatten().tolist() for row in gradient]
    assert all(read)
    if all(len(own) == 1 for own in read):
        guarded = guard(tiny_model(model_type), lora_config(model, 1))
        assert read == [[n] for n in guarded.trunk.read_positions(inputs)]


def _with_gradient(output: Any, states: list[torch.Tensor]) -> Any:
    hidden, *others = output if isinstance(output, tuple | list) else (output,)
    states.append(hidden.detach().requires_grad_())
    return type(output)([states[0], *others]) if others or output is not hidden else states[0]


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("gpt2", ["transformer.h.{}.attn.c_attn"]),
        ("jetmoe", ["model.layers.{}.self_attention.kv_proj"]),
        ("ctrl", [f"transformer.h.{{}}.multi_head_attention.{name}" for name in ("Wq", "Wv")]),
        ("gemma3", [f"model.language_model.layers.{{}}.self_attn.{n}_proj" for n in "qv"]),
        (
            "longformer",
            [f"longformer.encoder.layer.{{}}.attention.self.{n}" for n in LONGFORMER],
        ),
        ("canine", [f"canine.encoder.layer.{{}}.attention.self.{n}" for n in ("query", "value")]),
    ],
)
def test_projections_are_those_of_the_text_s_own_stack(model_type: str, names: list[str]) -> None:
    expected = [name.format(layer) for layer in range(LAYERS) for name in names]
    assert query_and_value_names(tiny_model(model_type)) == expected


def test_only_attention_counts_in_hybrids() -> None:
    """State-space layers have an `in_proj` as DeBERTa has one."""
    assert query_and_value_names(tiny_model("jamba")) == [
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 2) for name in "qv"
    ]


@pytest.mark.parametrize(
    "model_type", ["gpt2", "openai-gpt", "squeezebert", "albert", "xlm", "canine", "longformer"]
)
def test_a_bundle_is_made_of_it(
    model_type: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model: Any = tiny_model(model_type, vocabulary=len(tokenizer))
    config = PsimConfig(max_steps=4, keep_at=(1.0, 0.5))
    texts = some_texts(160)
    fit(model, tokenizer, texts, tmp_path / "b", name="x", frr_budget=0.05, config=config)
    engine = load_bundle(tmp_path / "b", "float32").engine
    bare = tiny_model(model_type, vocabulary=len(tokenizer))
    encoded = tokenizer(["a good film"], return_tensors="pt")
    with torch.inference_mode():
        said = bare(encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
    got = torch.tensor(engine.classify(engine.encode(["a good film"])))
    torch.testing.assert_close(got, said.softmax(-1), rtol=0, atol=1e-5)


class Noisy(nn.Module):
    """Makes what goes through it differ each time."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.randn_like(hidden)


def test_a_victim_that_changes_its_mind_is_refused() -> None:
    model: Any = tiny_model("bert")
    model.dropout = Noisy()
    assert "other scores each time" in outcome_of("bert", model).row


def test_layers_that_run_twice_are_refused() -> None:
    """As Perceiver's do, by its config; a trunk would be reused within a pass."""
    model: Any = tiny_model("deberta")
    layers = model.deberta.encoder.layer
    run = layers[0].forward
    layers[0].forward = lambda hidden, *args, **kwargs: run(
        layers[1](run(hidden, *args, **kwargs)[0], *args, **kwargs)[0], *args, **kwargs
    )
    assert "cannot share its lower layers" in outcome_of("deberta", model).row


def test_adapters_that_change_nothing_are_refused() -> None:
    model: Any = tiny_model("bert")
    model.bert.encoder.layer[-1].attention.output = Cut()
    model.config.model_type = "no tail for it"
    assert "change no score" in outcome_of("bert", model).row


class Cut(nn.Module):
    """Drops what attention says."""

    def forward(self, attended: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return hidden
