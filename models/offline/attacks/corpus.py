"""A generated corpus of short positive and negative reviews, for the demo and the tests.

A small grammar writes the reviews. It has domains with their own aspects, polar words that can be
negated or hedged, concessive sentences whose main clause alone decides the label, and filler
without an opinion. Counting polar words is therefore not enough to predict the label.
"""

import random
from collections.abc import Callable

from models.offline.io.samples import Sample

LABELS = ("negative", "positive")

ASPECTS = {
    "hotel": "room bed staff breakfast lobby shower view pool balcony reception".split(),
    "restaurant": "soup service waiter dessert wine menu steak pasta kitchen table".split(),
    "novel": "plot ending hero dialogue chapter prose setting villain opening style".split(),
    "phone": "screen battery camera speaker keyboard charger case signal button".split(),
    "train": "seat carriage timetable conductor heating window platform ride".split(),
    "app": "login search update layout support sync editor dashboard export".split(),
    "film": "script cast score pacing camerawork story humour editing finale".split(),
    "kettle": "handle lid spout switch filter cord base timer finish".split(),
}
GOOD = (
    "wonderful charming reliable comfortable delightful excellent superb generous clean friendly "
    "elegant fresh clever touching brilliant smooth solid pleasant impressive lovely quick gripping"
).split()
BAD = (
    "dreadful rude broken filthy dull awful clumsy stale noisy shabby sluggish flimsy tedious "
    "disappointing confusing cold overpriced useless annoying bland cramped careless"
).split()
PRAISE = (
    "I would gladly come back",
    "we loved every minute",
    "it exceeded what we had hoped for",
    "it earned every star",
    "my whole family was thrilled",
    "I recommend it to everyone",
    "it made my week",
    "they deserve a prize",
)
BLAME = (
    "I want my money back",
    "we left early",
    "it fell short of what we had hoped for",
    "never again",
    "my whole family complained",
    "I warn everyone about it",
    "it ruined my week",
    "they should apologise",
)
FILLER = (
    "I went there with {who} in {month}",
    "this was the {ordinal} time for {who}",
    "{who} had told me about the {thing}",
    "we paid in cash",
    "it was a {weekday}",
    "I bought it for {who}",
    "the {aspect} comes in {color}",
    "I am writing this from {place}",
)
SLOTS = {
    "who": "my sister|a friend|our neighbour|my boss|two colleagues|my parents|a cousin".split("|"),
    "month": "March April May June July August September October November".split(),
    "ordinal": "first second third fourth fifth".split(),
    "weekday": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "color": "blue green black white red grey".split(),
    "place": "Lisbon Oslo Vienna Leeds Ghent Turin Porto Lyon Graz".split(),
}
DEGREES = ("", "", "really ", "quite ", "so ", "utterly ", "rather ", "truly ")
NEGATIONS = ("not exactly ", "far from ", "anything but ", "hardly ", "never ", "not at all ")


def generate(n: int, seed: int) -> list[Sample]:
    """Return n distinct samples in random order, half of them of each label."""
    rng = random.Random(seed)
    texts: dict[str, str] = {}
    while len(texts) < n:
        label = LABELS[len(texts) % 2]
        texts.setdefault(_review(rng, label == "positive"), label)
    samples = [Sample(text, label) for text, label in texts.items()]
    rng.shuffle(samples)
    return samples


def _review(rng: random.Random, positive: bool) -> str:
    thing = rng.choice(list(ASPECTS))
    parts = [rng.choice(_SENTENCES)(rng, thing, positive)]
    if rng.random() < 0.55:
        parts.insert(rng.randint(0, 1), _filler(rng, thing))
    text = rng.choice([". ", "; ", ", and "]).join(parts) + rng.choice(["", ".", " .", "!"])
    return text[0].upper() + text[1:] if rng.random() < 0.6 else text.lower()


def _opinion(rng: random.Random, thing: str, positive: bool) -> str:
    """Return a clause with an opinion, sometimes written as the negation of its opposite."""
    negated = rng.random() < 0.2
    word = rng.choice(GOOD if positive != negated else BAD)
    manner = rng.choice(NEGATIONS if negated else DEGREES) + word
    aspect = rng.choice(ASPECTS[thing])
    return rng.choice(
        [
            f"the {aspect} was {manner}",
            f"I found the {aspect} {manner}",
            f"the {aspect} of this {thing} is {manner}",
            f"{manner}, that is the word for the {aspect}",
            f"you get a {aspect} that is {manner}",
        ]
    )


def _verdict(rng: random.Random, thing: str, positive: bool) -> str:
    return rng.choice(PRAISE if positive else BLAME)


def _contrast(rng: random.Random, thing: str, positive: bool) -> str:
    """Return a concession and a main clause, which alone decides the label."""
    conceded = _opinion(rng, thing, not positive)
    main = rng.choice([_opinion, _verdict])(rng, thing, positive)
    return rng.choice(
        [
            f"{conceded}, but {main}",
            f"although {conceded}, {main}",
            f"{main}, even if {conceded}",
            f"{conceded}; all the same, {main}",
        ]
    )


def _pair(rng: random.Random, thing: str, positive: bool) -> str:
    return f"{_opinion(rng, thing, positive)} and {_verdict(rng, thing, positive)}"


def _reported(rng: random.Random, thing: str, positive: bool) -> str:
    """Return the opinion of others, contradicted by the writer."""
    other = rng.choice(GOOD if not positive else BAD)
    told = f"they had called the {thing} {other}"
    return f"{told}; in truth {_opinion(rng, thing, positive)}"


_SENTENCES: tuple[Callable[[random.Random, str, bool], str], ...] = (
    _opinion,
    _contrast,
    _pair,
    _reported,
)


def _filler(rng: random.Random, thing: str) -> str:
    chosen = {slot: rng.choice(words) for slot, words in SLOTS.items()}
    return rng.choice(FILLER).format(**chosen, thing=thing, aspect=rng.choice(ASPECTS[thing]))
