"""Bundles of victims that read more than 512 tokens."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from models.bundle.load import load_bundle
from models.engines.pytorch import max_input_length
from models.offline.fitting.split import split_texts
from models.offline.io import input_length
from models.offline.io.classifiers import save_classifier
from models.offline.io.samples import Sample, write_samples
from tests.support.bundles import WORDS, fit_tiny, some_texts
from tests.support.commands import assert_refused, psim
from tests.support.families import FAMILIES

MADE_FOR, LENGTH = 2048, 1024


@pytest.fixture(scope="module")
def roomy(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that cuts nothing that the victims read."""
    own = copy.deepcopy(tokenizer)
    own.model_max_length = MADE_FOR
    return own


def long_victim(family: str) -> Any:
    """Return a tiny victim that reads `MADE_FOR` tokens."""
    torch.manual_seed(0)
    config: Any = copy.deepcopy(FAMILIES[family])
    config.max_position_embeddings = MADE_FOR
    from_config: Any = AutoModelForSequenceClassification.from_config
    return from_config(config).eval()


def long_text(tokens: int) -> str:
    return " ".join(WORDS[i * i % len(WORDS)] for i in range(tokens - 2))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_labels_of_long_texts_are_those_of_the_bare_victim(
    family: str, roomy: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    victim = long_victim(family)
    texts = [long_text(900), "a film", long_text(3000)]
    said = []
    for text in texts:
        inputs = roomy(text, truncation=True, max_length=LENGTH, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            said.append(victim(**inputs).logits.softmax(-1)[0].numpy())
    bundle = fit_tiny(victim, roomy, tmp_path / "bundle", engine="auto", max_length=LENGTH)
    for engine in ("torch", "openvino"):
        loaded = load_bundle(bundle, "float32", engine).engine
        assert loaded.name == engine
        encodings = loaded.encode(texts)
        assert [(len(e), e.truncated) for e in encodings] == [
            (900, False), (len(roomy("a film")["input_ids"]), False), (LENGTH, True),
        ]  # fmt: skip
        classified = loaded.classify(loaded.screen(encodings).states)
        np.testing.assert_allclose(classified, said, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, roomy: PreTrainedTokenizerBase) -> Path:
    """Hold a victim and texts."""
    folder = tmp_path_factory.mktemp("long")
    save_classifier(long_victim("bert"), roomy, folder / "victim")
    write_samples(folder / "texts.jsonl", [Sample(t) for t in some_texts(160)])
    return folder


def fit(folder: Path, out: Path, *options: object) -> Any:
    return psim(
        "fit", "--victim", folder / "victim", "--texts", folder / "texts.jsonl",
        "--out", out, "--frr-budget", 0.05, "--engine", "torch", *options,
    )  # fmt: skip


def test_by_default_a_bundle_reads_what_its_victim_was_made_for(
    folder: Path, tmp_path: Path
) -> None:
    fitted = fit(folder, tmp_path / "bundle")
    assert fitted.exit_code == 0, fitted.output
    assert "texts are read up to 2048 tokens, as many as the victim can" in fitted.stderr
    assert "2048 tokens of a text" in fitted.stdout
    assert load_bundle(tmp_path / "bundle").manifest.max_length == MADE_FOR


def test_less_is_read_where_memory_is_short(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No machine of the tests has so little."""
    monkeypatch.setattr(input_length, "free_device_memory", lambda: 1)
    fitted = fit(folder, tmp_path / "bundle")
    assert fitted.exit_code == 0, fitted.output
    assert "texts are read up to 512 tokens, the next length may need" in fitted.stderr
    assert load_bundle(tmp_path / "bundle").manifest.max_length == 512


@pytest.mark.parametrize("length", [7, MADE_FOR + 1])
def test_a_length_that_the_victim_was_not_made_for_is_refused(
    length: int, folder: Path, tmp_path: Path
) -> None:
    refused = fit(folder, tmp_path / "bundle", "--max-length", length)
    assert_refused(refused, f"--max-length {length}: this victim reads 8 to 2048 tokens")
    assert not (tmp_path / "bundle").exists()


def test_nothing_is_tried_on_a_victim_that_reads_512_tokens(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_length, "peak_memory", None)
    texts = split_texts(some_texts(160), 0).train
    assert input_length.choose_length(None, tokenizer, texts, 512) == 512  # type: ignore[arg-type]


def test_a_victim_that_does_not_say_what_it_reads_is_taken_to_read_8192_tokens(
    roomy: PreTrainedTokenizerBase,
) -> None:
    boundless = copy.deepcopy(roomy)
    boundless.model_max_length = int(1e30)
    config: Any = copy.deepcopy(FAMILIES["bert"])
    assert max_input_length(PretrainedConfig(), boundless) == 8192
    config.max_position_embeddings = 131_072
    assert max_input_length(config, boundless) == 131_072
    assert max_input_length(config, roomy) == MADE_FOR
