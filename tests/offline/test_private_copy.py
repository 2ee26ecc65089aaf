"""What was checked is what is loaded, whatever becomes of the folder meanwhile and afterwards."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from models.bundle import verify
from models.bundle.digests import hash_files
from models.bundle.files import private_copy
from models.bundle.layout import ACTIVATIONS, MANIFEST, PSIM, READINGS, SIGNATURE, WEIGHT_INDEX
from models.bundle.load import Bundle, load_bundle
from models.detection.screen import FloatArray
from models.engines.registry import is_installed
from models.errors import BundleError
from tests.support.bundles import fit_tiny, forge, some_texts, victim_of
from tests.support.families import tiny_victim

WEIGHTS = "victim/model.safetensors"
KINDS = ["bert", "bert in shards", "bert prompt-tuning"]


def fitted(kind: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Return a bundle of one of `KINDS`."""
    bundle = fit_tiny(victim_of(kind.removesuffix(" in shards")), tokenizer, folder)
    if kind.endswith(" in shards"):
        victim: Any = AutoModelForSequenceClassification.from_pretrained(bundle / "victim")
        files = {*(bundle / "victim").iterdir()}
        victim.save_pretrained(bundle / "victim", max_shard_size="2MB")
        (bundle / WEIGHTS).unlink()
        assert len({*(bundle / "victim").iterdir()} - files) > 2
        forge(bundle, files={n: h for n, h in hash_files(bundle).items() if n != MANIFEST})
    return bundle


@pytest.fixture(scope="module")
def original(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted("bert", tokenizer, tmp_path_factory.mktemp("private") / "bundle")


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def outputs(bundle: Bundle) -> tuple[FloatArray, FloatArray]:
    """Return readings and probabilities of some texts."""
    batch = bundle.engine.encode(some_texts(5))
    return bundle.engine.screen(batch).readings, bundle.engine.classify(batch)


def same(one: Bundle, other: Bundle) -> bool:
    return all(map(np.array_equal, outputs(one), outputs(other)))


def when_checked(monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
    """Do something when all checks have passed, before libraries load; may be more than once."""
    load = AutoConfig.from_pretrained

    def loads(*args: Any, **options: Any) -> Any:
        do()
        return load(*args, **options)

    monkeypatch.setattr("models.bundle.weights.AutoConfig.from_pretrained", loads)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_again_once_it_is_checked(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = fitted(kind, tokenizer, tmp_path / "bundle")
    assert (bundle / WEIGHT_INDEX).exists() == kind.endswith("in shards")
    before = load_bundle(bundle, "float32", "torch")
    when_checked(monkeypatch, lambda: shutil.rmtree(bundle, ignore_errors=True))
    assert same(load_bundle(bundle, "float32", "torch"), before)
    assert not bundle.exists()


def other_weights(bundle: Path) -> None:
    """Replace weights by others, which fit as well."""
    for name in (WEIGHTS, ACTIVATIONS):
        others = {key: torch.ones_like(t) for key, t in load_file(bundle / name).items()}
        save_file(others, bundle / name, metadata={"format": "pt"})


def test_a_file_that_is_swapped_between_check_and_load_is_not_served(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_bundle(bundle, "float32", "torch")
    when_checked(monkeypatch, lambda: other_weights(bundle))
    assert same(load_bundle(bundle, "float32", "torch"), before)
    with pytest.raises(BundleError, match="was altered"):
        load_bundle(bundle, "float32", "torch")


def test_files_that_are_swapped_at_any_moment_are_refused_or_not_seen(bundle: Path) -> None:
    before = load_bundle(bundle, "float32", "torch")
    evil = Path(shutil.copytree(bundle, bundle.parent / "evil"))
    other_weights(evil)
    stop = threading.Event()

    def swap() -> None:
        for source in cycle([evil, before_swap]):
            for name in (WEIGHTS, ACTIVATIONS):
                shutil.copyfile(source / name, bundle / "new")
                (bundle / "new").replace(bundle / name)
            if stop.wait(0.01):
                return

    before_swap = Path(shutil.copytree(bundle, bundle.parent / "good"))
    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        for _ in range(20):
            try:
                loaded = load_bundle(bundle, "float32", "torch")
            except BundleError as error:
                assert "does not load" not in str(error)
            else:
                assert same(loaded, before)
    finally:
        stop.set()
        swapping.join()


def test_a_link_to_a_bundle_is_followed_once(
    bundle: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = fit_tiny(tiny_victim("bert", seed=9), tokenizer, bundle.parent / "other")
    current = bundle.parent / "current"
    current.symlink_to(bundle)

    def flip() -> None:
        current.unlink()
        current.symlink_to(other)

    def flipping(*args: Any) -> Any:
        read = verify.read_manifest(*args)
        flip()
        return read

    monkeypatch.setattr("models.bundle.load.read_manifest", flipping)
    assert same(load_bundle(current), load_bundle(bundle))
    monkeypatch.undo()
    assert same(load_bundle(current), load_bundle(other))


def test_links_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(BundleError, match="symbolic links are refused"):
        load_bundle(tmp_path / "a")


def mapped() -> str:
    gc.collect()
    return Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_no_file_of_a_bundle_stays_open_or_mapped(
    bundle: Path,
    engine: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if engine == "openvino":
        if not is_installed(engine):
            pytest.skip("openvino is not installed")
        bundle = fit_tiny(victim_of("bert"), tokenizer, bundle.parent / "fast", engine=engine)
    load_bundle(bundle, "float32", engine)  # what libraries open once
    process = psutil.Process()
    descriptors = process.num_fds()
    gc.collect()  # of bundles that other tests loaded, some may be held still
    held = mapped().count(ACTIVATIONS)
    loaded = load_bundle(bundle, "float32", engine)
    assert str(bundle) not in mapped()
    other_weights(bundle)
    with pytest.raises(BundleError, match="was altered"):
        load_bundle(bundle, "float32", engine)
    assert process.num_fds() == descriptors
    assert not list(tmp_path.glob("psim-bundle-*"))
    assert all(np.isfinite(o).all() for o in outputs(loaded))
    assert mapped().count(ACTIVATIONS) > held
    del loaded
    gc.collect()
    assert mapped().count(ACTIVATIONS) <= held, "the copy takes memory for ever"


def test_a_model_that_another_process_traces_says_the_same_and_leaves_nothing(
    bundle: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("openvino")
    from models.bundle.apart import trace_apart

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bundle = fit_tiny(victim_of("bert"), tokenizer, bundle.parent / "fast", engine="openvino")
    here, apart = (load_bundle(bundle, "float32", "openvino", apart=a) for a in (False, True))
    for own, expected in zip(outputs(apart), outputs(here), strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-6)
    assert not list(tmp_path.glob("psim-*"))
    with verify.checked_copy(bundle, here.manifest) as (copy, totals):
        with pytest.raises(BundleError, match="more layers than there are weights for"):
            trace_apart(copy, here.manifest, verify.WeightTotals(1, 1))
        other = here.manifest.model_copy(update={"labels": here.manifest.labels[::-1]})
        with pytest.raises(BundleError, match="labels of manifest"):
            trace_apart(copy, other, totals)
        (copy / "victim/config.json").unlink()
        with pytest.raises(BundleError, match="ended with code 1"):
            trace_apart(copy, here.manifest, totals)


def test_a_service_does_without_what_takes_memory_in_vain() -> None:
    heavy = "peft", "scipy", "sqlalchemy", "transformers.modeling_utils", "openvino"
    code = f"import sys, service.app; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_copy_cannot_be_changed_and_is_gone_afterwards(bundle: Path) -> None:
    names = [WEIGHTS, READINGS, PSIM]
    with private_copy(bundle, dict.fromkeys(names, 10**9)) as copy:
        assert copy.stat().st_mode & 0o777 == 0o700
        for name in names:
            assert (copy / name).read_bytes() == (bundle / name).read_bytes()
            with pytest.raises(PermissionError), (copy / name).open("r+b") as opened:
                opened.write(b"x")
                opened.flush()
            with pytest.raises(PermissionError):
                os.truncate(copy / name, 0)
    assert not copy.exists()


def test_of_a_file_that_grows_no_more_is_copied(bundle: Path) -> None:
    with private_copy(bundle, {READINGS: 100}) as copy:
        assert (copy / READINGS).read_bytes() == (bundle / READINGS).read_bytes()[:100]


@pytest.mark.parametrize("name", [MANIFEST, SIGNATURE, WEIGHTS])
@pytest.mark.parametrize("swapped", [os.mkfifo, Path.mkdir])
def test_what_is_swapped_for_a_pipe_or_a_folder_is_refused_at_once(
    bundle: Path, name: str, swapped: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where it was a file when the folder was listed."""
    key = bundle.parent / "key.pem"
    key.write_text(PUBLIC_KEY)
    listed = verify._listed_files

    def swapping(path: Path, manifest: Any) -> Any:
        files = listed(path, manifest)
        (bundle / name).unlink()
        swapped(bundle / name)
        return files

    if name == WEIGHTS:
        monkeypatch.setattr(verify, "_listed_files", swapping)
    else:
        (bundle / name).unlink(missing_ok=True)
        swapped(bundle / name)
    with pytest.raises(BundleError, match="not a regular file"):
        load_bundle(bundle, key=key if name == SIGNATURE else None)


PUBLIC_KEY = """-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=
-----END PUBLIC KEY-----
"""


def test_a_bundle_is_not_copied_into_memory_that_is_not_there(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container is ended if it takes more than its limit; what can be freed counts as free."""
    assert 0 < verify.free_memory() <= psutil.virtual_memory().total
    monkeypatch.setattr(verify, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert verify.free_memory() > 2**20
    (tmp_path / "memory.max").write_text(f"{2**20}\n")
    (tmp_path / "memory.current").write_text(f"{2**20 - 50}\n")
    lines = "anon 1\nfile 80\nactive_file 20\ninactive_file 30\nworkingset_activate_file 7\n"
    (tmp_path / "memory.stat").write_text(lines)
    assert verify.free_memory() == 100
    with pytest.raises(BundleError, match="more than the 100 of free memory"):
        load_bundle(bundle)


def test_without_a_folder_for_temporary_files_the_error_says_so(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(bundle / "nowhere"))
    with pytest.raises(BundleError, match="set TMPDIR"):
        load_bundle(bundle)
