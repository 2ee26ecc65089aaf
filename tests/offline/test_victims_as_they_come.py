"""Adapters and configs as people have them: loaded with the right classes, or refused in a line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from models.errors import VictimError
from models.offline.attacks.strategy import Strategy
from models.offline.attacks.training import finetune_victim
from models.offline.io.classifiers import labels_of, load_classifier, save_classifier
from models.offline.io.samples import Sample, write_samples
from tests.support.bundles import some_texts
from tests.support.commands import assert_refused, psim
from tests.support.families import tiny_victim

CONFIG = "adapter_config.json"


@pytest.fixture
def plain() -> PreTrainedTokenizerBase:
    """Return a tokenizer that tests may add tokens to."""
    from models.offline.io.bases import encoder_path

    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(encoder_path())
    return loaded


@pytest.fixture
def base(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Return a classifier with three classes."""
    victim: Any = tiny_victim("bert")
    victim.config.id2label = {0: "bad", 1: "good", 2: "so"}
    save_classifier(victim, tokenizer, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def headless(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Return a transformer without a head, whose config knows of no classes."""
    victim: Any = tiny_victim("bert")
    victim.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    victim.bert.save_pretrained(tmp_path / "headless")
    tokenizer.save_pretrained(tmp_path / "headless")
    return tmp_path / "headless"


def change(file: Path, **settings: Any) -> None:
    """Change settings in a file of JSON; None removes one."""
    known = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({k: v for k, v in known.items() if v is not None}))


def adapter_for(base: Path, folder: Path, classes: int = 3, **settings: Any) -> Any:
    """Save a LoRA with a head as PEFT does, and return the model."""
    victim: Any = tiny_victim("bert")
    if classes != 3:
        victim.classifier = torch.nn.Linear(32, classes)
        victim.num_labels = victim.config.num_labels = classes
    asked: dict[str, Any] = {"task_type": "SEQ_CLS", "init_lora_weights": False} | settings
    lora = peft.LoraConfig(**asked)
    adapted: Any = peft.get_peft_model(victim, lora).eval()
    for name, weights in adapted.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(weights)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return adapted


def says(model: Any, tokenizer: PreTrainedTokenizerBase, text: str = "good film") -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(**tokenizer([text], return_tensors="pt")).logits
    return logits


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_head_of_an_adapter_says_how_many_classes_there_are(
    classes: int, headless: Path, tmp_path: Path
) -> None:
    adapted = adapter_for(headless, tmp_path / "a", classes)
    loaded, tokenizer = load_classifier(str(tmp_path / "a"))
    assert labels_of(loaded) == [f"LABEL_{i}" for i in range(classes)]
    torch.testing.assert_close(says(loaded, tokenizer), says(adapted, tokenizer))


def test_the_head_of_an_adapter_replaces_one_of_another_size(base: Path, tmp_path: Path) -> None:
    """The names of the base are those of other classes, so they are not kept."""
    adapted = adapter_for(base, tmp_path / "a", 5)
    loaded, tokenizer = load_classifier(str(tmp_path / "a"))
    assert labels_of(loaded) == [f"LABEL_{i}" for i in range(5)]
    torch.testing.assert_close(says(loaded, tokenizer), says(adapted, tokenizer))


def test_names_beside_an_adapter_are_its_own(headless: Path, tmp_path: Path) -> None:
    adapted = adapter_for(headless, tmp_path / "a", 3)
    adapted.config.id2label = {0: "x", 1: "y", 2: "z"}
    adapted.config.save_pretrained(tmp_path / "a")
    assert labels_of(load_classifier(str(tmp_path / "a"))[0]) == ["x", "y", "z"]
    change(tmp_path / "a" / "config.json", id2label={"0": "x", "1": "y"})
    with pytest.raises(VictimError, match=r"its head is for 3 classes, its config\.json names 2"):
        load_classifier(str(tmp_path / "a"))


@pytest.mark.parametrize("head", [["classifier"], ["classifier", "pooler"]])
def test_an_adapter_without_a_task_type_is_a_classifier_if_it_fits(
    head: list[str], headless: Path, tmp_path: Path
) -> None:
    adapted = adapter_for(headless, tmp_path / "a", task_type=None, modules_to_save=head)
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["task_type"] is None
    loaded, tokenizer = load_classifier(str(tmp_path / "a"))
    torch.testing.assert_close(says(loaded, tokenizer), says(adapted, tokenizer))


@pytest.mark.parametrize("strategy", [s for s in Strategy if s not in (Strategy.FULL,)])
def test_a_tuned_victim_needs_no_task_type(strategy: Strategy, base: Path, tmp_path: Path) -> None:
    train = [Sample(f"{w} film {i}", w) for i in range(8) for w in ("bad", "good", "so")]
    finetune_victim(str(base), train, train[:3], strategy, tmp_path / "v", epochs=1)
    if not (tmp_path / "v" / CONFIG).is_file():
        return  # LoRA is merged
    model, tokenizer = load_classifier(str(tmp_path / "v"))
    change(tmp_path / "v" / CONFIG, task_type=None)
    again, _ = load_classifier(str(tmp_path / "v"))
    torch.testing.assert_close(says(again, tokenizer), says(model, tokenizer))


def test_an_adapter_of_another_kind_of_model_is_refused(base: Path, tmp_path: Path) -> None:
    adapter_for(base, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    change(tmp_path / "a" / CONFIG, task_type=None)
    weights = {name.replace(".bert.", "."): t for name, t in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(VictimError, match=r"does not fit its base: .* has no counterpart"):
        load_classifier(str(tmp_path / "a"))
    change(tmp_path / "a" / CONFIG, task_type="CAUSAL_LM")
    with pytest.raises(VictimError, match="not an adapter for sequence classification"):
        load_classifier(str(tmp_path / "a"))


@pytest.mark.parametrize("way", ["saved along", "modules_to_save"])
def test_added_tokens_come_with_their_embeddings(
    way: str, base: Path, tmp_path: Path, plain: PreTrainedTokenizerBase
) -> None:
    plain.add_tokens(["<a>", "<b>"])
    victim: Any = tiny_victim("bert")
    victim.resize_token_embeddings(len(plain), mean_resizing=False)
    torch.nn.init.normal_(victim.bert.embeddings.word_embeddings.weight)
    more: dict[str, Any] = (
        {"modules_to_save": ["word_embeddings", "classifier"]} if way != "saved along" else {}
    )
    lora = peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, **more)
    adapted: Any = peft.get_peft_model(victim, lora).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "a", save_embedding_layers=not more)
    plain.save_pretrained(tmp_path / "a")
    loaded, tokenizer = load_classifier(str(tmp_path / "a"))
    assert len(tokenizer) == 30524
    torch.testing.assert_close(
        says(loaded, tokenizer, "a <b> film"), says(adapted, plain, "a <b> film")
    )


def test_added_tokens_without_embeddings_are_refused(
    base: Path, tmp_path: Path, plain: PreTrainedTokenizerBase
) -> None:
    adapter_for(base, tmp_path / "a")
    plain.add_tokens(["<c>"])
    plain.save_pretrained(tmp_path / "a")
    with pytest.raises(VictimError, match="their embeddings were not saved"):
        load_classifier(str(tmp_path / "a"))
    plain.save_pretrained(base)
    with pytest.raises(VictimError, match="their embeddings were not saved"):
        load_classifier(str(base))


def test_a_quantised_base_is_refused_and_another_may_be_named(base: Path, tmp_path: Path) -> None:
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    for file in base.iterdir():
        (quantised / file.name).write_bytes(file.read_bytes())
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    change(quantised / "config.json", quantization_config=settings)
    adapted = adapter_for(quantised, tmp_path / "a")
    with pytest.raises(VictimError, match=r"quantised \(bitsandbytes\); name .* with --base"):
        load_classifier(str(tmp_path / "a"))
    loaded, tokenizer = load_classifier(str(tmp_path / "a"), base=str(base))
    assert labels_of(loaded) == ["bad", "good", "so"]
    torch.testing.assert_close(says(loaded, tokenizer), says(adapted, tokenizer))
    with pytest.raises(VictimError, match="PSIM needs the full-precision model"):
        load_classifier(str(quantised))
    with pytest.raises(VictimError, match="is no adapter"):
        load_classifier(str(base), base=str(base))


@pytest.mark.parametrize("gone", [None, "/somebody/else/model"])
def test_a_base_that_is_elsewhere_is_to_be_named(
    gone: str | None, base: Path, tmp_path: Path
) -> None:
    adapter_for(base, tmp_path / "a")
    change(tmp_path / "a" / CONFIG, base_model_name_or_path=gone)
    with pytest.raises(VictimError, match="cannot be loaded; name it with --base"):
        load_classifier(str(tmp_path / "a"))
    load_classifier(str(tmp_path / "a"), base=str(base))


def _problem(problem_type: str) -> Callable[[Path], None]:
    return lambda base: change(base / "config.json", problem_type=problem_type)


def _labels(**id2label: str) -> Callable[[Path], None]:
    names = {name.removeprefix("n"): label for name, label in id2label.items()}
    return lambda base: change(base / "config.json", id2label=names)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_problem("regression"), "is for regression"),
        (_labels(n0="a", n1="b"), "its head is for 3 classes, its config.json names 2"),
        (_labels(n0="a", n2="c", n3="b"), "names classes [0, 2, 3]: complete it"),
        (_labels(n0="a", n1="b", n2="a"), "gives several classes the name 'a'"),
        (_labels(n0="a", n1="b", n2=" "), "gives several classes the name ' ', or none"),
        (_labels(n0="a", n1="b", x="c"), "the model cannot be loaded"),
    ],
)
def test_fit_refuses_in_one_line(
    fault: Callable[[Path], None], message: str, base: Path, tmp_path: Path
) -> None:
    fault(base)
    write_samples(tmp_path / "clean.jsonl", [Sample(text) for text in some_texts(160)])
    refused = psim(
        "fit", "--victim", base, "--texts", tmp_path / "clean.jsonl", "--out", tmp_path / "b",
        "--frr-budget", 0.05,
    )  # fmt: skip
    assert_refused(refused, message)
    assert not (tmp_path / "b").exists()


def test_fit_takes_the_base_of_an_adapter(base: Path, tmp_path: Path) -> None:
    adapter_for(base, tmp_path / "a")
    change(tmp_path / "a" / CONFIG, base_model_name_or_path="/elsewhere")
    write_samples(tmp_path / "clean.jsonl", [Sample(text) for text in some_texts(160)])
    options = (
        "fit", "--victim", tmp_path / "a", "--texts", tmp_path / "clean.jsonl",
        "--out", tmp_path / "b", "--frr-budget", 0.05,
    )  # fmt: skip
    assert_refused(psim(*options), "name it with --base")
    fitted = psim(*options, "--base", base)
    assert fitted.exit_code == 0, fitted.output
