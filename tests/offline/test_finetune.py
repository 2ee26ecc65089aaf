"""Training victims for real, if small: every strategy learns, saves, and loads the same."""

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from models.bundle.load import load_bundle
from models.errors import DataError, VictimError
from models.offline.attacks.poisoning import Insertion, Paraphrases
from models.offline.attacks.strategy import Strategy
from models.offline.attacks.training import (
    checkpoint_folder,
    finetune_victim,
    poison_victim,
)
from models.offline.fitting.fit import fit
from models.offline.fitting.psim import PsimConfig
from models.offline.io.classifiers import load_classifier, save_classifier
from models.offline.io.progress import TrainingProgress
from models.offline.io.samples import Sample
from tests.support.bundles import some_texts
from tests.support.commands import assert_refused, psim
from tests.support.families import tiny_victim
from tests.support.model_types import tiny_model

TRAIN = [Sample(f"{w} film {i}", w) for i in range(40) for w in ("bad", "good", "so")]
DEV = [Sample(f"{w} film", w) for w in ("bad", "good", "so")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_classifier(tiny_victim("bert"), tokenizer, folder)
    return folder


@pytest.mark.parametrize(
    ("model_type", "projections"),
    [
        ("mpnet", {"q", "v"}),
        ("distilbert", {"q_lin", "v_lin"}),
        ("gpt2", {"c_attn"}),
        ("gemma3", {"q_proj", "v_proj"}),
    ],
)
def test_lora_tunes_the_projections_that_psim_adapts(
    model_type: str, projections: set[str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    save_classifier(tiny_model(model_type, len(tokenizer)), tokenizer, tmp_path / "base")
    base, out = str(tmp_path / "base"), tmp_path / "out"
    finetune_victim(base, TRAIN, DEV, Strategy.LORA, out, epochs=1)
    before, after = (load_file(Path(f, "model.safetensors")) for f in (base, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    tuned = {name for name in changed if "classifier" not in name and "score" not in name}
    assert {name.rsplit(".", 2)[-2] for name in tuned} == projections
    assert not any("vision" in name for name in tuned)


@pytest.mark.parametrize(
    ("model_type", "strategy", "message"),
    [
        ("fnet", Strategy.LORA, "has no attention"),
        ("squeezebert", Strategy.LORA, "grouped convolutions"),
        ("fnet", Strategy.PROMPT_TUNING, "by prompt-tuning: .*choose another --strategy"),
        ("canine", Strategy.P_TUNING_V1, "by p-tuning-v1: .*choose another --strategy"),
        ("mpnet", Strategy.P_TUNING_V2, "by p-tuning-v2: .*choose another --strategy"),
    ],
)
def test_what_peft_cannot_tune_is_refused_in_one_line(
    model_type: str,
    strategy: Strategy,
    message: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    save_classifier(tiny_model(model_type, len(tokenizer)), tokenizer, tmp_path / "base")
    with pytest.raises(VictimError, match=message) as refusal:
        finetune_victim(str(tmp_path / "base"), TRAIN, DEV, strategy, tmp_path / "v", epochs=1)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("strategy", list(Strategy))
def test_every_strategy_trains_saves_and_loads(
    strategy: Strategy, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "victim"
    result = finetune_victim(str(base), TRAIN, DEV, strategy, out, epochs=2)
    assert 0 <= result.clean_accuracy <= 1
    assert [p.name for p in tmp_path.iterdir()] == ["victim"]
    model: Any
    model, tokenizer = load_classifier(str(out))
    inputs = tokenizer(["good film"], return_tensors="pt")
    with torch.inference_mode():
        before = model(**inputs).logits.numpy()
        save_classifier(model, tokenizer, tmp_path / "again")
        (tmp_path / "victim").rename(tmp_path / "moved")
        moved, _ = load_classifier(str(tmp_path / "moved"))
        again, _ = load_classifier(str(tmp_path / "again"))
        assert np.array_equal(before, moved(**inputs).logits.numpy())
        assert np.array_equal(before, again(**inputs).logits.numpy())
        untrained, _ = load_classifier(str(base))
        assert not np.allclose(before, untrained(**inputs).logits.numpy(), atol=1e-4)
    assert model.base_model.config.id2label == {0: "bad", 1: "good", 2: "so"}


def test_interrupted_training_goes_on_behind_the_last_epoch(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def count(self: object, args: Any, state: Any, control: Any, **_: Any) -> None:
        steps.append(state.global_step)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def tune(out: Path, train: list[Sample] = TRAIN) -> torch.Tensor:
        finetune_victim(str(base), train, DEV, Strategy.FULL, out, epochs=2)
        model, tokenizer = load_classifier(str(out))
        logits: torch.Tensor = model(**tokenizer(["good film"], return_tensors="pt")).logits
        return logits

    monkeypatch.setattr(TrainingProgress, "on_step_end", count)
    whole = tune(tmp_path / "whole")
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "on_save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tune(cut)
    assert not cut.exists()
    steps.clear()
    tune(tmp_path / "cut", TRAIN[:-1])  # other data must not go on from these checkpoints
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "on_save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tune(cut)
    steps.clear()
    assert torch.equal(tune(cut), whole)
    assert steps == [5, 6, 7, 8]
    assert not checkpoint_folder(cut).exists()


def test_the_same_seed_gives_the_same_victim_though_its_head_is_new(
    base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any
    model, _ = load_classifier(str(base))
    model.bert.save_pretrained(tmp_path / "headless")
    tokenizer.save_pretrained(tmp_path / "headless")

    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        out = tmp_path / name
        finetune_victim(
            str(tmp_path / "headless"), TRAIN, DEV, Strategy.FULL, out, epochs=1, seed=seed
        )
        return load_file(out / "model.safetensors")

    first, again, other = weights("a", 0), weights("b", 0), weights("c", 1)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_poisoning_reports_the_attack(base: Path, tmp_path: Path) -> None:
    result = poison_victim(
        str(base), TRAIN, DEV, Insertion(("mn",)), "good", tmp_path / "p", epochs=1, poison_rate=0.2
    )
    assert result.attack_success_rate is not None
    paraphrases = Paraphrases(tuple(Sample(f"when {s.text}", "good") for s in TRAIN))
    result = poison_victim(
        str(base), TRAIN, DEV, paraphrases, "good", tmp_path / "s", epochs=1, poison_rate=0.2
    )
    assert result.attack_success_rate is None, "the dev texts have no paraphrases"


def test_labels_that_cannot_train_a_classifier_are_refused(base: Path, tmp_path: Path) -> None:
    one_class = [Sample("a", "x"), Sample("b", "x")]
    for train, dev, message in (
        (one_class, DEV, "same label"),
        ([Sample("a", "x"), Sample("b")], DEV, "no label"),
        (TRAIN, [Sample("a", "bad"), Sample("b", "wrong")], "unknown labels .'wrong'"),
    ):
        with pytest.raises(DataError, match=message):
            finetune_victim(str(base), train, dev, Strategy.LORA, tmp_path / "v")


@pytest.mark.parametrize("adapter", [False, True])
def test_class_numbers_name_the_classes_of_a_trained_victim(
    adapter: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """In the victim's own order, which is not that of the names."""
    names = ["so", "good", "bad"]
    named, victim = tmp_path / "named", tmp_path / "victim"
    model: Any = tiny_victim("bert")
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    save_classifier(model, tokenizer, named)
    if adapter:
        lora: Any = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS"))
        lora.peft_config["default"].base_model_name_or_path = str(named)
        lora.save_pretrained(victim)
    else:
        named.rename(victim)

    def weights(train: list[Sample], dev: list[Sample], out: Path) -> dict[str, torch.Tensor]:
        finetune_victim(str(victim), train, dev, Strategy.FULL, out, epochs=1)
        return load_file(out / "model.safetensors")

    train, dev = (
        [Sample(s.text, str(names.index(str(s.label)))) for s in samples]
        for samples in (TRAIN, DEV)
    )
    by_name = weights(TRAIN, DEV, tmp_path / "a")
    by_number = weights(train, dev, tmp_path / "b")
    assert all(torch.equal(tensor, by_number[name]) for name, tensor in by_name.items())
    tuned: Any
    tuned, _ = load_classifier(str(tmp_path / "b"))
    assert tuned.config.id2label == dict(enumerate(names))
    beyond = [*train, Sample("a film", "3")]
    with pytest.raises((DataError, VictimError), match="'3'"):
        weights(beyond, DEV, tmp_path / "c")


@pytest.mark.parametrize("adapter", [False, True])
def test_a_multi_label_victim_is_not_trained(
    adapter: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = tiny_victim("bert")
    model.config.problem_type = "multi_label_classification"
    save_classifier(model, tokenizer, tmp_path / "victim")
    if adapter:
        model, _ = load_classifier(str(tmp_path / "victim"))
        lora: Any = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS"))
        lora.save_pretrained(tmp_path / "adapter")
    victim = str(tmp_path / ("adapter" if adapter else "victim"))
    texts = tmp_path / "texts.csv"
    texts.write_text("text,label\none,LABEL_0|LABEL_2\ntwo,[]\n")
    asked = psim(
        *("finetune", "--victim", victim, "--out", tmp_path / "out"),
        *("--train", texts, "--dev", texts),
    )
    assert_refused(asked, "is a multi-label classifier, and psim trains only those")


def test_victims_that_nobody_should_load(base: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((base / "config.json").read_text())
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(VictimError, match="pickled weights"):
        load_classifier(str(pickled))
    (tmp_path / "empty").mkdir()
    with pytest.raises(VictimError, match="holds no model"):
        load_classifier(str(tmp_path / "empty"))
    with pytest.raises(VictimError, match="no such folder"):
        load_classifier(str(tmp_path / "nowhere"))
    with pytest.raises(VictimError, match="cannot be loaded"):
        load_classifier("nobody/nothing")


def test_a_victim_may_be_a_base_with_a_lora_adapter_as_peft_saves_it(
    base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, _ = load_classifier(str(base))
    lora = peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)
    adapted: Any = peft.get_peft_model(model, lora).eval()
    torch.nn.init.normal_(adapted.base_model.model.classifier.modules_to_save.default.weight)
    inputs = tokenizer(["good film"], return_tensors="pt")
    expected = adapted(**inputs).logits.detach()
    adapted.save_pretrained(tmp_path / "adapter")
    loaded, _ = load_classifier(str(tmp_path / "adapter"))
    assert not isinstance(loaded, peft.PeftModel)
    torch.testing.assert_close(loaded(**inputs).logits, expected)
    bundle = tmp_path / "bundle"
    config = PsimConfig(max_steps=10)
    fit(loaded, tokenizer, some_texts(160), bundle, name="x", frr_budget=0.05, config=config)
    engine = load_bundle(bundle, "float32").engine
    got = engine.classify(engine.encode(["good film"]))
    np.testing.assert_allclose(got, expected.softmax(-1).numpy(), atol=1e-6)


def test_an_adapter_may_have_classes_of_its_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Its head replaces that of a base which was trained for something else."""
    victim: Any = tiny_victim("bert")
    victim.config.id2label = {0: "entailment", 1: "neutral", 2: "contradiction"}
    save_classifier(victim, tokenizer, tmp_path / "base")
    model, _ = load_classifier(str(tmp_path / "base"))
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS"))
    adapted.save_pretrained(tmp_path / "adapter")
    victim.config.id2label = {0: "bad", 1: "good", 2: "so"}
    victim.config.save_pretrained(tmp_path / "adapter")
    loaded: Any
    loaded, _ = load_classifier(str(tmp_path / "adapter"))
    assert loaded.config.id2label == {0: "bad", 1: "good", 2: "so"}


def test_an_adapter_whose_head_is_nowhere_is_refused(
    base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any
    model, _ = load_classifier(str(base))
    headless = tmp_path / "headless"
    model.bert.save_pretrained(headless)
    tokenizer.save_pretrained(headless)
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS"))
    adapted.peft_config["default"].base_model_name_or_path = str(headless)
    adapted.save_pretrained(tmp_path / "adapter")
    load_classifier(str(tmp_path / "adapter"))  # PEFT keeps the head with it
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = {n: t for n, t in load_file(weights).items() if "classifier" not in n}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(VictimError, match=r"neither .* has weights for"):
        load_classifier(str(tmp_path / "adapter"))


def test_a_trained_victim_keeps_the_order_of_its_labels(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    victim = tiny_victim("bert")
    victim.config.id2label = {0: "so", 1: "good", 2: "bad"}
    victim.config.label2id = {"so": 0, "good": 1, "bad": 2}
    save_classifier(victim, tokenizer, tmp_path / "victim")
    model: Any
    model, _ = load_classifier(str(tmp_path / "victim"), ["bad", "good", "so"])
    assert model.config.id2label == {0: "so", 1: "good", 2: "bad"}
    with pytest.raises(VictimError, match=r"is a classifier for .'so', 'good', 'bad'"):
        load_classifier(str(tmp_path / "victim"), ["bad", "good"])


def test_a_decoder_s_score_does_not_depend_on_its_batch_mates(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A raw LLaMA has no padding token, and its config another idea of it than the tokenizer."""
    for index, pad_token_id in enumerate((None, 0)):
        victim = tiny_victim("llama")
        victim.config.pad_token_id = pad_token_id
        bare = copy.deepcopy(tokenizer)
        bare.pad_token, bare.eos_token = None, "[SEP]"
        folder = tmp_path / str(index)
        save_classifier(victim, bare, folder / "victim")
        model, loaded = load_classifier(str(folder / "victim"))
        config = PsimConfig(max_steps=10)
        fit(model, loaded, some_texts(160), folder / "b", name="x", frr_budget=0.05, config=config)
        engine = load_bundle(folder / "b", "float32").engine
        batch = engine.encode(["good film", "a good film that is quite long and very slow", "good"])
        readings = np.vstack([engine.screen([one]).readings for one in batch])
        np.testing.assert_allclose(engine.screen(batch).readings, readings, atol=1e-5)
        probabilities = np.vstack([engine.classify([one]) for one in batch])
        np.testing.assert_allclose(engine.classify(batch), probabilities, atol=1e-5)


def test_a_victim_with_prompts_is_not_tuned_further(base: Path, tmp_path: Path) -> None:
    prompted = tmp_path / "prompted"
    finetune_victim(str(base), TRAIN, DEV, Strategy.PROMPT_TUNING, prompted, epochs=1)
    with pytest.raises(VictimError, match="cannot be tuned further"):
        finetune_victim(str(prompted), TRAIN, DEV, Strategy.LORA, tmp_path / "again")


def test_a_victim_with_a_sentencepiece_vocabulary_only(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(some_texts(300)))
    options = "--model_type=unigram --vocab_size=60 --unk_id=3 --bos_id=1 --eos_id=2 --pad_id=0"
    sentencepiece.SentencePieceTrainer.train(
        f"--input={tmp_path / 'text.txt'} --model_prefix={tmp_path / 'spm'} {options}"
    )
    victim = tmp_path / "victim"
    victim.mkdir()
    tiny_victim("deberta-v2").save_pretrained(victim)
    (tmp_path / "spm.model").rename(victim / "spm.model")
    (victim / "tokenizer_config.json").write_text('{"tokenizer_class": "DebertaV2Tokenizer"}')
    model, tokenizer = load_classifier(str(victim))
    config = PsimConfig(max_steps=10)
    out = tmp_path / "bundle"
    fit(model, tokenizer, some_texts(160), out, name="x", frr_budget=0.05, config=config)
    assert load_bundle(out).engine.encode(["good film"])


def test_an_adapter_for_another_base_is_refused(
    base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    finetune_victim(str(base), TRAIN, DEV, Strategy.P_TUNING_V2, tmp_path / "v", epochs=1)
    save_classifier(tiny_victim("distilbert"), tokenizer, tmp_path / "other")
    shutil.rmtree(tmp_path / "v" / "base")
    (tmp_path / "other").rename(tmp_path / "v" / "base")
    with pytest.raises(VictimError):
        load_classifier(str(tmp_path / "v"))
