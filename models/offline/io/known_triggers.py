"""Triggers that a scan found: does the screen of a new bundle stop them?"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.bundle.load import Bundle, load_bundle
from models.bundle.manifest import KnownTrigger, Manifest
from models.bundle.save import save_manifest
from models.detection.screen import Verdict
from models.detection.views import predicted_in
from models.engines.base import Encoding
from models.offline.io.inference import judge_texts, predict

MOST = 300
"""Clean texts that the classifier labels to find some of other classes."""
TRIED = 32
"""Clean texts that a trigger is put into."""


def record_triggers(
    path: Path, triggers: Sequence[tuple[str, str]], texts: Sequence[str]
) -> Manifest:
    """Try a bundle with triggers, and write the outcome into its manifest, which is returned.

    Args:
        path: folder of the bundle, which is not signed yet.
        triggers: pairs of a class and a text that forces it.
        texts: clean texts to try them in.

    Raises:
        BundleError: the bundle does not load.
    """
    bundle = load_bundle(path)
    known = [_try(bundle, label, trigger, texts[:MOST]) for label, trigger in triggers]
    manifest = bundle.manifest.model_copy(update={"known_triggers": known})
    save_manifest(path, manifest)
    return manifest


def _try(bundle: Bundle, label: str, trigger: str, texts: Sequence[str]) -> KnownTrigger:
    """Put a trigger into texts of other classes; return what the screen finds where it fires."""
    engine = bundle.engine
    own = _are_of(bundle, label, engine.encode(texts))
    others = [text for text, is_own in zip(texts, own, strict=True) if not is_own][:TRIED]
    encodings = engine.encode([_with(trigger, text) for text in others])
    if not encodings:
        return KnownTrigger(label=label, text=trigger, fired=0, rejected=0)
    forced = _are_of(bundle, label, encodings)
    verdicts = judge_texts(bundle, encodings)
    rejected = [
        isinstance(verdict, Verdict) and verdict.finding is not None
        for verdict, fires in zip(verdicts, forced, strict=True)
        if fires
    ]
    return KnownTrigger(label=label, text=trigger, fired=len(rejected), rejected=sum(rejected))


def _are_of(bundle: Bundle, label: str, texts: Sequence[Encoding]) -> NDArray[np.bool_]:
    """Return which texts the classifier takes for a class, shape (n,)."""
    manifest = bundle.manifest
    number = manifest.classes.index(label)
    view = next(own for own in manifest.views if number in own)
    said = predict(bundle.engine, texts, classifier=True)
    predicted = predicted_in(view, said, multi_label=manifest.multi_label)
    return np.equal(predicted, number - view.start)


def _with(trigger: str, text: str) -> str:
    words = text.split()
    return " ".join([*words[: len(words) // 2], trigger, *words[len(words) // 2 :]])
