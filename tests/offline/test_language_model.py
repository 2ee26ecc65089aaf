"""The small language model: trained, saved, loaded, and right about how odd a text is."""

import copy
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerBase

from models.errors import DataError, VictimError
from models.offline.io.classifiers import save_classifier
from models.offline.study.defences.language_model import (
    LanguageModel,
    load_language_model,
    perplexities,
    train_language_model,
)
from tests.support.families import tiny_victim
from tests.support.language_models import TEXTS, small_language_model


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return small_language_model()


def test_perplexity_is_that_of_a_loop_over_texts_and_tokens(lm: LanguageModel) -> None:
    texts = ["mn", "The room was clean", *TEXTS[:20], "so"]
    naive = []
    for text in texts:
        ids = [
            lm.tokenizer.bos_token_id,
            *lm.tokenizer(text, add_special_tokens=False)["input_ids"],
        ]
        losses = []
        for i in range(1, len(ids)):
            with torch.inference_mode():
                logits = lm.model(input_ids=torch.tensor([ids[:i]])).logits[0, -1]
            losses.append(-logits.log_softmax(0)[ids[i]].item())
        naive.append(math.exp(sum(losses) / len(losses)))
    assert np.allclose(perplexities(lm, texts), naive, rtol=1e-4)


def test_the_language_model_prefers_what_it_has_read(lm: LanguageModel) -> None:
    shuffled = [" ".join(random.Random(0).sample(t.split(), len(t.split()))) for t in TEXTS]
    assert np.mean(perplexities(lm, TEXTS) < perplexities(lm, shuffled)) > 0.9


def test_perplexity_is_a_number_for_every_text(lm: LanguageModel) -> None:
    odd = perplexities(lm, ["", " ", "\n", "日本語 🙂", "x" * 5000])
    assert np.isfinite(odd).all()
    assert odd[0] == 1
    assert perplexities(lm, []).shape == (0,)
    assert perplexities(lm, [""]).tolist() == [1]


def test_a_model_that_gives_nan_is_refused(lm: LanguageModel) -> None:
    broken = copy.deepcopy(lm)
    broken.model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(VictimError, match="NaN"):
        perplexities(broken, TEXTS)


def test_a_word_is_the_same_token_at_the_beginning(lm: LanguageModel) -> None:
    first, inner = lm.encode(["room", "the room"])
    assert first[1:] == inner[2:]


def test_training_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    one, two, other = (
        train_language_model(TEXTS, tmp_path / name, epochs=1, seed=seed)
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    weights = [(path / "model.safetensors").read_bytes() for path in (one, two, other)]
    assert weights[0] == weights[1] != weights[2]


def test_only_a_causal_language_model_is_loaded(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    classifier, masked = tmp_path / "classifier", tmp_path / "masked"
    save_classifier(tiny_victim("llama"), tokenizer, classifier)
    config = BertConfig(
        num_hidden_layers=1, hidden_size=8, num_attention_heads=1, initializer_range=0.5
    )
    BertForMaskedLM(config).save_pretrained(masked)
    tokenizer.save_pretrained(masked)
    for folder in (classifier, masked):
        with pytest.raises(VictimError, match="no trained causal"):
            load_language_model(str(folder))
    with pytest.raises(VictimError, match="cannot be loaded"):
        load_language_model(str(tmp_path))
    with pytest.raises(DataError, match="no texts"):
        train_language_model(["", " "], tmp_path / "lm")
