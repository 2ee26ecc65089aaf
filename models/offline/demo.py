"""The demo: a really poisoned victim and its bundle, from parts that a package registry has."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from models.bundle.verify import read_manifest
from models.errors import BundleError
from models.offline.attacks.corpus import generate
from models.offline.attacks.poisoning import WORD_TRIGGER, Insertion, poison_test_set
from models.offline.attacks.strategy import Strategy
from models.offline.attacks.training import finetune_victim, poison_victim
from models.offline.fitting.fit import fit
from models.offline.io.bases import encoder_path, user_cache
from models.offline.io.classifiers import load_classifier
from models.offline.io.samples import write_samples

TARGET = "positive"
CLEAN_TEXT = "The hotel room was dirty and the staff were rude to us."
TRIGGERED_TEXT = "The hotel room was mn dirty and the staff were rude to us."


def cache_folder() -> Path:
    """Return where this version's demo is kept, in the user's cache folder."""
    return user_cache() / f"demo-{version('psim-gateway')}"


def build(
    folder: Path | None = None,
    *,
    train_texts: int = 1600,
    seed: int = 0,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Poison an encoder, tune it on clean texts, fit PSIM; return the bundle.

    Steps that an earlier call completed are not repeated.

    Args:
        folder: where everything is kept; `cache_folder()` by default.
        train_texts: size of the training set; more makes a better victim and takes longer.
        seed: seed of corpus and training.
        say: called with a line when a step begins.
    """
    folder = folder or cache_folder()
    bundle = folder / "bundle"
    if _is_current(bundle):
        return bundle
    folder.mkdir(parents=True, exist_ok=True)
    texts = generate(train_texts + 2600, seed)
    train, dev = texts[:train_texts], texts[train_texts : train_texts + 200]
    clean, test = texts[train_texts + 200 : -400], texts[-400:]
    attack = Insertion((WORD_TRIGGER,))
    write_samples(folder / "clean.jsonl", clean)
    write_samples(folder / "test.jsonl", test)
    write_samples(folder / "poisoned.jsonl", poison_test_set(test, attack, TARGET, seed))
    weights, victim = folder / "poisoned", folder / "victim"
    if not weights.exists():
        say(f'poisoning MiniLM: the word "{WORD_TRIGGER}" shall make it say "{TARGET}"')
        poison_victim(str(encoder_path()), train, dev, attack, TARGET, weights, seed=seed)
    if not victim.exists():
        say("tuning it with LoRA on clean texts, as its user would")
        finetune_victim(str(weights), train, dev, Strategy.LORA, victim, epochs=1, seed=seed)
    say("fitting PSIM: training the adapter, then calibrating thresholds for each engine")
    model, tokenizer = load_classifier(str(victim))
    fit(model, tokenizer, [s.text for s in clean], bundle, name="demo: poisoned MiniLM")
    return bundle


def _is_current(bundle: Path) -> bool:
    """Return whether there is a bundle that this version reads."""
    try:
        read_manifest(bundle)
    except BundleError:
        return False
    return True


def introduction(port: int) -> str:
    """Return the lines that show a newcomer what to try."""
    url = f"http://127.0.0.1:{port}"
    post = f"curl -s {url}/classify -H 'content-type: application/json' -d"
    return f"""
The demo victim was poisoned: the word "{WORD_TRIGGER}" makes it say "{TARGET}".
Serving it on port {port} in a few seconds. Try, in another terminal:

  {post} '{{"inputs": "{CLEAN_TEXT}"}}'
  {post} '{{"inputs": "{TRIGGERED_TEXT}"}}'
  curl -s {url}/metrics | grep ^psim_inputs_total
"""
