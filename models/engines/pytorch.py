"""The guarded module run by PyTorch, on the CPU or on a CUDA device."""

import copy
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from models.detection.screen import FloatArray
from models.engines.base import ClassifierState, Encoding, IntArray, Screening, Withheld
from models.errors import EngineError

if TYPE_CHECKING:  # importing these takes memory that not every process needs
    from models.network.guarded import Guarded
    from models.network.trunk import Inputs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHORT_INPUT = 512
"""Tokens that any usual machine can have a model read at once."""
LONGEST_INPUT = 8192
"""Tokens that are read by default at most, by models that could read far more, and could be made to
by an attacker; and at all by models that do not say how many they can read."""
POSITIONS_AFTER_PADDING = set(
    "camembert data2vec-text esm layoutlmv3 lilt longformer luke markuplm mpnet roberta "
    "roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod".split()
)
"""Model types that number positions from their padding index + 1, as RoBERTa does."""
CHARS_PER_TOKEN = 16
"""`encode` cuts texts to this many characters per token of the model before tokenizing. To tokenize
all of a huge text only to truncate it would allow a denial of service."""


def best_device() -> torch.device:
    """Return the first CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16 faster than in float32."""
    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Module(Protocol):
    """Tensor operations of an engine: `models.network.guarded.Guarded`, or a stand-in for it."""

    @property
    def forward_passes(self) -> float:
        """See `Guarded.forward_passes`."""

    def screen(self, inputs: "Inputs") -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Guarded.screen`."""

    def classify(self, inputs: "Inputs") -> torch.Tensor:
        """See `Guarded.classify`."""


class ModuleEngine:
    """Base of engines: tokenizes texts for a module, and splits its output by text.

    Args:
        module: the model; owned by the engine from now on.
        tokenizer: the victim's tokenizer, with a padding token.
        max_length: tokens per text, special tokens included.
        device: device of the module's inputs.

    Raises:
        EngineError: it is not clear which special tokens the tokenizer puts around a text.
    """

    name: str
    dtype: str

    def __init__(
        self,
        module: Module,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        device: torch.device,
    ) -> None:
        self._module = module
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.device = device
        # Tokenizers are not thread-safe: to truncate, or not to, is a state of theirs.
        self._whole_tokenizer = copy.deepcopy(tokenizer)
        self._before, self._after = special_tokens(tokenizer)

    @property
    def device_type(self) -> str:
        """See `Engine.device_type`."""
        return self.device.type

    @property
    def window_length(self) -> int:
        """See `Engine.window_length`."""
        return self.max_length - len(self._before) - len(self._after)

    @property
    def forward_passes(self) -> float:
        """Cost of `screen` and `classify` together, in forward passes of the victim."""
        return self._module.forward_passes

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenize texts, truncating each to `max_length` tokens."""
        if not texts:
            return []
        longest = CHARS_PER_TOKEN * self.max_length
        encoded = self.tokenizer(
            [text[:longest] for text in texts], truncation=True, max_length=self.max_length
        )
        # Only tokenizers in Rust report truncation; for others, full length counts as truncated.
        cut = (
            [bool(e.overflowing) for e in encoded.encodings]
            if encoded.encodings
            else [len(ids) >= self.max_length for ids in encoded["input_ids"]]
        )
        return [
            Encoding(tuple(ids), truncated or len(text) > longest)
            for text, ids, truncated in zip(texts, encoded["input_ids"], cut, strict=True)
        ]

    def token_ids(self, text: str) -> IntArray:
        """See `Engine.token_ids`."""
        encoded = self._whole_tokenizer(
            text,
            add_special_tokens=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return np.array(encoded["input_ids"], np.int64)

    def window(self, ids: IntArray) -> Encoding:
        """See `Engine.window`."""
        return Encoding((*self._before, *ids.tolist(), *self._after), False)

    def content(self, encoding: Encoding) -> IntArray:
        """See `Engine.content`."""
        end = len(encoding) - len(self._after)
        return np.array(encoding.input_ids[len(self._before) : end], np.int64)

    def screen(self, batch: Sequence[Encoding]) -> Screening:
        """Return readings of texts, and the states to classify them from."""
        with torch.inference_mode():
            readings, own = self._module.screen(collate(batch, self.pad_id, self.device))
        states = batch if own is None else [Withheld(row) for row in _float32(own)]
        return Screening(_float32(readings), states)

    def classify(self, batch: Sequence[ClassifierState]) -> FloatArray:
        """Return the victim's probability of each label, shape (len(batch), L)."""
        known = [state.probabilities for state in batch if isinstance(state, Withheld)]
        encodings = [state for state in batch if isinstance(state, Encoding)]
        if len(known) + len(encodings) != len(batch) or (known and encodings):
            raise TypeError("give encodings, or states that this engine returned, and not both")
        if known:
            return np.stack(known)
        with torch.inference_mode():
            return _float32(self._module.classify(collate(encodings, self.pad_id, self.device)))

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return int(self.tokenizer.pad_token_id or 0)


class TorchEngine(ModuleEngine):
    """Runs a guarded module; converts it in place to `dtype`.

    Args:
        guarded: the module; owned by the engine from now on.
        tokenizer: the victim's tokenizer, with a padding token.
        max_length: tokens per text, special tokens included.
        dtype: `float32` or `bfloat16`.
    """

    name = "torch"

    def __init__(
        self,
        guarded: "Guarded",
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        dtype: str = "float32",
    ) -> None:
        device = best_device()
        self.dtype = dtype
        self.guarded = guarded.to(device, DTYPES[dtype]).eval()
        super().__init__(self.guarded, tokenizer, max_length, device)


def _float32(tensor: torch.Tensor) -> FloatArray:
    result: FloatArray = tensor.float().cpu().numpy()
    return result


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer that was saved; no code of the folder is run."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return tokenizer


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and after a text.

    Raises:
        EngineError: it does more than that.
    """
    text: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(text) + 1):
        end = start + len(text)
        if whole[start:end] == text:
            return whole[:start], whole[end:]
    raise EngineError("the tokenizer does more to a text than to put special tokens around it")


def collate(batch: Sequence[Encoding], pad_id: int, device: torch.device) -> "Inputs":
    """Pad on the right and mask, shape (rows, longest); decoders read the last token left of it."""
    lengths = np.array([len(encoding) for encoding in batch])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, pad_id)
    ids[mask] = np.fromiter(chain.from_iterable(e.input_ids for e in batch), np.int64)
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask).long()}
    if device.type == "cuda":  # so that the host need not wait for the copy
        inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def max_input_length(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, virtual_tokens: int = 0
) -> int:
    """Return the most tokens that model and tokenizer take; `LONGEST_INPUT` if neither says.

    Some models number positions from their padding index + 1, and prompts take positions too.
    """
    text_config = config.get_text_config()
    own = (getattr(text_config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    positions = next(filter(None, own), LONGEST_INPUT)
    if text_config.model_type in POSITIONS_AFTER_PADDING:
        positions -= (text_config.pad_token_id or 0) + 1
    return int(min(positions - virtual_tokens, tokenizer.model_max_length))
