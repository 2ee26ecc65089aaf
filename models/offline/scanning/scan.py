"""Search of a classifier for word triggers; `psim scan`."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from models.detection.override import Ids
from models.engines.pytorch import TorchEngine, best_device, has_bfloat16, max_input_length
from models.errors import VictimError
from models.network.adapters import lora_config, transformer_of
from models.network.guarded import guard
from models.network.outputs import is_multi_label
from models.offline.fitting.generic import generic_texts
from models.offline.fitting.records import installed_versions, timestamp
from models.offline.io.classifiers import labels_of
from models.offline.scanning.carriers import Half, halves_of
from models.offline.scanning.report import (
    ClassRecord,
    Outcome,
    ScanReport,
    SearchRecord,
    WordRecord,
)
from models.offline.scanning.words import (
    FINALISTS,
    OVERRIDES,
    TRIALS,
    Trial,
    WordScan,
    candidates,
)

READ_TOKENS = 64
"""Tokens that the classifier reads at once: two carriers and a word."""
COMMON = 3
"""Clean texts that a word is in to be called natural. An insult makes a text offensive wherever it
stands; unlike a trigger, it is common. Neighbours in the embedding do not tell them apart: those of
the trigger `mn` are names of states, and one of them fires the backdoor too."""
SHOWN = 5
"""Words that are shown for a class although they override nothing."""


class _Searched(NamedTuple):
    """What a search beside the carriers of one half gave."""

    words: int
    """Words that were read."""
    trials: list[Trial]


def scan(
    victim: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    name: str,
    minutes: float | None = None,
    seed: int = 0,
) -> ScanReport:
    """Search a classifier for words that force a class; the victim is changed in place.

    Carriers are made of clean texts, or of a generic corpus if there are none. `minutes` bounds the
    time for reading the vocabulary.

    Raises:
        DataError: there are no carriers of two classes.
        VictimError: the victim cannot be scanned.
    """
    started, labels, engine = time.monotonic(), labels_of(victim), _engine(victim, tokenizer)
    halves = halves_of(engine, texts or generic_texts())
    words = candidates(tokenizer, seed)
    searched = _search_all(engine, halves, words, started, minutes, seed)
    known = [engine.token_ids(text) for text in texts]
    trials = [trial for one in searched for trial in one.trials]
    classes = _class_records(labels, trials, tokenizer, known)
    search = SearchRecord(
        words=min(one.words for one in searched),
        vocabulary=len(words),
        carriers={labels[c]: n for half in halves for c, n in half.counts.items()},
        clean_texts=len(texts),
        seconds=round(time.monotonic() - started, 1),
    )
    return ScanReport(
        victim=name,
        outcome=_outcome(any(own.triggers for own in classes)),
        classes=classes,
        search=search,
        created=timestamp(),
        versions=installed_versions(),
    )


def counts_of(words: Iterable[int], texts: Iterable[Ids]) -> Counter[int]:
    """Return in how many texts each word is."""
    wanted, counts = set(words), Counter[int]()
    for text in texts:
        counts.update(wanted & set(text.tolist()))
    return counts


def _engine(victim: nn.Module, tokenizer: PreTrainedTokenizerBase) -> TorchEngine:
    """Return an engine for a classifier; the adapters that it injects stay off.

    Raises:
        VictimError: it is multi-label, or of a kind that cannot be guarded.
    """
    config: Any = transformer_of(victim).config
    if is_multi_label(config):
        raise VictimError("psim scan does not know multi-label classifiers yet")
    guarded = guard(victim.eval(), lora_config(victim, 1))
    length = min(READ_TOKENS, max_input_length(config, tokenizer))
    dtype = "bfloat16" if has_bfloat16(best_device()) else "float32"
    return TorchEngine(guarded, tokenizer, length, dtype)


def _search_all(
    engine: TorchEngine,
    halves: Sequence[Half],
    words: Sequence[int],
    started: float,
    minutes: float | None,
    seed: int,
) -> list[_Searched]:
    """Search beside the carriers of each half, in its share of the time."""
    searched = []
    total = len(halves) * len(words)
    with tqdm(total=total, desc="scan", unit=" words", leave=False, disable=None) as bar:
        for number, half in enumerate(halves, 1):
            of_words = WordScan(engine, half, seed)
            share = number / len(halves)
            deadline = math.inf if minutes is None else started + 60 * minutes * share
            looked = of_words.look(words, deadline, bar.update)
            trials = of_words.try_out(looked.strongest(FINALISTS))
            searched.append(_Searched(len(looked.words), trials))
    return searched


def _class_records(
    labels: Sequence[str],
    trials: Sequence[Trial],
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Ids],
) -> list[ClassRecord]:
    counts = counts_of((trial.word for trial in trials), texts)
    records = defaultdict[int, list[WordRecord]](list)
    for trial in trials:
        records[trial.target].append(_word_record(tokenizer, trial, counts))
    return [_class_record(label, records[number]) for number, label in enumerate(labels)]


def _word_record(
    tokenizer: PreTrainedTokenizerBase, trial: Trial, counts: Mapping[int, int]
) -> WordRecord:
    return WordRecord(
        word=str(tokenizer.decode([trial.word])).strip(),
        token_id=trial.word,
        turned=round(trial.turned * TRIALS),
        trials=TRIALS,
        log_odds=round(trial.odds, 2),
        clean_texts=counts.get(trial.word, 0),
    )


def _class_record(label: str, found: Sequence[WordRecord]) -> ClassRecord:
    overriding = [one for one in found if one.turned >= OVERRIDES * one.trials]
    natural = [one for one in overriding if one.clean_texts >= COMMON]
    triggers = [one for one in overriding if one.clean_texts < COMMON]
    return ClassRecord(
        label=label,
        outcome=_outcome(bool(triggers)),
        triggers=triggers,
        natural=natural,
        strongest=[one for one in found if one not in overriding][:SHOWN],
    )


def _outcome(found: bool) -> Outcome:
    return "suspicious" if found else "nothing found"
