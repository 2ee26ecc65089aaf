"""Fuzz the loader of bundles, guided by coverage: one file of a small bundle has other content.

The bundle is refused, as what it is, or loaded. Nothing but its own files is opened, no program is
started, nobody is asked over the network, and memory stays below libFuzzer's limit.

    pip install atheris==3.0.0
    python fuzz/fuzz_bundles.py CORPUS -max_total_time=600 -rss_limit_mb=3000 -timeout=60

CORPUS is a folder, in which contents that find something new are kept; it may be empty.
"""

import json
import random
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
from mutation import mutate

with atheris.instrument_imports(include=["models"]):
    from models.bundle.digests import file_digest
    from models.bundle.layout import MANIFEST
    from models.bundle.load import load_bundle
    from models.errors import PsimError

sys.path.append(str(Path(__file__).parent.parent))

import transformers

from models.offline.io.bases import encoder_path
from tests.support.bundles import fit_tiny
from tests.support.families import tiny_victim

MOST_WORDS = 500
"""Of the vocabulary, where others come from it: changing all of it would take most of the time."""
FORBIDDEN = {
    *("os.exec", "os.posix_spawn", "os.system", "subprocess.Popen", "pickle.find_class"),
    *("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"),
}
PACKAGES = Path(transformers.__file__).parents[1]
COPIES = str(Path(tempfile.gettempdir()) / "psim-bundle-")
OUR_OWN = ("/proc/", "/sys/", "/dev/", COPIES, sys.base_prefix, sys.prefix, str(PACKAGES))
broken: list[str] = []


def watch(event: str, arguments: tuple[object, ...]) -> None:
    """Note what loading a bundle must not do; raised here, it could be caught there."""
    if event in FORBIDDEN:
        broken.append(event)
    elif event == "open" and isinstance(arguments[0], str | Path):
        file = str(arguments[0])
        if file.startswith("/") and not file.startswith((str(BUNDLE), *OUR_OWN)):
            broken.append(f"opened {file}")


def fuzz(data: bytes) -> None:
    """Take the first byte for a file, and the others for its content; of weights, the header."""
    if len(data) < 2:
        return
    name, content = NAMES[data[0] % len(NAMES)], data[1:]
    if name.endswith(".safetensors"):
        content += GOOD[name][len(header(GOOD[name])) :]
    (BUNDLE / name).write_bytes(content)
    forged = name != MANIFEST and data[0] < 128
    if forged:
        manifest = json.loads(GOOD[MANIFEST])
        manifest["files"][name] = file_digest(BUNDLE / name)
        (BUNDLE / MANIFEST).write_text(json.dumps(manifest))
    broken.clear()
    try:
        load_bundle(BUNDLE, "float32", "torch")
    except PsimError:
        pass
    else:
        assert forged or name == MANIFEST or content == GOOD[name], "altered, and not noticed"
    finally:
        (BUNDLE / name).write_bytes(GOOD[name])
        (BUNDLE / MANIFEST).write_bytes(GOOD[MANIFEST])
    assert not broken, broken


def header(weights: bytes) -> bytes:
    return weights[: 8 + int.from_bytes(weights[:8], "little")]


def start(name: str) -> bytes:
    """Return what to change in a file of the bundle."""
    if name.endswith(".safetensors"):
        return header(GOOD[name])
    if name == "tokenizer/tokenizer.json":
        short = json.loads(GOOD[name])
        short["model"]["vocab"] = dict([*short["model"]["vocab"].items()][:MOST_WORDS])
        return json.dumps(short).encode()
    return GOOD[name]


def changed(data: bytes, max_size: int, seed: int) -> bytes:
    """Change what libFuzzer has found, or a file of the bundle anew."""
    rng = random.Random(seed)
    if not data or rng.random() < 0.5:
        number = rng.randrange(len(NAMES))
        data = bytes([number]) + STARTS[number]
    if NAMES[data[0] % len(NAMES)].endswith(".safetensors") and rng.random() < 0.7:
        described = mutate(data[:1] + data[9:], max_size - 8, seed)
        length = (len(described) - 1).to_bytes(8, "little")
        return described[:1] + length + described[1:]
    return mutate(data, max_size, seed)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity(50)
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_path())
        BUNDLE = fit_tiny(tiny_victim("bert"), tokenizer, Path(temporary) / "bundle")
        NAMES = sorted(str(f.relative_to(BUNDLE)) for f in BUNDLE.rglob("*") if f.is_file())
        GOOD = {name: (BUNDLE / name).read_bytes() for name in NAMES}
        STARTS = [start(name) for name in NAMES]
        longest = f"-max_len={2 * max(map(len, STARTS))}"
        sys.addaudithook(watch)
        atheris.Setup([*sys.argv, longest], fuzz, custom_mutator=changed)
        atheris.Fuzz()
