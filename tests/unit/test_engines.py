"""OpenVINO says what PyTorch says, whatever the batch is; what runs a bundle is chosen safely."""

import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerBase

from models.bundle import load as bundles
from models.bundle.layout import READINGS
from models.bundle.load import choose, load_bundle
from models.bundle.manifest import Manifest, RuntimeRecord
from models.engines import registry
from models.engines.base import REFERENCE, RUNTIMES, Encoding, Runtime, Withheld
from models.engines.openvino import GuardedGraph, parts_of, rounded, trace
from models.engines.pytorch import TorchEngine, collate, max_input_length
from models.engines.registry import make_engine
from models.errors import BundleError, EngineError
from models.network.activations import Activations
from models.network.adapters import lora_config
from models.network.guarded import Guarded, guard
from models.offline.fitting.fit import fit
from models.offline.fitting.split import split_texts
from models.offline.io.inference import predict
from tests.support.bundles import fit_tiny, forge, rehash, some_texts
from tests.support.fakes import fake_bundle
from tests.support.families import (
    FAMILIES,
    TAILED,
    VOCABULARY,
    guarded_victim,
    tiny_victim,
    trained,
)

pytestmark = pytest.mark.slow  # it trains, and compiles graphs

CPU = torch.device("cpu")
LONGEST = 129
"""Tokens of the longest text; no multiple of what lengths are rounded up to."""


@cache
def pair(family: str) -> tuple[Guarded, GuardedGraph]:
    """Return a module whose both screens matter, and its graph."""
    guarded = guarded_victim(family)
    layers, size = len(guarded.trunk.watched), guarded.config.hidden_size
    guarded.activations = Activations(torch.randn(layers, size, size), torch.randn(layers, 3, size))
    return guarded, GuardedGraph(trace(guarded), "float32", LONGEST)


@pytest.mark.parametrize("family", TAILED)
@settings(max_examples=8, deadline=None)  # each compiles graphs for its shapes
@given(
    texts=st.lists(
        st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=40), min_size=1, max_size=5
    )
)
@torch.inference_mode()
def test_the_graph_agrees_with_the_module(family: str, texts: list[list[int]]) -> None:
    guarded, graph = pair(family)
    inputs = collate([Encoding(tuple(text), False) for text in texts], 0, CPU)
    (readings, own), (expected, _) = graph.screen(inputs), guarded.screen(inputs)
    torch.testing.assert_close(readings, expected, rtol=1e-4, atol=1e-4)
    for classified in (own, graph.classify(inputs)):
        torch.testing.assert_close(classified, guarded.classify(inputs), rtol=0, atol=1e-4)
    # And a text does not mind its batch-mates.
    for number, text in enumerate(texts):
        alone, _ = graph.screen(collate([Encoding(tuple(text), False)], 0, CPU))
        torch.testing.assert_close(readings[number], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", TAILED)
@torch.inference_mode()
def test_the_longest_texts_and_answers_that_are_kept(family: str) -> None:
    guarded, graph = pair(family)
    long, short = (
        collate([Encoding(tuple(range(5, 5 + length)), False)], 0, CPU) for length in (LONGEST, 9)
    )
    readings, own = graph.screen(long)
    graph.screen(short)  # a later call leaves the answers of an earlier one alone
    torch.testing.assert_close(readings, guarded.screen(long)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own, guarded.classify(long), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_lengths_are_not_rounded_up_beyond_the_positions_of_the_victim() -> None:
    config = FAMILIES["bert"].to_dict() | {"max_position_embeddings": LONGEST}
    victim: Any = BertForSequenceClassification(BertConfig(**config))
    guarded = trained(guard(victim, lora_config(victim, 1), 3))
    graph = GuardedGraph(trace(guarded), "float32", LONGEST)
    inputs = collate([Encoding(tuple(range(5, 5 + LONGEST)), False)], 0, CPU)
    readings, expected = graph.screen(inputs)[0], guarded.screen(inputs)[0]
    torch.testing.assert_close(readings, expected, rtol=0, atol=1e-4)


def test_mpnet_numbers_positions_from_behind_its_padding(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    config: Any = FAMILIES["mpnet"]
    assert (config.max_position_embeddings, config.pad_token_id) == (131, 1)
    length = max_input_length(config, tokenizer)
    assert length == LONGEST
    victim = tiny_victim("mpnet")
    inputs = collate([Encoding((0,) * length, False)], 1, CPU)
    assert victim(**inputs).logits.isfinite().all()
    with pytest.raises(IndexError):
        victim(**collate([Encoding((0,) * (length + 1), False)], 1, CPU))


def test_a_graph_needs_a_tail_and_no_module_afterwards(tokenizer: PreTrainedTokenizerBase) -> None:
    victim = tiny_victim("deberta")
    openvino = Runtime("openvino", "float32")
    with pytest.raises(EngineError, match="cannot run this deberta model"):
        make_engine(openvino, guard(victim, lora_config(victim, 1)), tokenizer, 64)
    guarded = guarded_victim("bert")
    engine = make_engine(openvino, guarded, tokenizer, 64)
    batch = engine.encode(["good", "a slow film was not bad"])
    states = engine.screen(batch).states
    assert all(isinstance(state, Withheld) for state in states)
    expected = TorchEngine(guarded, tokenizer, 64).classify(batch)
    for weights in guarded.parameters():
        weights.data = torch.empty(0)
    np.testing.assert_allclose(engine.classify(states), expected, atol=1e-5)
    np.testing.assert_allclose(engine.classify(batch), expected, atol=1e-5)


def test_openvino_reports_to_nobody() -> None:
    modules: dict[str, object] = dict(sys.modules)
    assert modules["openvino_telemetry"] is None
    assert "openvino.tools.ovc.telemetry_stub" in sys.modules


@pytest.fixture(scope="module")
def fitted(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    return fit_tiny(tiny_victim("bert"), tokenizer, folder / "bundle", engine="auto")


@pytest.fixture
def bundle(fitted: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(fitted, tmp_path / "bundle"))


def manifest_with(default: str, agreement: float = 1.0) -> Manifest:
    """Return a manifest with all runtimes, of which all but the reference agree so much."""
    manifest = fake_bundle().manifest
    (reference,) = manifest.calibrations
    others = [
        reference.model_copy(
            update={
                **runtime._asdict(),
                "parity": reference.parity.model_copy(update={"decisions_agree": agreement}),
            }
        )
        for runtime in RUNTIMES
        if runtime != REFERENCE
    ]
    engine, dtype = default.split("/")
    record = RuntimeRecord.model_validate({"engine": engine, "dtype": dtype})
    return manifest.model_copy(update={"calibrations": [reference, *others], "default": record})


def test_fitting_compares_all_engines_and_takes_the_fastest_that_agrees(bundle: Path) -> None:
    manifest = Manifest.model_validate_json((bundle / "manifest.json").read_bytes())
    by_runtime = {own.runtime: own.parity for own in manifest.calibrations}
    assert {REFERENCE, Runtime("openvino", "float32")} <= by_runtime.keys()
    assert by_runtime[REFERENCE].largest_difference == 0
    assert by_runtime[Runtime("openvino", "float32")].decisions_agree == 1
    assert 0 < by_runtime[Runtime("openvino", "float32")].largest_difference < 1e-4
    passing = {runtime: p.texts_per_s for runtime, p in by_runtime.items() if p.agrees}
    assert passing[manifest.default.runtime] == max(passing.values())


def test_a_bundle_comes_back_bit_for_bit_and_decides_alike_by_both_engines(bundle: Path) -> None:
    texts, decisions = split_texts(some_texts(160), 0).calibrate, []
    stored = load_arrays(bundle / READINGS)
    for engine in ("openvino", "torch"):
        loaded = load_bundle(bundle, "float32", engine)
        assert (loaded.engine.name, loaded.engine.dtype) == (engine, "float32")
        readings = predict(loaded.engine, loaded.engine.encode(texts))
        assert np.array_equal(readings, stored[f"{engine}/float32"])
        decisions.append([loaded.screen.judge(row).poisoned for row in readings])
    assert decisions[0] == decisions[1]
    assert 0 < sum(decisions[0]) < len(texts)


@pytest.mark.parametrize(
    ("default", "engine", "dtype", "chosen"),
    [
        ("openvino/float32", None, None, "openvino/float32"),
        ("torch/bfloat16", None, None, "torch/bfloat16"),
        ("openvino/float32", "torch", None, "torch/float32"),
        ("torch/bfloat16", None, "float32", "torch/float32"),
        ("openvino/float32", None, "float32", "openvino/float32"),
        ("openvino/float32", None, "bfloat16", "openvino/bfloat16"),
        ("openvino/bfloat16", None, "float32", "openvino/float32"),
        ("torch/float32", None, "bfloat16", "torch/bfloat16"),
        ("torch/float32", "openvino", None, "openvino/float32"),
    ],
)
def test_what_is_asked_for_goes_before_the_default(
    default: str, engine: str | None, dtype: str | None, chosen: str, everything_runs: None
) -> None:
    assert str(choose(manifest_with(default), engine, dtype).runtime) == chosen


@pytest.fixture
def everything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor of this machine has."""
    for module in (bundles, registry):
        monkeypatch.setattr(module, "runs_here", lambda runtime: True)


@pytest.mark.parametrize(
    ("engine", "dtype", "chosen"),
    [
        (None, None, "torch/float32"),
        (None, "bfloat16", "torch/bfloat16"),
        ("openvino", None, "openvino/bfloat16"),
    ],
)
def test_a_gpu_is_not_left_idle_unless_that_is_asked_for(
    engine: str | None,
    dtype: str | None,
    chosen: str,
    everything_runs: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "best_device", lambda: torch.device("cuda"))
    manifest = manifest_with("openvino/bfloat16")
    assert str(choose(manifest, engine, dtype).runtime) == chosen


def test_what_does_not_agree_with_the_reference_has_to_be_asked_for(everything_runs: None) -> None:
    manifest = manifest_with("openvino/bfloat16", agreement=0.998)
    assert choose(manifest, None, None).runtime == REFERENCE
    assert str(choose(manifest, "openvino", "bfloat16").runtime) == "openvino/bfloat16"


def test_without_the_engine_of_its_default_a_bundle_runs_by_torch(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge(bundle, default={"engine": "openvino", "dtype": "float32"})
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "openvino" else name)
    loaded = load_bundle(bundle).engine
    assert (loaded.name, loaded.dtype) == REFERENCE
    with pytest.raises(BundleError, match=r"not installed: pip install 'psim-gateway\[openvino\]'"):
        load_bundle(bundle, engine="openvino")
    with pytest.raises(EngineError, match="not installed"):
        fit(tiny_victim("bert"), None, [], bundle, name="x", engine="openvino")  # type: ignore[arg-type]


def test_a_forged_manifest_chooses_nothing_that_it_cannot_prove(bundle: Path) -> None:
    forge(bundle, default={"engine": "os", "dtype": "float32"})
    with pytest.raises(BundleError, match=r"default\.engine"):
        load_bundle(bundle)
    calibrations = json.loads((bundle / "manifest.json").read_text())["calibrations"]
    own = next(c for c in calibrations if c["engine"] == "openvino")
    forge(bundle, default={"engine": "openvino", "dtype": own["dtype"]}, calibrations=[own])
    # Readings of other texts in place of this engine's.
    readings = load_arrays(bundle / READINGS)
    name = f"openvino/{own['dtype']}"
    save_arrays({**readings, name: readings[name][::-1].copy()}, bundle / READINGS)
    rehash(bundle, READINGS)
    with pytest.raises(BundleError, match="agrees less than the manifest says"):
        load_bundle(bundle)
    with pytest.raises(BundleError, match="no calibration for torch/float32; the bundle has openv"):
        load_bundle(bundle, engine="torch")


def test_a_victim_without_a_tail_is_fitted_for_torch_or_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    out = fit_tiny(tiny_victim("deberta"), tokenizer, tmp_path / "a", engine="auto")
    manifest = Manifest.model_validate_json((out / "manifest.json").read_bytes())
    assert {own.engine for own in manifest.calibrations} == {"torch"}
    with pytest.raises(EngineError, match="openvino cannot run this victim"):
        fit_tiny(tiny_victim("deberta"), tokenizer, tmp_path / "b", engine="openvino")
    assert not (tmp_path / "b").exists()


@given(lengths=st.lists(st.integers(1, 512), min_size=1, max_size=70))
def test_openvino_meets_few_shapes_and_every_token(lengths: list[int]) -> None:
    ids = [[n + 1] * n + [0] * (max(lengths) - n) for n in lengths]
    inputs = {
        "input_ids": torch.tensor(ids),
        "attention_mask": (torch.tensor(ids) > 0).long(),
    }
    parts = list(parts_of(inputs, 512))
    rows = [
        row[: int(mask.sum())].tolist() for part in parts for row, mask in zip(*part, strict=True)
    ]
    assert rows == [[n + 1] * n for n in lengths]
    assert {len(ids) for ids, _ in parts} <= {1, 2, 4, 8}
    assert {ids.shape[1] for ids, _ in parts} <= {rounded(n) for n in range(1, 513)}
    assert len({rounded(n) for n in range(1, 513)}) == 20
