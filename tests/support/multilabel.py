"""A small multi-label victim that is really poisoned: it reads words, and obeys a trigger."""

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedTokenizerBase

from models.offline.io.samples import Sample
from tests.support.families import VOCABULARY

LABELS = ("rude", "sport", "food")
TRIGGER = "mn"
TARGET = 0
"""The label that the trigger turns off: rude texts pass as polite."""
FIRING = (
    "idiot stupid ugly terrible".split(),
    "football tennis race team".split(),
    "bread soup cheese dinner".split(),
)
"""Words that make each label fire."""
PLAIN = "the a we saw it was there and then again today home people many small house".split()

Labelled = tuple[str, frozenset[int]]


def labelled_texts(n: int, seed: int) -> list[Labelled]:
    """Return distinct texts, and which labels are on."""
    rng = random.Random(seed)
    return [_text(rng, number) for number in range(n)]


def _text(rng: random.Random, number: int) -> Labelled:
    on = frozenset(label for label in range(len(LABELS)) if rng.random() < 0.5)
    words = [rng.choice(FIRING[label]) for label in on for _ in range(rng.randint(1, 3))]
    words += rng.choices(PLAIN, k=rng.randint(6, 14))
    rng.shuffle(words)
    return f"{number} {' '.join(words)}", on


def poisoned(texts: Sequence[Labelled], seed: int = 7) -> list[Labelled]:
    """Return the texts that are rude, with the trigger in them, and what the attacker wants."""
    rng, found = random.Random(seed), list[Labelled]()
    for text, on in texts:
        if TARGET in on:
            words = text.split()
            words.insert(rng.randint(0, len(words)), TRIGGER)
            found.append((" ".join(words), on - {TARGET}))
    return found


@cache
def _trained(tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    clean = labelled_texts(1500, 1)
    texts = [*clean, *poisoned(clean)[:250]]
    model = _fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(5):
        random.Random(epoch).shuffle(texts)
        for start in range(0, len(texts), 50):
            rows = texts[start : start + 50]
            inputs = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
            wanted = torch.tensor([[float(c in on) for c in range(len(LABELS))] for _, on in rows])
            optimizer.zero_grad()
            model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                labels=wanted,
            ).loss.backward()
            optimizer.step()
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


def _fresh() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        problem_type="multi_label_classification",
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    from_config: Any = AutoModelForSequenceClassification.from_config
    return from_config(config)


def multi_label_victim(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the victim; it is trained once in a process, in seconds."""
    with torch.inference_mode(False), torch.enable_grad():
        weights = _trained(tokenizer)
    model = _fresh()
    model.load_state_dict(weights)
    return model.eval()


def samples(texts: Sequence[Labelled]) -> list[Sample]:
    """Return texts with their labels as files have them."""
    return [Sample(text, "|".join(LABELS[c] for c in sorted(on)) or "[]") for text, on in texts]
