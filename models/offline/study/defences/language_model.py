"""A causal language model for the perplexity of texts, which the defence ONION needs.

Any model of the hub will do. Without one, a small model is trained on clean texts in minutes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import ByteLevelBPETokenizer
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from models.detection.screen import FloatArray
from models.engines.batching import length_sorted_batches
from models.engines.pytorch import best_device, has_bfloat16
from models.errors import DataError, VictimError
from models.offline.io.atomic import replaced
from models.offline.io.progress import progress

MAX_LENGTH = 256
"""Tokens of a text that are read, including the initial one."""
VOCABULARY = 8192
SHAPE: dict[str, Any] = {"n_positions": MAX_LENGTH, "n_embd": 256, "n_layer": 2, "n_head": 4}
BATCH_TOKENS = 2048
TRAIN_ROWS = 32
LEARNING_RATE = 2e-3
END = "<|endoftext|>"
IGNORED = -100
"""Label of padding, for which the cross-entropy is 0."""
LARGEST_LOSS = 80.0
"""A loss whose exponential is still a finite float32."""


@dataclass(frozen=True)
class LanguageModel:
    """A causal model, in evaluation mode, and its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, at most `MAX_LENGTH`, after an initial one."""
        if not texts:
            return []
        begin = self.tokenizer.bos_token_id
        longest = min(MAX_LENGTH, self.tokenizer.model_max_length)
        ids = self.tokenizer(
            list(texts), add_special_tokens=False, truncation=True, max_length=longest - 1
        )["input_ids"]
        return [[begin, *row] for row in ids]

    def losses(self, batch: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the summed negative log-likelihood, in nats, of each text's tokens, shape (rows,).

        Args:
            batch: rows of `encode`; the initial token of a text is given, not predicted.
        """
        rows = [torch.tensor(row) for row in batch]
        ids = pad_sequence(rows, True, IGNORED).to(self.model.device)
        # Padding is on the right, where a causal model does not see it.
        output = self.model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long())
        following = functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
        scores = output.logits.float().flatten(0, 1)
        losses = functional.cross_entropy(scores, following.flatten(), reduction="none")
        return losses.view(ids.shape).sum(1)


def perplexities(lm: LanguageModel, texts: Sequence[str]) -> FloatArray:
    """Return exp of the mean negative log-likelihood per token of each text, shape (n,).

    The first token is predicted too, from the initial one. A text without tokens has perplexity 1.
    Large perplexities are capped below infinity, so that differences are numbers.

    Raises:
        VictimError: the model gives NaN.
    """
    result, encoded = np.empty(len(texts), np.float32), lm.encode(texts)
    bar = tqdm(total=len(texts), desc="perplexity", unit=" texts", leave=False, disable=None)
    for batch in length_sorted_batches([len(row) for row in encoded], BATCH_TOKENS):
        with torch.inference_mode():
            losses = lm.losses([encoded[i] for i in batch]).cpu().numpy()
        tokens = np.array([max(1, len(encoded[i]) - 1) for i in batch])
        result[batch] = np.exp(np.minimum(losses / tokens, LARGEST_LOSS))
        bar.update(len(batch))
    bar.close()
    if np.isnan(result).any():
        raise VictimError("the language model gives NaN; choose another one")
    return result


def load_language_model(source: str) -> LanguageModel:
    """Load a causal language model, from safetensors only and without foreign code.

    Args:
        source: folder or hub id.

    Raises:
        VictimError: the source is no causal language model, has pickled weights only, or needs
            foreign code.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise VictimError(f"{source} cannot be loaded as a language model: {error}") from error
    model, report = loaded
    if report["missing_keys"] or not _is_causal(model.eval().float()):
        raise VictimError(f"{source} is no trained causal language model; name one such as gpt2")
    tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token
    if tokenizer.bos_token is None:
        raise VictimError(f"the tokenizer of {source} has no bos_token or eos_token; set one")
    return LanguageModel(model.to(best_device()), tokenizer)


def _is_causal(model: Any) -> bool:
    """Return whether scores are independent of later tokens; BERT, which loads too, is refused."""
    with torch.inference_mode():
        one, other = model(input_ids=torch.tensor([[1, 2], [1, 3]])).logits[:, 0]
    return torch.allclose(one, other, atol=1e-4)


def train_language_model(
    texts: Sequence[str], out: Path, *, epochs: int = 4, seed: int = 0
) -> Path:
    """Train a byte-level BPE tokenizer and a small GPT-2 on clean texts; return `out`.

    Args:
        texts: clean texts; a useful model needs thousands.
        out: folder for the model, in safetensors, and the tokenizer; replaced if it exists.
        epochs: passes over the texts.
        seed: seed of the weights and of the order of texts.

    Raises:
        DataError: no text has a word.
    """
    if not any(text.strip() for text in texts):
        raise DataError("there are no texts to train a language model on")
    set_seed(seed)
    tokenizer = _train_tokenizer(texts)
    end = tokenizer.eos_token_id
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **SHAPE)
    model: Any = GPT2LMHeadModel(config)
    lm = LanguageModel(model.to(best_device()), tokenizer)
    _train(lm, texts, epochs)
    with replaced(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return out


def _train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    # With a space before it, a word is the same token at the beginning of a text as elsewhere.
    bpe = ByteLevelBPETokenizer(add_prefix_space=True)
    bpe.train_from_iterator(texts, VOCABULARY, special_tokens=[END], show_progress=False)
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe._tokenizer, model_max_length=MAX_LENGTH, **names
    )


def _train(lm: LanguageModel, texts: Sequence[str], epochs: int) -> None:
    rows = [row for row in lm.encode(texts) if len(row) > 1]
    batches = list(length_sorted_batches([len(row) for row in rows], BATCH_TOKENS, TRAIN_ROWS))
    optimizer = torch.optim.AdamW(lm.model.parameters(), weight_decay=0.1)
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    device = best_device()
    lm.model.train()
    bar = progress("training the language model", total=steps, unit=" steps")
    for _ in range(epochs):
        for batch in random.sample(batches, len(batches)):
            with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
                losses = lm.losses([rows[i] for i in batch])
            loss = losses.sum() / sum(len(rows[i]) - 1 for i in batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.2f}")
    bar.close()
