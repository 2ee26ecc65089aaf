"""Bundles that somebody has forged with all their hashes: refused before a library reads them."""

import json
import os
import pickle
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from models.bundle.digests import hash_files
from models.bundle.files import MAX_FILE_BYTES
from models.bundle.layout import ADAPTER_WEIGHTS, MANIFEST, READINGS
from models.bundle.load import load_bundle
from models.errors import BundleError
from models.network.adapters import transformer_of
from tests.support.bundles import fit_tiny, forge, victim_of

CONFIG, WEIGHTS = "victim/config.json", "victim/model.safetensors"
PROMPT, TOKENIZER = "prompt/adapter_config.json", "tokenizer/tokenizer_config.json"
MORE_MEMORY = 512 * 2**20
LOADERS = (
    "bundle.weights.AutoModelForSequenceClassification",
    "engines.pytorch.AutoTokenizer",
    "bundle.weights.PeftModel",
)


@pytest.fixture(scope="module")
def original(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle with every kind of file, of a model that had code of its own."""
    victim = victim_of("bert prompt-tuning")
    config: Any = transformer_of(victim).config
    config.auto_map = {"AutoConfig": "evil.Config"}
    return fit_tiny(victim, tokenizer, tmp_path_factory.mktemp("untrusted") / "bundle")


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Iterator[Path]:
    """Yield a copy that a test may damage."""
    yield Path(shutil.copytree(original, tmp_path / "bundle"))
    # Python cannot remove folders that are nested too deeply, nor can pytest.
    subprocess.run(["rm", "-rf", tmp_path / "bundle"], check=True)


@contextmanager
def little_memory() -> Iterator[None]:
    """Within it, this process gets hardly more memory, nor address space, than it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return what says that the bundle is refused, with a reason, and before anything is loaded."""
    loaded: list[str] = []
    for loader in LOADERS:
        monkeypatch.setattr(
            f"models.{loader}.from_pretrained",
            lambda *a, name=loader, **k: loaded.append(name),
        )

    def check(reason: str) -> None:
        with little_memory(), pytest.raises(BundleError, match=reason) as refusal:
            load_bundle(bundle, "float32")
        assert not loaded
        assert str(refusal.value).isprintable(), "what is in a bundle could speak to a terminal"

    return check


def rehash(bundle: Path) -> None:
    """Forge a manifest that lists whatever is there."""
    files = hash_files(bundle)
    del files[MANIFEST]
    forge(bundle, files=files)


def change(file: Path, changes: Mapping[str, object]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_bundle_has_no_settings_that_name_code(original: Path) -> None:
    assert "auto_map" not in (original / CONFIG).read_text()
    load_bundle(original, "float32")


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        # Sizes of which a library would make tensors, layers or lists.
        (CONFIG, {"vocab_size": 10**12}, r"the model has \d+ numbers"),
        (CONFIG, {"max_position_embeddings": 10**9}, r"the model has \d+ numbers"),
        (CONFIG, {"hidden_size": 2**14}, r"the model has \d+ numbers"),
        (CONFIG, {"hidden_size": 10**12}, "overflowed"),
        (CONFIG, {"num_hidden_layers": 10**9}, "num_hidden_layers' is 1000000000"),
        (CONFIG, {"num_hidden_layers": 80}, "more layers than there are weights"),
        (CONFIG, {"num_labels": 10**9}, "num_labels' is 1000000000"),
        (PROMPT, {"num_virtual_tokens": 10**9}, r"the model has \d+ numbers"),
        (PROMPT, {"token_dim": 10**9}, r"the model has \d+ numbers"),
        # Code: of the bundle, of the Hub, of whatever module is installed.
        (CONFIG, {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map' asks for code"),
        (CONFIG, {"text_config": {"auto_map": {"AutoModel": "x.Y"}}}, "auto_map' asks for code"),
        (CONFIG, {"attn_implementation": "evil/kernel"}, "attn_implementation' asks for code"),
        (CONFIG, {"quantization_config": {"quant_method": "fp8"}}, "asks for code"),
        (TOKENIZER, {"auto_map": {"AutoTokenizer": ["evil.T", None]}}, "auto_map' asks for code"),
        (PROMPT, {"peft_type": "LORA", "megatron_core": "antigravity"}, "type of a prompt"),
        (PROMPT, {"peft_type": "MULTITASK_PROMPT_TUNING"}, "type of a prompt"),
        # Files elsewhere.
        (CONFIG, {"transformers_weights": "../../w.safetensors"}, "leads to another file"),
        (TOKENIZER, {"tokenizer_file": "/elsewhere/tokenizer.json"}, "leads to another file"),
        (TOKENIZER, {"fast_tokenizer_files": ["../tokenizer.4.0.json"]}, "leads to another file"),
        (TOKENIZER, {"\x1b[2J_file": "x"}, r"\\x1b\[2J_file' leads to another file"),
        (CONFIG, {"model_type": "\ud800"}, "does not load"),
        (MANIFEST, {"psim": {"rank": 10**9}}, r"the model has \d+ numbers"),
        (MANIFEST, {"psim": {"layers": 10**9}}, "the victim has 3"),
    ],
)
def test_settings_that_ask_for_too_much_are_refused(
    bundle: Path,
    refused: Callable[[str], None],
    file: str,
    changes: dict[str, Any],
    reason: str,
) -> None:
    if file == MANIFEST:
        psim = json.loads((bundle / MANIFEST).read_text())["psim"]
        changes = {"psim": psim | changes["psim"]}
    change(bundle / file, changes)
    rehash(bundle)
    refused(reason)


def _pipe(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    os.mkfifo(bundle / MANIFEST)


def _endless(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).symlink_to("/dev/zero")


def _link(bundle: Path) -> None:
    weights = (bundle / WEIGHTS).rename(bundle.parent / "weights")
    (bundle / WEIGHTS).symlink_to(weights)


def _sparse(name: str, size: int) -> Callable[[Path], None]:
    return lambda bundle: os.truncate(bundle / name, size)


def _written(name: str, content: bytes) -> Callable[[Path], None]:
    def write(bundle: Path) -> None:
        (bundle / name).write_bytes(content)
        rehash(bundle)

    return write


def _index_to_elsewhere(bundle: Path) -> None:
    shutil.move(bundle / WEIGHTS, bundle.parent / "w.safetensors")
    index = {"metadata": {}, "weight_map": {"classifier.bias": "../../w.safetensors"}}
    (bundle / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    rehash(bundle)


def _half_a_prompt(bundle: Path) -> None:
    (bundle / PROMPT).unlink()
    rehash(bundle)


def _no_tokenizer(bundle: Path) -> None:
    shutil.rmtree(bundle / "tokenizer")
    rehash(bundle)


def _odd_name(bundle: Path) -> None:
    (bundle / "victim/\udcff\x1b[2J.json").write_bytes(b"{}")


def _deep_folders(bundle: Path) -> None:
    folder = os.open(bundle, os.O_RDONLY)
    for _ in range(2000):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)


def _other_readings(bundle: Path) -> None:
    header = json.dumps(
        {"torch/float32": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    )
    _written(READINGS, len(header).to_bytes(8, "little") + header.encode() + bytes(4))(bundle)


PETABYTES = json.dumps({"w": {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4 * 10**15]}})
PROMISED = len(PETABYTES).to_bytes(8, "little") + PETABYTES.encode()
NESTED = b"[" * 10**6 + b"]" * 10**6


@pytest.mark.parametrize(
    ("forged", "reason"),
    [
        (_pipe, "not a regular file"),
        (_endless, "not a regular file"),
        (_link, "symbolic links"),
        (_sparse(MANIFEST, 2**40), "more than"),
        (_sparse(TOKENIZER, MAX_FILE_BYTES + 1), f"{TOKENIZER} has {MAX_FILE_BYTES + 1} bytes"),
        (_sparse(WEIGHTS, psutil.virtual_memory().total), "of free memory"),
        (_written(MANIFEST + "x", b""), "does not belong"),
        (_written("tokenizer/code.py", b"print()"), "does not belong"),
        (_odd_name, r"\\udcff\\x1b\[2J.json' does not belong"),
        (_written(WEIGHTS, pickle.dumps({"w": 1})), f"{WEIGHTS} is not a file of safetensors"),
        (_written(WEIGHTS, PROMISED), f"{WEIGHTS} is not a file of safetensors"),
        (_written(WEIGHTS, (10**15).to_bytes(8, "little")), "not a file of safetensors"),
        (_written(f"psim/{ADAPTER_WEIGHTS}", PROMISED), "not a file of safetensors"),
        (_written(READINGS, PROMISED), "not a file of safetensors"),
        (_other_readings, "does not load"),
        (_written(CONFIG, NESTED), "nested too deeply"),
        (_written(CONFIG, b"[]"), "not an object"),
        (_index_to_elsewhere, "names files that the bundle does not have"),
        (_half_a_prompt, "prompt/adapter_config.json' is missing"),
        (_no_tokenizer, "tokenizer/tokenizer_config.json' is missing"),
        (_deep_folders, "nested too deeply"),
    ],
)
def test_files_that_are_not_what_they_seem_are_refused(
    bundle: Path,
    refused: Callable[[str], None],
    forged: Callable[[Path], None],
    reason: str,
) -> None:
    forged(bundle)
    refused(reason)


def test_texts_are_not_read_further_than_the_model_can(bundle: Path) -> None:
    forge(bundle, max_length=10**12)
    with pytest.raises(BundleError, match="the model reads 507 tokens"):  # five are its prompts
        load_bundle(bundle)


def test_any_flipped_byte_of_a_signed_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    private, key = Ed25519PrivateKey.generate(), tmp_path / "public.pem"
    public = private.public_key()
    key.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (bundle / "manifest.sig").write_bytes(private.sign((bundle / MANIFEST).read_bytes()))
    load_bundle(bundle, key=key)
    files = {name: (bundle / name).read_bytes() for name in hash_files(bundle)}

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(name=st.sampled_from(sorted(files)), where=st.floats(0, 1, exclude_max=True), bit=...)
    def flip(name: str, where: float, bit: int) -> None:
        flipped = bytearray(files[name])
        flipped[int(where * len(flipped))] ^= 1 << bit % 8
        (bundle / name).write_bytes(flipped)
        try:
            with pytest.raises(BundleError):
                load_bundle(bundle, key=key)
        finally:
            (bundle / name).write_bytes(files[name])

    flip()
