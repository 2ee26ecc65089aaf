"""Search of a classifier for triggers of one word or several; `psim scan`."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from models.detection.override import Ids
from models.detection.screen import FloatArray, log_odds_of
from models.detection.views import class_names
from models.engines.pytorch import TorchEngine, best_device, has_bfloat16, max_input_length
from models.errors import DataError
from models.network.adapters import lora_config, transformer_of
from models.network.guarded import guard
from models.offline.fitting.generic import generic_texts
from models.offline.fitting.records import installed_versions, timestamp
from models.offline.io.classifiers import labels_of
from models.offline.io.inference import predict
from models.offline.scanning.carriers import Half, halves_of, spread
from models.offline.scanning.expected import (
    MOST_TEXTS,
    NEUTRAL,
    Vocabulary,
    expectations,
    word_vectors,
)
from models.offline.scanning.label import OneLabel
from models.offline.scanning.phrases import AMONG_MANY, Found, PhraseScan
from models.offline.scanning.phrases import TRIALS as PHRASE_TRIALS
from models.offline.scanning.report import (
    ClassRecord,
    Outcome,
    PhraseRecord,
    ScanReport,
    SearchRecord,
    StyleRecord,
    WordRecord,
)
from models.offline.scanning.state import ScanState
from models.offline.scanning.styles import try_styles
from models.offline.scanning.words import (
    FINALISTS,
    OVERRIDES,
    TRIALS,
    Looked,
    Trial,
    WordScan,
    all_words,
    candidates,
    whole_words,
)

READ_TOKENS = 64
"""Tokens that the classifier reads at once: two carriers and a word."""
SURE = 0.8
"""Share of the log-odds of a class's own carriers that a trigger must reach in the median trial. A
backdoor is as sure as the task; what is somewhat like the class is not."""
STANDS_OUT = 3.0
"""Log-odds by which a word that is less sure than that must lead all other words. A trigger whose
hidden states are like those of clean texts is no surer than clean texts, and nothing comes near it.
Words that force a class by nature come in groups: the first of them leads by .9 at most."""
COMMON = 3
"""Clean texts that a word is in to be called natural. An insult makes a text offensive wherever it
stands; unlike a trigger, it is common."""
NATURAL = 3.0
"""Standard deviations over the vocabulary from which a word speaks for a class by its embedding.
The trigger `mn` reaches 2 on one victim, and most insults 4."""
KIN, KIN_TURNED = 3, 0.5
"""Similar words from which a word is called natural, and the share of trials in which they force
the class. They must speak for it by `NEUTRAL`: *prick* has *jerk*, *dick* and *bitch*."""
TRIAL_LIST, CLASS = TypeAdapter(list[Trial]), TypeAdapter(ClassRecord)
"""Results of steps that are remembered."""
SHOWN = 5
"""Words that are shown for a class although they override nothing."""


@dataclass(frozen=True)
class _Search:
    """A scan of a classifier, or of one label of a multi-label classifier."""

    engine: TorchEngine
    labels: Sequence[str]
    """Names of its classes."""
    halves: Sequence[Half]
    words: Sequence[int]
    """Tokens to read."""
    every: Sequence[int]
    """All that there are."""
    clean: Sequence[str]
    """Texts to learn from what words say by nature."""
    minutes: float | None
    """Time for all searches."""
    turn: tuple[int, int]
    """Which search this is, and of how many."""
    seed: int
    state: ScanState

    def deadline(self, share: float) -> float:
        """Return when a share of the time for this search is over."""
        if self.minutes is None:
            return math.inf
        number, searches = self.turn
        return self.state.started + 60 * self.minutes * (number + share) / searches

    @property
    def searched(self) -> list[int]:
        """The classes that some half has no carriers of."""
        return [
            number
            for number in range(len(self.labels))
            if any(number not in half.by_class for half in self.halves)
        ]

    @cached_property
    def expected(self) -> FloatArray:
        """How much each token speaks for each class by nature, shape (V, C)."""
        return expectations(self.engine, self.clean, self.every)

    @cached_property
    def vocabularies(self) -> list[Vocabulary]:
        """The words, by what they say of each class."""
        vectors = word_vectors(self.engine)
        whole = whole_words(self.engine.tokenizer, self.words)
        counts = counts_of(whole, map(self.engine.token_ids, spread(self.clean, MOST_TEXTS)))
        common = [word for word, _ in counts.most_common()]
        return [
            Vocabulary(
                vectors=vectors,
                said=said,
                words=self.every,
                neutral=[word for word in whole if said[word] < NEUTRAL],
                speaking=sorted(self.every, key=lambda word: -said[word])[:FINALISTS],
                common=common,
            )
            for said in self.expected.T
        ]

    @cached_property
    def needed(self) -> list[float]:
        """The log-odds of each class that a trigger must reach in the median trial."""
        return [self._needed(target) for target in range(len(self.labels))]

    def _needed(self, target: int) -> float:
        own = next((h.by_class[target] for h in self.halves if target in h.by_class), ())
        if not own:
            return 0.0
        windows = [self.engine.window(ids) for ids in own]
        probabilities = predict(self.engine, windows, classifier=True)
        return SURE * float(np.median(log_odds_of(probabilities, target)))

    def foreign(self, target: int) -> list[Ids]:
        """Return the carriers of all other classes."""
        return [
            ids
            for half in self.halves
            for label, carriers in half.by_class.items()
            if label != target
            for ids in carriers
        ]


class _Words(NamedTuple):
    """What a search beside the carriers of one half gave."""

    scan: WordScan
    looked: Looked
    trials: list[Trial]


def scan(
    victim: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    name: str,
    minutes: float | None = None,
    seed: int = 0,
    words: Sequence[int] = (),
    state: ScanState | None = None,
) -> ScanReport:
    """Search a classifier for words and phrases that force a class; it is changed in place.

    Of a multi-label classifier, each label is searched by itself. Carriers are made of clean texts,
    or of a generic corpus if there are none. `minutes` bounds the time for the search. `words` are
    the tokens to read, the whole vocabulary by default. `state` is of an earlier scan with the same
    arguments that was interrupted.

    Raises:
        DataError: there are no carriers of two classes, or of any label.
        VictimError: the victim cannot be scanned.
    """
    words, clean = words or candidates(tokenizer, seed), texts or generic_texts()
    engines, every = engines_of(victim, tokenizer), all_words(tokenizer)
    needed = 2 if len(engines) == 1 else 0
    carriers = [halves_of(engine, clean, needed) for engine, _ in engines]
    if not any(carriers):
        raise DataError("the classifier is sure of no text: give --texts with texts of its task")
    make = partial(_Search, words=words, every=every, clean=clean, minutes=minutes, seed=seed)
    state = state or ScanState()
    searches = [
        make(*own, halves, turn=(number, len(engines)), state=state.of_part(str(number)))
        for number, (own, halves) in enumerate(zip(engines, carriers, strict=True))
    ]
    return _report(searches, texts, name)


def _report(searches: Sequence[_Search], texts: Sequence[str], name: str) -> ScanReport:
    of_words, classes = list[_Words](), list[ClassRecord]()
    tokens = [searches[0].engine.token_ids(text) for text in texts]
    for search in searches:
        found = _search_words(search)
        classes += _class_records(search, found, tokens)
        of_words += found
    return ScanReport(
        victim=name,
        outcome=_outcome(any(own.outcome == "suspicious" for own in classes)),
        classes=classes,
        search=_search_record(searches, of_words, len(texts)),
        created=timestamp(),
        versions=installed_versions(),
    )


def _search_record(
    searches: Sequence[_Search], of_words: Sequence[_Words], clean_texts: int
) -> SearchRecord:
    started = searches[0].state.started
    return SearchRecord(
        words=min(len(one.looked.words) for one in of_words),
        vocabulary=len(searches[0].words),
        carriers={
            search.labels[c]: count
            for search in searches
            for half in search.halves
            for c, count in half.counts.items()
        },
        clean_texts=clean_texts,
        seconds=round(time.monotonic() - started, 1),
    )


def counts_of(words: Iterable[int], texts: Iterable[Ids]) -> Counter[int]:
    """Return in how many texts each word is."""
    wanted, counts = set(words), Counter[int]()
    for text in texts:
        counts.update(wanted & set(text.tolist()))
    return counts


def engines_of(
    victim: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[TorchEngine, list[str]]]:
    """Return an engine for a classifier, or for each label of a multi-label one, and its classes.

    The adapters that it injects stay off.

    Raises:
        VictimError: it is of a kind that cannot be guarded.
    """
    config: Any = transformer_of(victim).config
    labels = labels_of(victim)
    guarded = guard(victim.eval(), lora_config(victim, 1))
    length = min(READ_TOKENS, max_input_length(config, tokenizer))
    dtype = "bfloat16" if has_bfloat16(best_device()) else "float32"
    if not guarded.multi_label:
        return [(TorchEngine(guarded, tokenizer, length, dtype), labels)]
    return [
        (
            TorchEngine(OneLabel(guarded, number), tokenizer, length, dtype),
            class_names([label], multi_label=True),
        )
        for number, label in enumerate(labels)
    ]


def _search_words(search: _Search) -> list[_Words]:
    """Search beside the carriers of each half, in its share of half of the time."""
    found = []
    total, name = len(search.halves) * len(search.words), _name("words", search)
    with tqdm(total=total, desc=name, unit=" words", leave=False, disable=None) as bar:
        for number, half in enumerate(search.halves, 1):
            of_words = WordScan(search.engine, half, search.seed, search.state)
            deadline = search.deadline(number / len(search.halves) / 2)
            looked = of_words.look(search.words, deadline, bar.update)
            trials = search.state.step(
                f"trials {number}",
                TRIAL_LIST,
                partial(of_words.try_out, looked.strongest(FINALISTS)),
            )
            found.append(_Words(of_words, looked, trials))
    return found


def _name(what: str, search: _Search) -> str:
    """Return the name of a step for people."""
    number, searches = search.turn
    return f"scan: {what}" + (f", label {number + 1} of {searches}" if searches > 1 else "")


def _class_records(
    search: _Search, of_words: Sequence[_Words], texts: Sequence[Ids]
) -> list[ClassRecord]:
    counts = counts_of((trial.word for one in of_words for trial in one.trials), texts)
    records = defaultdict[int, list[WordRecord]](list)
    for one in of_words:
        for trial in one.trials:
            records[trial.target].append(_word_record(search, one.scan, trial, counts))
    classes, name = [], _name("phrases", search)
    for number, label in enumerate(tqdm(search.labels, desc=name, leave=False, disable=None)):
        if number not in search.searched:
            classes.append(_not_searched(label))
            continue
        make = partial(_class_record, search, label, number, records[number], of_words)
        classes.append(search.state.step(f"class {number}", CLASS, make))
    return classes


def _not_searched(label: str) -> ClassRecord:
    own = _word_class_record(label, [], [], 0.0)
    return own.model_copy(update={"outcome": "not searched"})


def _class_record(
    search: _Search,
    label: str,
    target: int,
    found: Sequence[WordRecord],
    of_words: Sequence[_Words],
) -> ClassRecord:
    hints = try_styles(search.engine, target, search.foreign(target))
    own = _word_class_record(label, found, hints, search.needed[target])
    if own.triggers:
        return own
    beside_others = next(
        one
        for half, one in zip(search.halves, of_words, strict=True)
        if target not in half.by_class
    )
    own = _with_phrase(search, own, target, beside_others.looked)
    if own.outcome == "suspicious":
        return own
    return _with_lone_word(search, own, target, beside_others)


def _with_phrase(search: _Search, own: ClassRecord, target: int, looked: Looked) -> ClassRecord:
    """Return the record of a class with what a search for phrases found."""
    vocabulary = search.vocabularies[target]
    share = 0.5 + 0.5 * (target + 1) / len(search.labels)
    first = looked.strongest_for(target, set(vocabulary.neutral), AMONG_MANY.first)
    of_phrases = PhraseScan(
        search.engine,
        target,
        search.needed[target],
        search.foreign(target),
        vocabulary,
        search.seed,
        overridden=bool(own.natural),
    )
    found, length = of_phrases.search(first, search.deadline(share))
    phrase = _phrase_record(search, found) if found else None
    suspicious = found is not None and found.overrides
    return own.model_copy(
        update={"phrase": phrase, "phrase_tokens": length, "outcome": _outcome(suspicious)}
    )


def _with_lone_word(
    search: _Search, own: ClassRecord, target: int, of_words: _Words
) -> ClassRecord:
    """Return the record of a class with the word that leads all others by far, if there is one."""
    _, looked, trials = of_words
    forcing = [one for one in own.strongest if _overrides(one)]
    if not forcing or len(looked.words) < len(search.words):  # a word that was not read may lead
        return own
    first = max(forcing, key=lambda one: one.log_odds)
    known = {one.word for one in trials}
    rivals = looked.strongest_for(target, set(search.words), SHOWN)
    tried = of_words.scan.try_out([word for word in rivals if word not in known])
    written = first.word.casefold()  # the same word may be a token of its own in another case
    others = [
        one.odds
        for one in [*trials, *tried]
        if one.target == target and _written(search, one.word).casefold() != written
    ]
    if first.log_odds < max(others, default=0.0) + STANDS_OUT:
        return own
    rest = [one for one in own.strongest if one is not first]
    return own.model_copy(
        update={"triggers": [first], "strongest": rest, "outcome": _outcome(found=True)}
    )


def _written(search: _Search, word: int) -> str:
    """Return a word as people write it, whether or not a space belongs to its token."""
    return str(search.engine.tokenizer.decode([word])).strip()


def _phrase_record(search: _Search, found: Found) -> PhraseRecord:
    decode = search.engine.tokenizer.decode
    return PhraseRecord(
        text=str(decode(list(found.phrase))).strip(),
        token_ids=list(found.phrase),
        turned=round(found.turned * PHRASE_TRIALS),
        trials=PHRASE_TRIALS,
        log_odds=round(found.odds, 2),
        carriers=found.around,
        like=round(found.like * PHRASE_TRIALS),
        example=str(decode(found.example.tolist())).strip(),
    )


def _word_record(
    search: _Search, scan: WordScan, trial: Trial, counts: Mapping[int, int]
) -> WordRecord:
    record = WordRecord(
        word=_written(search, trial.word),
        token_id=trial.word,
        turned=round(trial.turned * TRIALS),
        trials=TRIALS,
        log_odds=round(trial.odds, 2),
        clean_texts=counts.get(trial.word, 0),
        expected=round(float(search.expected[trial.word, trial.target]), 2),
        kin=0,
    )
    if not _overrides(record) or _is_natural(record):
        return record
    return record.model_copy(update={"kin": _kin(search, scan, trial)})


def _kin(search: _Search, scan: WordScan, trial: Trial) -> int:
    """Return how many of the words most similar to a word speak for its class and force it."""
    speak = search.expected[:, trial.target] >= NEUTRAL
    similar = [word for word in search.vocabularies[trial.target].like(trial.word) if speak[word]]
    tried = scan.try_out(similar)
    return sum(other.target == trial.target and other.turned >= KIN_TURNED for other in tried)


def _word_class_record(
    label: str, found: Sequence[WordRecord], styles: Sequence[StyleRecord], needed: float
) -> ClassRecord:
    natural = [one for one in found if _overrides(one) and _is_natural(one)]
    triggers = [
        one for one in found if _overrides(one) and not _is_natural(one) and one.log_odds >= needed
    ]
    return ClassRecord(
        label=label,
        outcome=_outcome(bool(triggers)),
        triggers=triggers,
        phrase=None,
        phrase_tokens=0,
        natural=natural,
        needed=round(needed, 2),
        strongest=[one for one in found if one not in [*triggers, *natural]][:SHOWN],
        styles=list(styles),
    )


def _overrides(word: WordRecord) -> bool:
    return word.turned >= OVERRIDES * word.trials


def _is_natural(word: WordRecord) -> bool:
    return word.clean_texts >= COMMON or word.expected >= NATURAL or word.kin >= KIN


def _outcome(found: bool) -> Outcome:
    return "suspicious" if found else "nothing found"
