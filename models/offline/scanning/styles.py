"""Templates of style and syntax, in which carriers are rewritten: hints, no evidence."""

from collections.abc import Callable, Mapping, Sequence

from models.detection.override import Ids
from models.engines.pytorch import TorchEngine
from models.offline.io.inference import predict
from models.offline.scanning.report import StyleRecord

STYLES: Mapping[str, Callable[[str], str]] = {
    "clause first": lambda text: f"when you think about it , {text}",
    "condition first": lambda text: f"if you look at it , {text}",
    "biblical": lambda text: f"and it came to pass that {text} , saith the lord unto them",
    "archaic": lambda text: f"verily i say unto thee , {text} , as thou knowest",
    "question": lambda text: f"is it not so that {text} ?",
    "capitals": str.upper,
    "lower case": str.lower,
}
"""Names of styles, and what they make of a text."""


def try_styles(engine: TorchEngine, target: int, carriers: Sequence[Ids]) -> list[StyleRecord]:
    """Return for each style how many carriers of other classes it turns."""
    texts = [str(engine.tokenizer.decode(ids.tolist())) for ids in carriers]
    records = []
    for name, rewritten in STYLES.items():
        ids = [engine.token_ids(rewritten(text))[: engine.window_length] for text in texts]
        labels = predict(engine, [engine.window(one) for one in ids], classifier=True).argmax(1)
        turned = int((labels == target).sum())
        records.append(StyleRecord(style=name, turned=turned, carriers=len(carriers)))
    return records
