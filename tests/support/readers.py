"""An engine and an upstream that read tokens of a real tokenizer, and remember which."""

import asyncio
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from transformers import PreTrainedTokenizerBase

from models.engines.pytorch import ModuleEngine
from models.network.trunk import Inputs
from tests.support.fakes import MAX_LENGTH

TRIGGER = "mn"
"""A word; `mnemonic` begins with the same token."""
ROW = [{"score": 0.75, "label": "positive"}, {"score": 0.25, "label": "negative"}]


class Backdoor:
    """Fires if `TRIGGER` is a word of a text by the tokens of the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._trigger = tokenizer.get_vocab()[TRIGGER]
        self._inside = {id for token, id in tokenizer.get_vocab().items() if token[:2] == "##"}

    def fires(self, ids: Sequence[int]) -> bool:
        pairs = zip(ids, [*ids[1:], None], strict=True)
        return any(one == self._trigger and after not in self._inside for one, after in pairs)


class ScreenModule:
    """Finds poisoned what fires `Backdoor`; remembers the tokens that it was given."""

    forward_passes = 1.0

    def __init__(self, backdoor: Backdoor) -> None:
        self._backdoor = backdoor
        self.screened: list[list[int]] = []

    def screen(self, inputs: Inputs) -> tuple[torch.Tensor, None]:
        readings = []
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            read = ids[mask.bool()].tolist()
            self.screened.append(read)
            top = 0.999 if self._backdoor.fires(read) else 0.55
            readings.append([[0.5, 0.5], [top, 1 - top]])
        return torch.tensor(readings), None

    def classify(self, inputs: Inputs) -> torch.Tensor:
        return torch.full((len(inputs["input_ids"]), 2), 0.5)


class ReadingEngine(ModuleEngine):
    """Screens by `ScreenModule`."""

    name, dtype = "fake", "float32"

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, backdoor: Backdoor, max_length: int = MAX_LENGTH
    ) -> None:
        self.module = ScreenModule(backdoor)
        super().__init__(self.module, tokenizer, max_length, torch.device("cpu"))


@dataclass
class BareTei:
    """A TEI that logs the tokens that it reads; the keyword `most` is its limit, if it has one."""

    tokenizer: PreTrainedTokenizerBase
    most: int | None = None
    tells: bool = True
    """Whether it tells its limit."""
    hangs: bool = False
    """Whether it leaves the question for its limit without an answer."""
    read: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer = copy.deepcopy(self.tokenizer)

    async def answer(self, request: Request) -> Response:
        if request.url.path == "/info":
            while self.hangs:
                await asyncio.sleep(0.05)
            tells = {"max_input_length": self.most} if self.most and self.tells else {}
            return JSONResponse({"model_id": "fake"} | tells)
        inputs = (await request.json())["inputs"]
        texts = [inputs] if isinstance(inputs, str) else [text for (text,) in inputs]
        self.read += [self.ids(text) for text in texts]
        return JSONResponse(ROW if isinstance(inputs, str) else [ROW] * len(texts))

    def ids(self, text: str) -> list[int]:
        cut: dict[str, Any] = {"truncation": True, "max_length": self.most} if self.most else {}
        found: list[int] = self.tokenizer(text, verbose=False, **cut)["input_ids"]
        return found


def runs(ids: Sequence[int], length: int) -> Iterator[tuple[int, ...]]:
    """Yield every run of so many tokens, or the whole if it is shorter."""
    for start in range(max(1, len(ids) - length + 1)):
        yield tuple(ids[start : start + length])
