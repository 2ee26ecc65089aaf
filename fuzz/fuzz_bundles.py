"""Fuzz the loader of bundles, guided by coverage: one file of a small bundle has other content.

The bundle is refused, as what it is, or loaded. Nothing but its own files is opened, no program is
started, nobody is asked over the network, and memory stays below libFuzzer's limit.

    pip install atheris==3.0.0
    python fuzz/fuzz_bundles.py CORPUS -max_total_time=600 -rss_limit_mb=3000 -timeout=60

CORPUS is a folder, in which contents that find something new are kept; an empty one gets those of
the bundle's own files.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
from mutation import mutate

with atheris.instrument_imports(include=["models"]):
    from models.bundle import MANIFEST, file_digest, load_bundle
    from models.errors import PsimError

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import transformers
from families import tiny_victim
from test_bundle import fit_tiny

from models.offline.demo import encoder_path

SEED_BYTES = 60_000
FORBIDDEN = {
    *("os.exec", "os.posix_spawn", "os.system", "subprocess.Popen", "pickle.find_class"),
    *("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"),
}
PACKAGES = Path(transformers.__file__).parents[1]
OUR_OWN = ("/proc/", "/sys/", "/dev/", sys.base_prefix, sys.prefix, str(PACKAGES))
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
    """Take the first byte for a file, and the others for its content, or its beginning."""
    if len(data) < 2:
        return
    name, content = NAMES[data[0] % len(NAMES)], data[1:]
    if name.endswith(".safetensors"):
        content += GOOD[name][len(content) :]
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


def seeds() -> None:
    """Put what the files hold into an empty corpus; of the long ones, the beginning."""
    folder = next((Path(a) for a in sys.argv[1:] if not a.startswith("-")), None)
    if folder and not any(folder.iterdir()):
        for number, name in enumerate(NAMES):
            good = GOOD[name]
            if name == "tokenizer/tokenizer.json":
                short = json.loads(good)
                short["model"]["vocab"] = dict([*short["model"]["vocab"].items()][:500])
                good = json.dumps(short).encode()
            (folder / f"seed-{number}").write_bytes(bytes([number]) + good[:SEED_BYTES])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity(50)
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_path())
        BUNDLE = fit_tiny(tiny_victim("bert"), tokenizer, Path(temporary) / "bundle")
        NAMES = sorted(str(f.relative_to(BUNDLE)) for f in BUNDLE.rglob("*") if f.is_file())
        GOOD = {name: (BUNDLE / name).read_bytes() for name in NAMES}
        seeds()
        sys.addaudithook(watch)
        atheris.Setup([*sys.argv, f"-max_len={SEED_BYTES}"], fuzz, custom_mutator=mutate)
        atheris.Fuzz()
