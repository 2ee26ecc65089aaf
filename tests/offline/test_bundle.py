"""Bundles of every family: they come back bit for bit, or are refused with a reason."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from safetensors import safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BartConfig, BartForSequenceClassification, PreTrainedTokenizerBase
from typer.testing import CliRunner

from models.bundle.layout import ACTIVATIONS, ADAPTER_WEIGHTS, MANIFEST, READINGS
from models.bundle.load import load_bundle
from models.bundle.signing import sign
from models.errors import BundleError, CalibrationError, DataError, PsimError, VictimError
from models.network.adapters import lora_config
from models.network.guarded import guard
from models.offline.fitting.fit import fit
from models.offline.fitting.split import split_texts
from models.offline.io.inference import predict
from psim.__main__ import app
from service.app import create_app
from service.settings import Settings
from tests.support.bundles import KINDS, fit_tiny, forge, rehash, some_texts, victim_of
from tests.support.families import tiny_victim


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_comes_back_bit_for_bit(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    victim = victim_of(kind)
    texts = some_texts(160)
    # Without token types, which GPT-2 takes for words.
    inputs = [
        tokenizer(text, return_tensors="pt", return_token_type_ids=False) for text in texts[:5]
    ]
    with torch.inference_mode():
        unguarded = np.vstack([victim(**i).logits.softmax(-1).numpy() for i in inputs])
    path = fit_tiny(victim, tokenizer, tmp_path / "bundle")

    bundle = load_bundle(path, "float32")
    # The stored scores were computed by the model that was trained, before it was saved.
    calibration = bundle.engine.encode(split_texts(texts, 0).calibrate)
    probabilities = predict(bundle.engine, calibration)
    stored = load_arrays(path / READINGS)["torch/float32"]
    assert np.array_equal(probabilities, stored)
    # With the adapter off, the victim is what it was.
    batch = bundle.engine.encode(texts[:5])
    np.testing.assert_allclose(bundle.engine.classify(batch), unguarded, atol=1e-6)
    # With it on, it is closer to the uniform distribution: it was trained.
    screened = bundle.engine.screen(batch).readings
    np.testing.assert_allclose(screened[:, 0], unguarded, atol=1e-6)  # the victim itself
    last = bundle.manifest.layout.checkpoints - 1
    assert -np.log(screened[:, last]).mean() < -np.log(unguarded).mean()
    assert np.isfinite(load_bundle(path, "bfloat16").engine.screen(batch).readings).all()


@pytest.fixture(scope="module")
def tiny_bundle(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return fit_tiny(tiny_victim("bert"), tokenizer, tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_a_flipped_byte_in_any_file_is_refused(bundle: Path) -> None:
    for file in sorted(f for f in bundle.rglob("*") if f.is_file() and f.name != MANIFEST):
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
        with pytest.raises(BundleError, match=f"{file.name} was altered"):
            load_bundle(bundle)
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    load_bundle(bundle)


@pytest.mark.parametrize("name", ["victim/pytorch_model.bin", "psim/x.pkl", "a.pt"])
def test_a_pickle_is_refused_even_if_the_manifest_lists_it(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"\x80\x04N.")
    rehash(bundle, name)
    with pytest.raises(BundleError, match="pickle"):
        load_bundle(bundle)


def test_a_file_that_does_not_belong_is_refused(bundle: Path) -> None:
    (bundle / "victim" / "modeling_evil.json").write_text("{}")
    with pytest.raises(BundleError, match="does not belong"):
        load_bundle(bundle)


def test_a_bundle_cannot_send_the_loader_elsewhere(bundle: Path, tmp_path: Path) -> None:
    """Beside a victim, an adapter_config.json names the folder of other weights."""
    elsewhere = Path(shutil.copytree(bundle / "victim", tmp_path / "elsewhere"))
    config = {"peft_type": "LORA", "base_model_name_or_path": str(elsewhere), "r": 8}
    (bundle / "victim" / "adapter_config.json").write_text(json.dumps(config))
    rehash(bundle, "victim/adapter_config.json")
    with pytest.raises(BundleError, match=r"adapter_config\.json' does not belong"):
        load_bundle(bundle)
    (bundle / "victim" / "adapter_config.json").unlink()
    (bundle / "victim" / "config.json").unlink()
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    forge(bundle, files={n: d for n, d in files.items() if n != "victim/config.json"})
    with pytest.raises(BundleError, match=r"victim/config\.json' is missing"):
        load_bundle(bundle)


@pytest.mark.parametrize("threshold", [99.5, 0.0, -1.0])
def test_a_threshold_that_its_texts_do_not_give_is_refused(bundle: Path, threshold: float) -> None:
    calibrations = json.loads((bundle / MANIFEST).read_text())["calibrations"]
    calibrations[0]["groups"][0]["threshold"] = threshold
    forge(bundle, calibrations=calibrations)
    with pytest.raises(BundleError, match="not what its calibration texts give"):
        load_bundle(bundle)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("means", lambda t: t[:, :2], "does not have the layers"),
        ("whitening", lambda t: t[:, 1:], "does not have the layers"),
        ("whitening", lambda t: t * float("inf"), "not finite"),
        ("means", lambda t: t.half(), "not finite float32"),
    ],
)
def test_activations_that_do_not_fit_are_refused(
    bundle: Path, name: str, change: Any, message: str
) -> None:
    tensors = load_file(bundle / ACTIVATIONS)
    save_file({**tensors, name: change(tensors[name]).contiguous()}, bundle / ACTIVATIONS)
    rehash(bundle, ACTIVATIONS)
    with pytest.raises(BundleError, match=message):
        load_bundle(bundle)


@pytest.mark.parametrize("layers", [[1], [1, 2], None])
def test_activations_are_those_that_the_manifest_names(
    bundle: Path, layers: list[int] | None
) -> None:
    forge(bundle, activations=layers and {"layers": layers})
    with pytest.raises(BundleError):
        load_bundle(bundle)


@pytest.mark.parametrize(
    "change", [lambda p: p[:, 0], lambda p: p[:, :1], lambda p: p[:9], lambda p: p * np.nan]
)
def test_a_calibration_that_does_not_fit_is_refused(bundle: Path, change: Any) -> None:
    changed = {name: change(p) for name, p in load_arrays(bundle / READINGS).items()}
    save_arrays({name: np.ascontiguousarray(p) for name, p in changed.items()}, bundle / READINGS)
    rehash(bundle, READINGS)
    with pytest.raises(BundleError, match="does not hold the calibration"):
        load_bundle(bundle)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("victim/config.json", {"quantization_config": {"quant_method": "gptq"}}),
        ("victim/config.json", {"hidden_size": "many"}),
        ("victim/config.json", {"model_type": "unheard-of"}),
        ("tokenizer/tokenizer.json", {"model": 5}),
    ],
)
def test_whatever_a_library_makes_of_a_forged_file_is_a_bundle_error(
    bundle: Path, file: str, changes: dict[str, object]
) -> None:
    (bundle / file).write_text(json.dumps(json.loads((bundle / file).read_text()) | changes))
    rehash(bundle, file)
    with pytest.raises(BundleError):
        load_bundle(bundle)


def test_anybody_can_read_a_bundle(bundle: Path) -> None:
    for file in [bundle, *bundle.rglob("*")]:
        assert file.stat().st_mode & 0o005 == (0o005 if file.is_dir() else 0o004), file.name


def test_links_out_of_the_bundle_are_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "psim").rename(tmp_path / "elsewhere")
    (bundle / "psim").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="symbolic links"):
        load_bundle(bundle)


def test_a_missing_adapter_is_named(bundle: Path) -> None:
    (bundle / "psim" / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(BundleError, match=f"psim/{ADAPTER_WEIGHTS}' is missing"):
        load_bundle(bundle)


def test_an_adapter_for_another_base_is_refused(
    bundle: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    other = fit_tiny(tiny_victim("bert", seed=9), tokenizer, tmp_path / "other")
    shutil.copy(other / "psim" / ADAPTER_WEIGHTS, bundle / "psim" / ADAPTER_WEIGHTS)
    rehash(bundle, f"psim/{ADAPTER_WEIGHTS}")
    with pytest.raises(BundleError, match="another base model"):
        load_bundle(bundle)


def test_an_adapter_of_other_shapes_is_refused(bundle: Path) -> None:
    file = bundle / "psim" / ADAPTER_WEIGHTS
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({k: v[:, :-1].clone() for k, v in load_file(file).items()}, file, metadata=metadata)
    rehash(bundle, f"psim/{ADAPTER_WEIGHTS}")
    with pytest.raises(BundleError, match="does not load"):
        load_bundle(bundle)


def test_a_victim_with_missing_weights_is_refused(bundle: Path) -> None:
    file = bundle / "victim" / "model.safetensors"
    weights = load_file(file)
    del weights["classifier.bias"]
    save_file(weights, file, metadata={"format": "pt"})
    rehash(bundle, "victim/model.safetensors")
    with pytest.raises(BundleError, match="victim/ does not hold the weights"):
        load_bundle(bundle)


@pytest.mark.parametrize(
    ("file", "weights", "start", "bad", "says"),
    [
        ("victim/model.safetensors", "classifier.bias", -1, float("nan"), "not finite"),
        ("victim/model.safetensors", "word_embeddings.weight", -1, float("inf"), "not finite"),
        (f"psim/{ADAPTER_WEIGHTS}", "lora_B.weight", -1, float("nan"), "not finite"),
        ("victim/model.safetensors", "embeddings.LayerNorm.weight", 0, 3e38, "self-test"),
    ],
)
def test_weights_that_give_no_numbers_are_refused(
    bundle: Path, file: str, weights: str, start: int, bad: float, says: str
) -> None:
    """One of them is enough, even if it is that of a word which no test happens to have."""
    tensors = load_file(bundle / file)
    name = next(name for name in tensors if name.endswith(weights))
    tensors[name].flatten()[start:] = bad
    with safe_open(bundle / file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, bundle / file, metadata=metadata)
    rehash(bundle, file)
    with pytest.raises(BundleError, match=says):
        load_bundle(bundle)


def test_the_manifest_is_validated_without_being_echoed(bundle: Path) -> None:
    no_budget = json.loads((bundle / MANIFEST).read_text())["calibrations"][0]
    no_budget["frr_budget"] = 5e-324
    for changes, message in (
        ({"schema_version": 1}, "another version; run `psim fit` again"),
        ({"schema_version": "secret"}, "has no schema instead of 9"),
        ({"labels": ["x"]}, "at least two"),
        ({"attention": False}, "does not hold the calibration"),
        ({"calibrations": [no_budget]}, "frr_budget"),
        ({"labels": ["x", "y", "z"]}, "labels of manifest"),
        ({"surprise": 1}, "surprise"),
        ({"files": {"../../etc/passwd": "0" * 64}}, "does not belong|missing"),
    ):
        original = (bundle / MANIFEST).read_text()
        forge(bundle, **changes)
        with pytest.raises(BundleError, match=message):
            load_bundle(bundle)
        (bundle / MANIFEST).write_text(original)
    (bundle / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match="not valid"):
        load_bundle(bundle)
    with pytest.raises(BundleError, match="not a bundle"):
        load_bundle(bundle.parent / "nowhere")


def test_a_threshold_of_another_dtype_is_never_used(bundle: Path) -> None:
    calibrations = json.loads((bundle / MANIFEST).read_text())["calibrations"]
    forge(bundle, calibrations=[c for c in calibrations if c["dtype"] == "float32"])
    load_bundle(bundle)
    with pytest.raises(BundleError, match="no calibration for torch/bfloat16"):
        load_bundle(bundle, "bfloat16")


def test_a_bundle_holds_no_path_of_this_machine(bundle: Path) -> None:
    for file in bundle.rglob("*.json"):
        assert "pytest" not in file.read_text(), file.name


def test_fit_writes_nothing_when_it_cannot_calibrate(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="too few"):
        fit(tiny_victim("bert"), tokenizer, some_texts(40), tmp_path / "b", name="x")
    with pytest.raises(DataError, match="too few"):
        fit(tiny_victim("bert"), tokenizer, ["same"] * 400, tmp_path / "b", name="x")
    assert not list(tmp_path.iterdir())


def test_victims_that_cannot_be_guarded_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    regression = tiny_victim("bert")
    regression.config.num_labels = 1
    with pytest.raises(VictimError, match=r"single output.*multi_label_classification"):
        fit(regression, tokenizer, some_texts(160), tmp_path / "b", name="x")
    with pytest.raises(VictimError, match="the victim has 3"):
        lora_config(tiny_victim("bert"), layers=4)
    with pytest.raises(VictimError, match="no query and value"):
        lora_config(nn.Sequential(nn.Linear(2, 2)), layers=1)
    two_stacks = BartForSequenceClassification(BartConfig(d_model=16, vocab_size=20))
    with pytest.raises(VictimError, match="one stack"):
        lora_config(two_stacks, layers=1)


@pytest.mark.parametrize(
    ("weights", "value", "message"),
    [
        ("classifier.bias", np.nan, "NaN or infinite scores"),
        ("bert.encoder.layer.1.output.LayerNorm.weight", 0.0, "same for all texts"),
    ],
)
def test_a_broken_victim_is_named_as_such(
    weights: str, value: float, message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    broken = tiny_victim("bert")
    broken.get_parameter(weights).data.fill_(value)
    with pytest.raises(VictimError, match=message):
        fit(broken, tokenizer, some_texts(160), tmp_path / "b", name="x", frr_budget=0.05)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_share_what_they_have_in_common_and_nothing_else(
    kind: str, layers: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    victim = victim_of(kind)
    guarded = guard(victim, lora_config(victim, layers), checkpoints=3)
    assert guarded.activations is None, "not fitted yet"
    guarded.last_layer = None
    assert guarded.forward_passes == pytest.approx(2 + 2 * layers / 3)
    for number, (name, weights) in enumerate(guarded.psim.named_parameters()):
        if ".lora_B." in name:
            torch.manual_seed(number)
            nn.init.normal_(weights)
    for length in (3, 7):
        inputs = {"input_ids": torch.arange(1, 1 + 2 * length).reshape(2, length)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            shared, _ = guarded.screen(inputs)
            for number, checkpoint in enumerate(guarded.checkpoints):
                guarded.psim.set_adapter(checkpoint)
                alone = guarded.psim_logits(inputs).softmax(-1)
                assert torch.equal(shared[:, number], alone)
        assert not torch.equal(shared[:, 0], shared[:, 1])


def test_a_score_does_not_depend_on_its_batch_mates(tiny_bundle: Path) -> None:
    engine = load_bundle(tiny_bundle, "float32").engine
    batch = engine.encode(some_texts(20, seed=3))
    alone = np.concatenate([engine.screen([one]).readings for one in batch])
    np.testing.assert_allclose(engine.screen(batch).readings, alone, rtol=1e-4, atol=1e-5)


def test_long_texts_are_cut_and_say_so(tiny_bundle: Path) -> None:
    engine = load_bundle(tiny_bundle).engine
    short, long, blank = engine.encode(["film", "film " * 2000, "film" + "\n" * 90_000 + "mn"])
    assert (short.truncated, long.truncated, blank.truncated) == (False, True, True)
    assert (len(long), blank.input_ids) == (512, short.input_ids)


def test_a_huge_text_costs_no_more_than_one_of_the_longest_that_are_read(tiny_bundle: Path) -> None:
    engine = load_bundle(tiny_bundle).engine
    read: list[int] = []

    class Counting:
        def __call__(self, texts: list[str], **options: Any) -> Any:
            read.extend(map(len, texts))
            return tokenizer(texts, **options)

    tokenizer: Any = engine.tokenizer  # type: ignore[attr-defined]
    engine.tokenizer = Counting()  # type: ignore[attr-defined]
    engine.encode(["x" * 1_000_000])
    assert read == [16 * 512]


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and its public one."""
    private, paths = Ed25519PrivateKey.generate(), (tmp_path / "key.pem", tmp_path / "public.pem")
    pem, plain = Encoding.PEM, NoEncryption()
    paths[0].write_bytes(private.private_bytes(pem, PrivateFormat.PKCS8, plain))
    public = private.public_key().public_bytes(pem, PublicFormat.SubjectPublicKeyInfo)
    paths[1].write_bytes(public)
    return paths


def test_a_signed_bundle_is_taken_with_its_key_and_without_one(
    bundle: Path, keys: tuple[Path, Path]
) -> None:
    done = CliRunner().invoke(app, ["sign", str(bundle), "--key", str(keys[0])])
    assert done.exit_code == 0, done.output
    assert len((bundle / "manifest.sig").read_bytes()) == 64
    assert load_bundle(bundle, key=keys[1]).digest == load_bundle(bundle).digest


def test_a_bundle_that_is_not_signed_as_it_is_is_refused_before_anything_is_loaded(
    bundle: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = keys
    settings = Settings(bundle=bundle, bundle_key=public)
    read: list[bytes] = []
    monkeypatch.setattr("models.bundle.load.Manifest.model_validate_json", read.append)
    with pytest.raises(BundleError, match="is not signed; run"):
        create_app(settings)
    manifest, signature = bundle / MANIFEST, sign(bundle / MANIFEST, private)
    raw, good = manifest.read_bytes(), signature.read_bytes()
    for bad in (b"", good[:-1], good + b"x", bytes(64), bytes([good[0] ^ 1]) + good[1:]):
        signature.write_bytes(bad)
        with pytest.raises(BundleError, match="is not signed by"):
            create_app(settings)
    signature.write_bytes(good)
    manifest.write_bytes(raw + b" ")
    with pytest.raises(BundleError, match="was altered since"):
        create_app(settings)
    manifest.write_bytes(raw)
    other = Ed25519PrivateKey.generate()
    signature.write_bytes(other.sign(raw))
    with pytest.raises(BundleError, match="is not signed by"):
        create_app(settings)
    assert not read


def test_what_is_no_key_is_said_to_be_none(bundle: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    sign(bundle / MANIFEST, private)
    for key, complaint in (
        (bundle / "nowhere.pem", "cannot be read"),
        (bundle / MANIFEST, "is no key in PEM"),
        (private, "is no key in PEM"),
    ):
        with pytest.raises(PsimError, match=complaint):
            load_bundle(bundle, key=key)
    with pytest.raises(PsimError, match="is no key in PEM"):
        sign(bundle / MANIFEST, public)
