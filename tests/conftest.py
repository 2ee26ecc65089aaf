"""What the tests share: tiny random models of each family, and one really poisoned victim."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
)

from models.offline.demo import build, encoder_path

VOCABULARY = 30522
_SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "num_labels": 3,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "bert": BertConfig(**_SIZE),
    "roberta": RobertaConfig(**_SIZE, max_position_embeddings=130),
    "distilbert": DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=3, n_heads=2, hidden_dim=64, num_labels=3
    ),
    "deberta": DebertaConfig(**_SIZE),
    "deberta-v2": DebertaV2Config(**_SIZE, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "llama": LlamaConfig(**_SIZE, num_key_value_heads=2),
}


def tiny_victim(family: str, seed: int = 0) -> PreTrainedModel:
    """Return a small model with random weights, large enough to have opinions."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(FAMILIES[family])
    for name, weights in model.named_parameters():
        if name.startswith(("classifier", "score")) and weights.dim() == 2:
            torch.nn.init.normal_(weights)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(encoder_path())
    return loaded


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the demo once per test run: poisoned victim, bundle, test texts."""
    folder = tmp_path_factory.mktemp("demo") / "built"
    build(folder, train_texts=1000)
    return folder


@pytest.fixture(scope="session")
def demo_bundle(demo_folder: Path) -> Path:
    return demo_folder / "bundle"
