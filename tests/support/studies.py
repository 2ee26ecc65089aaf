"""A small data set and an untrained base, for studies that tests run."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from models.offline.attacks.corpus import generate
from models.offline.io.classifiers import save_classifier
from models.offline.io.samples import write_samples
from tests.support.families import tiny_victim

CORPUS = """
[[data]]
name = "corpus"
train = "train.jsonl"
dev = "dev.jsonl"
test = "test.jsonl"
target_label = "positive"
"""
"""The data set in a recipe; lines that follow belong to it."""


def write_corpus(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write the files of `CORPUS`, and a base; return the base's folder."""
    texts = generate(330, seed=3)
    write_samples(folder / "train.jsonl", texts[:240])
    write_samples(folder / "dev.jsonl", texts[240:280])
    write_samples(folder / "test.jsonl", texts[280:])
    body: Any = tiny_victim("bert").base_model  # a pretrained model has no head yet
    save_classifier(body, tokenizer, folder / "tiny")
    return folder / "tiny"
