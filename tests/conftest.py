"""What the tests share: a tokenizer, and one really poisoned victim with its bundle."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from models.offline.demo import build
from models.offline.io.classifiers import encoder_path


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
