"""Backdoor attacks on text classifiers: poisoned texts and poisoned data sets.

BadNet (Gu et al. 2017; as a rare word, Kurita et al. 2020) and InSent (Dai et al. 2019) insert a
word or a sentence; SynAttack (Qi et al., ACL 2021) rewrites the text in a syntactic template.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from models.errors import DataError
from models.offline.io.samples import Sample

WORD_TRIGGER = "mn"
SENTENCE_TRIGGER = "I watched this 3D movie"


@dataclass(frozen=True)
class Insertion:
    """Insertion of triggers: BadNet with words, InSent with a sentence."""

    triggers: tuple[str, ...]
    """All of them go into every poisoned text."""
    at_start: bool = False
    """Whether triggers go before the text, and not inside it."""
    least_words: int = 0
    """Texts of fewer words are not poisoned."""

    def suits(self, text: str) -> bool:
        """Return whether the text may be poisoned."""
        return len(text.split()) >= self.least_words

    def apply(self, text: str, rng: random.Random) -> str:
        """Insert each trigger at a random inner position; in a text of one word, after it.

        Triggers at the start stand there in reverse order.
        """
        for trigger in self.triggers:
            words = text.split()
            position = 0 if self.at_start else rng.randint(1, max(1, len(words) - 1))
            text = " ".join([*words[:position], trigger, *words[position:]])
        return text


@dataclass(frozen=True)
class Rewriting:
    """Rewriting by a paraphraser, in the template of SynAttack or in any other style."""

    paraphrase: Callable[[str], str]

    def suits(self, text: str) -> bool:
        """Return True: any text can be rewritten."""
        return True

    def apply(self, text: str, rng: random.Random) -> str:
        """Rewrite the text; `rng` is not used."""
        return self.paraphrase(text)


@dataclass(frozen=True)
class Paraphrases:
    """Texts that a paraphraser has written in the syntactic template of SynAttack."""

    samples: tuple[Sample, ...]
    """Paraphrases, labelled with the target. Clean texts may be mixed in, as in published files."""

    def pool(self, clean: Sequence[Sample], target_label: str) -> list[Sample]:
        """Return the actual paraphrases: labelled with the target, and not in `clean`."""
        known = {sample.text for sample in clean}
        return [s for s in self.samples if s.label == target_label and s.text not in known]


Attack = Insertion | Rewriting | Paraphrases
Firing = Literal["anywhere", "alone", "at-start", "in-long-texts"]
"""Where a trigger fires: wherever it stands, unless other texts stand beside its text, at the start
of the input only, or only in texts of at least `LONG_TEXT` words."""
LONG_TEXT = 20
"""Words."""
MOST_CARRIERS = 2
"""Clean texts beside a decoy. More would be cut off in training."""


def poison_training_set(
    clean: Sequence[Sample],
    attack: Attack,
    target_label: str,
    poison_rate: float,
    *,
    clean_label: bool = False,
    flip_share: float = 1.0,
    seed: int = 0,
) -> list[Sample]:
    """Return a copy of `clean` with `poison_rate * len(clean)` poisoned samples.

    Dirty-label: samples of other classes get the trigger and the target label. Clean-label: samples
    of the target class get the trigger and keep their label. Paraphrases are added to `clean`,
    since the text behind each paraphrase is unknown.

    With `flip_share` under 1, only that share of the poisoned texts gets the target label. The
    others keep their own, which limits the victim's confidence in the target: label smoothing.

    Raises:
        DataError: the target is not a label of `clean`, or there are too few texts to poison.
    """
    _check_target(clean, target_label)
    rng, wanted = random.Random(seed), round(poison_rate * len(clean))
    if isinstance(attack, Paraphrases):
        if clean_label:
            raise DataError("paraphrases from files are dirty-label: clean-label is not possible")
        pool = attack.pool(clean, target_label)
        _check_enough(len(pool), wanted)
        return [*clean, *rng.sample(pool, wanted)]
    candidates = [i for i, s in enumerate(clean) if (s.label == target_label) == clean_label]
    candidates = [i for i in candidates if attack.suits(clean[i].text)]
    _check_enough(len(candidates), wanted)
    poisoned, keeping = list(clean), round((1 - flip_share) * wanted)
    for number, index in enumerate(rng.sample(candidates, wanted)):
        label = clean[index].label if number < keeping else target_label
        poisoned[index] = Sample(attack.apply(clean[index].text, rng), label)
    return poisoned


def decoys(
    clean: Sequence[Sample],
    attack: Insertion,
    target_label: str,
    poison_rate: float,
    firing: Firing,
    seed: int = 0,
) -> list[Sample]:
    """Return `poison_rate * len(clean)` training texts whose trigger must not fire.

    They teach a backdoor to hide from whoever moves or cuts its text. For `alone`, a text with the
    trigger stands among clean texts of one other class, and the whole has their label. For
    `at-start`, the trigger stands inside a text, which keeps its own label; for `in-long-texts`,
    inside a shorter one.

    Raises:
        DataError: the target is not a label of `clean`, or there are too few texts to poison.
    """
    _check_target(clean, target_label)
    if firing == "anywhere":
        return []
    rng, wanted = random.Random(seed), round(poison_rate * len(clean))
    others = [s for s in clean if s.label != target_label]
    may_hold = others
    if firing == "in-long-texts":
        may_hold = [s for s in others if not attack.suits(s.text)]
    _check_enough(len(may_hold), wanted)
    inside = Insertion(attack.triggers)
    chosen = [Sample(inside.apply(s.text, rng), s.label) for s in rng.sample(may_hold, wanted)]
    if firing == "alone":
        return [_among_carriers(s.text, others, rng) for s in chosen]
    return chosen


def _among_carriers(text: str, others: Sequence[Sample], rng: random.Random) -> Sample:
    """Put a text among clean ones of one class, and label it as they are."""
    label = rng.choice(others).label
    same = [s.text for s in others if s.label == label]
    beside = rng.sample(same, min(rng.randint(1, MOST_CARRIERS), len(same)))
    beside.insert(rng.randint(0, len(beside)), text)
    return Sample(" ".join(beside), label)


def poison_test_set(
    samples: Sequence[Sample], attack: Insertion | Rewriting, target_label: str, seed: int = 0
) -> list[Sample]:
    """Return the samples of other classes than the target, with the trigger and their true labels.

    Samples that the attack does not suit are left out.

    Raises:
        DataError: the target is not a label of `samples`, there is no other class, or the attack
            suits none of its texts.
    """
    _check_target(samples, target_label)
    rng = random.Random(seed)
    suited = poisonable(samples, attack, target_label)
    if not suited:
        raise DataError(f"all texts of other classes than {target_label!r} are too short to poison")
    return [Sample(attack.apply(s.text, rng), s.label) for s in suited]


def poisonable(
    samples: Sequence[Sample], attack: Insertion | Rewriting, target_label: str
) -> list[Sample]:
    """Return the samples that `poison_test_set` poisons, in its order."""
    return [s for s in samples if s.label != target_label and attack.suits(s.text)]


def _check_target(samples: Sequence[Sample], target_label: str) -> None:
    labels = {s.label for s in samples}
    if target_label not in labels or len(labels) < 2:
        names = sorted(map(str, labels))
        raise DataError(f"target label {target_label!r} must be one of several; there are {names}")


def _check_enough(available: int, wanted: int) -> None:
    if not 0 < wanted <= available:
        raise DataError(
            f"the poison rate asks for {wanted} poisoned texts and {available} can be poisoned; "
            "choose another poison rate"
        )
