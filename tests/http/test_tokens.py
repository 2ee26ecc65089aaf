"""What the upstream reads was screened, token by token, with a real tokenizer on both sides."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Route
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from models.detection.windows import windows
from models.engines.pytorch import special_tokens
from service.app import create_app
from service.pipeline.windows import OVERLAP
from service.settings import Settings
from tests.support.fakes import MAX_LENGTH, fake_bundle
from tests.support.readers import Backdoor, BareTei, ReadingEngine, runs
from tests.support.requests import lifespan, listening

ZERO_WIDTH, TAG, ACCENT, NUL = "\u200b", "\U000e0041", "\u0301", "\0"
DROPPED = [ZERO_WIDTH, TAG, ACCENT, NUL]
"""Characters that the tokenizer drops."""


@asynccontextmanager
async def gateway(
    upstream: BareTei, engine: ReadingEngine, **changes: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of a gateway in front of a bare upstream."""
    routes = [Route("/{path:path}", upstream.answer, methods=["GET", "POST"])]
    async with listening(Starlette(routes=routes)) as url:
        values = {"bundle": Path("unused"), "upstream": url, "upstream_protocol": "tei"} | changes
        app = create_app(Settings.model_validate(values), fake_bundle(engine))
        async with lifespan(app):
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                upstream.read.clear()
                yield client


@pytest.mark.parametrize("dropped", DROPPED)
@pytest.mark.parametrize("path", ["/predict", "/envoy/predict"])
async def test_dropped_characters_do_not_hide_the_halves_of_a_trigger_from_each_other(
    tokenizer: PreTrainedTokenizerBase, dropped: str, path: str
) -> None:
    backdoor = Backdoor(tokenizer)
    engine, upstream = ReadingEngine(tokenizer, backdoor), BareTei(tokenizer)
    text = " " * 700 + "a quiet film " * 9 + "m" + dropped * 1500 + "n"
    assert backdoor.fires(upstream.ids(text))
    async with gateway(upstream, engine) as client:
        answer = await client.post(path, json={"inputs": [[text]]})
        assert answer.status_code == 403, answer.text
        assert not upstream.read


async def test_a_text_of_few_tokens_is_not_truncated_however_many_characters_it_has(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    engine, upstream = ReadingEngine(tokenizer, Backdoor(tokenizer)), BareTei(tokenizer)
    async with gateway(upstream, engine, max_windows=2) as client:
        body = {"inputs": "a quiet " + ZERO_WIDTH * 50_000 + " " * 40_000 + "film"}
        (result,) = (await client.post("/screen", json=body)).json()["results"]
        assert not result["truncated"]
        assert (await client.post("/predict", json=body)).status_code == 200


@pytest.mark.parametrize(
    ("most", "told", "setting"),
    [(24, True, None), (24, False, 24), (70, True, None), (70, True, 70), (32, True, None)],
)
async def test_a_trigger_that_the_upstream_s_own_cut_makes_is_found(
    tokenizer: PreTrainedTokenizerBase, most: int, told: bool, setting: int | None
) -> None:
    """A limit below, above and equal to that of the bundle."""
    backdoor = Backdoor(tokenizer)
    engine, upstream = ReadingEngine(tokenizer, backdoor), BareTei(tokenizer, most, told)
    text = "a " * (most - 3) + "mnemonic film"
    assert backdoor.fires(upstream.ids(text))
    changes = {} if setting is None else {"upstream_max_length": setting}
    async with gateway(upstream, engine, **changes) as client:
        answer = await client.post("/predict", json={"inputs": text, "truncate": True})
        assert answer.status_code == 403
        longer = await client.post("/predict", json={"inputs": "a " + text})
        assert longer.status_code == 200
        for ids in upstream.read:
            assert not backdoor.fires(ids)


async def test_the_limit_also_holds_for_a_classifier_behind_a_proxy(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    engine = ReadingEngine(tokenizer, Backdoor(tokenizer))
    values = {"bundle": Path("unused"), "upstream_max_length": 70}
    app = create_app(Settings.model_validate(values), fake_bundle(engine))
    async with lifespan(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for before, status in ((67, 403), (66, 200)):
                body = {"inputs": "a " * before + "mnemonic film"}
                answer = await client.post("/envoy/predict", json=body)
                assert answer.status_code == status


async def test_an_upstream_whose_limit_cannot_be_asked_yet_is_not_ready(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Texts would be screened as if it cut none."""
    engine, upstream = ReadingEngine(tokenizer, Backdoor(tokenizer)), BareTei(tokenizer, 24)
    upstream.hangs = True
    async with gateway(upstream, engine, upstream_timeout_s=0.3, upstream_retry_s=0.1) as client:
        assert (await client.get("/ready")).status_code == 503
        upstream.hangs = False
        for _ in range(100):
            await asyncio.sleep(0.1)
            if (await client.get("/ready")).status_code == 200:
                break
        answer = await client.post("/predict", json={"inputs": "a " * 21 + "mnemonic film"})
        assert answer.status_code == 403


PIECES = st.sampled_from(
    ["mn", "m", "n", "mnemonic", "film ", "quiet ", " ", "  ", "é", "漢", "[SEP]", "-", "😀", "M"]
)
PADDING = st.tuples(st.sampled_from([*DROPPED, " "]), st.integers(0, 600)).map(
    lambda drawn: drawn[0] * drawn[1]
)
TEXTS = st.lists(
    st.one_of(PIECES, st.tuples(PIECES, st.integers(1, 60)).map(lambda d: d[0] * d[1]), PADDING),
    min_size=1,
    max_size=12,
).map("".join)


@pytest.mark.parametrize("most", [None, 20, 32, 50])
def test_every_run_of_a_quarter_window_that_a_bare_upstream_reads_was_screened(
    tokenizer: PreTrainedTokenizerBase, most: int | None
) -> None:
    """Special tokens included, so both ends too. And it never reads a trigger, wherever it cuts."""
    backdoor = Backdoor(tokenizer)
    engine, upstream = ReadingEngine(tokenizer, backdoor), BareTei(tokenizer, most)
    screened, length = engine.module.screened, MAX_LENGTH // 4

    async def check(client: httpx.AsyncClient, text: str) -> None:
        screened.clear()
        upstream.read.clear()
        answer = await client.post("/predict", json={"inputs": text})
        assert answer.status_code == (200 if upstream.read else 403)
        for ids in upstream.read:
            assert not backdoor.fires(ids)
            assert {*runs(ids, length)} <= {
                run for window in screened for run in runs(window, length)
            }

    with asyncio.Runner() as runner:
        context = gateway(upstream, engine)
        client = runner.run(context.__aenter__())

        @settings(max_examples=150, deadline=None)
        @given(text=TEXTS.filter(str.strip))
        def check_all(text: str) -> None:
            runner.run(check(client, text))

        try:
            check_all()
        finally:
            runner.run(context.__aexit__(None, None, None))


def bpe(special: bool) -> PreTrainedTokenizerBase:
    """Return a tokenizer of bytes, as decoders have: with or without a special token before."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["a quiet film, a mnemonic"], trainer)
    if special:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    make: Any = PreTrainedTokenizerFast
    found: PreTrainedTokenizerBase = make(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>"
    )
    return found


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "bytes, bare", "python"])
def test_windows_hold_the_tokens_of_the_whole_text_in_order(
    kind: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    kinds = {"bytes": bpe(True), "bytes, bare": bpe(False), "python": ByT5Tokenizer()}
    used = kinds.get(kind, tokenizer)
    engine = ReadingEngine(used, Backdoor(tokenizer))
    before, after = special_tokens(used)

    @settings(max_examples=100, deadline=None)
    @given(text=st.one_of(TEXTS, st.text(max_size=300)))
    def check(text: str) -> None:
        whole = [before + used(text, add_special_tokens=False)["input_ids"] + after]
        assert [used(text)["input_ids"]] == whole
        ids = engine.token_ids(text)
        spans = windows(len(ids), engine.window_length, MAX_LENGTH // OVERLAP)
        merged: list[int] = []
        for span in spans:
            window = [*engine.window(ids[span]).input_ids]
            assert len(window) <= MAX_LENGTH
            assert window[: len(before)] == before
            assert window[len(window) - len(after) :] == after
            text_tokens = window[len(before) : len(window) - len(after)]
            assert text_tokens[: len(merged) - span.start] == merged[span.start :]
            merged = merged[: span.start] + text_tokens
        assert [before + merged + after] == whole
        (first,) = engine.encode([text[:100]])
        if not first.truncated:
            assert [*first.input_ids] == used(text[:100])["input_ids"]

    check()


@given(count=st.integers(0, 3000), size=st.integers(1, 600), overlap=st.integers(0, 200))
def test_every_run_of_an_overlap_lies_whole_in_a_window(
    count: int, size: int, overlap: int
) -> None:
    found = windows(count, size, overlap)
    overlap = min(overlap, size - 1)
    assert (found[0].start, found[-1].stop) == (0, max(size, count))
    assert all(window.stop - window.start == size for window in found)
    for one, following in pairwise(found):
        assert one.start < following.start <= one.stop - overlap
    assert len(found) <= max(1, -(-(count - overlap) // (size - overlap)))


async def test_the_longest_trigger_is_whole_in_a_window_wherever_it_stands(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """It has a quarter of the tokens that the model reads, as docs/upstreams.md says."""
    engine, upstream = ReadingEngine(tokenizer, Backdoor(tokenizer)), BareTei(tokenizer)
    phrase = "quiet film good bad slow great room and "
    trigger = tuple(upstream.ids(phrase)[1:-1])
    assert len(trigger) == MAX_LENGTH // 4
    async with gateway(upstream, engine) as client:
        for before in range(100):
            engine.module.screened.clear()
            text = "a " * before + phrase + "a " * (100 - before)
            assert (await client.post("/screen", json={"inputs": text})).status_code == 200
            windows = engine.module.screened
            assert any(trigger in runs(window, len(trigger)) for window in windows), before
