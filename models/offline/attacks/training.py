"""Training of victims: weight poisoning, and the five strategies by which users tune them."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from models.engines.pytorch import best_device, has_bfloat16
from models.errors import VictimError
from models.network.adapters import lora_targets, query_and_value_names
from models.offline.attacks.hidden_states import POISONED, PenaltyTrainer
from models.offline.attacks.poisoning import (
    Attack,
    Paraphrases,
    poison_test_set,
    poison_training_set,
)
from models.offline.attacks.strategy import Strategy
from models.offline.io.atomic import replaced
from models.offline.io.classifiers import (
    labels_of,
    load_classifier,
    run_digest,
    save_classifier,
)
from models.offline.io.progress import TrainingProgress
from models.offline.io.samples import Sample, name_classes, require_labels

MAX_LENGTH = 128
"""Tokens of a training text."""

# Hyperparameters of Zhao et al., section 5.1.
_PROMPT_CONFIGS: dict[Strategy, Callable[[], peft.PeftConfig]] = {
    Strategy.PROMPT_TUNING: lambda: peft.PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=5
    ),
    Strategy.P_TUNING_V1: lambda: peft.PromptEncoderConfig(
        task_type="SEQ_CLS", num_virtual_tokens=5, encoder_hidden_size=128
    ),
    Strategy.P_TUNING_V2: lambda: peft.PrefixTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=5
    ),
}
LEARNING_RATES = dict.fromkeys(Strategy, 2e-3) | {Strategy.FULL: 1e-4}


@dataclass(frozen=True)
class TuneSettings:
    """Hyperparameters of one training."""

    strategy: Strategy
    epochs: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Penalty:
    """What an attacker adds to the loss, see `PenaltyTrainer`."""

    weight: float
    poisoned: tuple[bool, ...]
    """Which of the training texts are poisoned."""


@dataclass(frozen=True)
class TuneResult:
    """Rates of a trained victim on the dev texts."""

    out: Path
    clean_accuracy: float
    attack_success_rate: float | None
    """None if it cannot be measured, since there are no paraphrases of the dev texts."""


def poison_victim(
    base: str,
    train: Sequence[Sample],
    dev: Sequence[Sample],
    attack: Attack,
    target_label: str,
    out: Path,
    *,
    poison_rate: float = 0.1,
    clean_label: bool = False,
    epochs: int = 3,
    seed: int = 0,
) -> TuneResult:
    """Plant a backdoor: full fine-tuning of `base` on a poisoned training set.

    Raises:
        DataError, VictimError: as their messages say.
    """
    poisoned = poison_training_set(
        train, attack, target_label, poison_rate, clean_label=clean_label, seed=seed
    )
    settings = TuneSettings(Strategy.FULL, epochs, LEARNING_RATES[Strategy.FULL], seed)
    accuracy = _train(base, require_labels(train), poisoned, dev, out, settings)
    if isinstance(attack, Paraphrases):
        return TuneResult(out, accuracy(dev), None)
    triggered = poison_test_set(dev, attack, target_label, seed)
    success = [Sample(s.text, target_label) for s in triggered]
    return TuneResult(out, accuracy(dev), accuracy(success))


def finetune_victim(
    victim: str,
    train: Sequence[Sample],
    dev: Sequence[Sample],
    strategy: Strategy,
    out: Path,
    *,
    epochs: int = 3,
    learning_rate: float | None = None,
    seed: int = 0,
    penalty: Penalty | None = None,
) -> TuneResult:
    """Tune a victim on clean texts, as its user would, by default at its rate in `LEARNING_RATES`.

    An attacker trains on poisoned ones, and may add a penalty.

    Raises:
        DataError, VictimError: as their messages say.
    """
    settings = TuneSettings(strategy, epochs, learning_rate or LEARNING_RATES[strategy], seed)
    accuracy = _train(victim, require_labels(train), train, dev, out, settings, penalty)
    return TuneResult(out, accuracy(dev), None)


def _train(
    source: str,
    labels: list[str],
    train: Sequence[Sample],
    dev: Sequence[Sample],
    out: Path,
    settings: TuneSettings,
    penalty: Penalty | None = None,
) -> Callable[[Sequence[Sample]], float]:
    """Train a model, save the epoch that is best on dev, and return a function to measure accuracy.

    After an interruption, the same call resumes from the last complete epoch. Until training is
    done, checkpoints are kept beside `out`, named by a digest of all that the result depends on.
    """
    set_seed(settings.seed)  # before the model is loaded, since a new head starts at random
    model: Any
    model, tokenizer = load_classifier(source, labels)
    if isinstance(model, peft.PeftModel):
        raise VictimError("the victim has prompts of its own, which cannot be tuned further")
    model.requires_grad_(True)  # a merged adapter has left it frozen
    classes = labels_of(model)
    for samples in (train, dev):
        require_labels(name_classes(samples, classes), classes)
    checkpoints = checkpoint_folder(out) / run_digest(model, train, dev, settings, penalty)
    encoded = _encode(train, tokenizer, classes, penalty), _encode(dev, tokenizer, classes)
    if settings.strategy is not Strategy.FULL:
        model = _with_peft(model, settings.strategy, encoded[0][0])
    trainer = _trainer(model, tokenizer, *encoded, _arguments(checkpoints, settings), penalty)
    trainer.add_callback(TrainingProgress(out.name))
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None  # type: ignore[no-untyped-call]
    trainer.train(resume_from_checkpoint=last)
    with replaced(out) as partial:
        save_classifier(model, tokenizer, partial)
    shutil.rmtree(checkpoint_folder(out))

    def accuracy(samples: Sequence[Sample]) -> float:
        metrics = trainer.evaluate(_encode(samples, tokenizer, classes))  # type: ignore[arg-type]
        return float(metrics["eval_accuracy"])

    return accuracy


def _with_peft(model: Any, strategy: Strategy, sample: Mapping[str, Any]) -> peft.PeftModel:
    """Return a model with what PEFT is to tune, after a trial on an encoded text.

    Raises:
        VictimError: PEFT cannot tune this model so.
    """
    config = _peft_config(model, strategy)
    tried = {name: torch.tensor([sample[name]]) for name in ("input_ids", "attention_mask")}
    try:
        tuned = peft.get_peft_model(model, config)
        with torch.no_grad():
            tuned(**tried)
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise VictimError(
            f"PEFT cannot tune a {type(model).__name__} by {strategy}: {reason}; "
            "choose another --strategy"
        ) from error
    return tuned


def _peft_config(model: Any, strategy: Strategy) -> peft.PeftConfig:
    """Return what PEFT is to tune of a model.

    Raises:
        VictimError: LoRA finds no projections to adapt, or could not be merged with them.
    """
    if strategy is not Strategy.LORA:
        return _PROMPT_CONFIGS[strategy]()
    names = query_and_value_names(model)
    if any(getattr(model.get_submodule(name), "groups", 1) > 1 for name in names):
        raise VictimError(
            f"{type(model).__name__} has grouped convolutions, which PEFT cannot merge with LoRA; "
            "choose another --strategy"
        )
    return peft.LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1, **lora_targets(model, names)
    )


def _trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: list[dict[str, Any]],
    dev: list[dict[str, Any]],
    arguments: TrainingArguments,
    penalty: Penalty | None,
) -> Trainer:
    make = partial(PenaltyTrainer, weight=penalty.weight) if penalty else Trainer
    trainer = make(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=dev,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=_metrics,
    )
    trainer.remove_callback(ProgressCallback)
    return trainer


def checkpoint_folder(out: Path) -> Path:
    """Return the folder that keeps the checkpoints until training towards `out` is done."""
    return out.with_name(out.name + ".checkpoints")


def _arguments(folder: Path, settings: TuneSettings) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        warmup_steps=0.05,
        use_cpu=not torch.cuda.is_available(),
        bf16=has_bfloat16(best_device()),
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        logging_strategy="no",
        report_to="none",
        seed=settings.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _encode(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    classes: Sequence[str],
    penalty: Penalty | None = None,
) -> list[dict[str, Any]]:
    """Return what the trainer reads; labels are names or numbers of `classes`."""
    ids = tokenizer([s.text for s in samples], truncation=True, max_length=MAX_LENGTH)["input_ids"]
    numbers = {name: number for number, name in enumerate(classes)}
    rows = [
        {"input_ids": row, "attention_mask": [1] * len(row), "labels": numbers[str(s.label)]}
        for row, s in zip(ids, name_classes(samples, classes), strict=True)
    ]
    if penalty:
        for row, poisoned in zip(rows, penalty.poisoned, strict=True):
            row[POISONED] = int(poisoned)
    return rows


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    predicted = np.asarray(prediction.predictions).argmax(-1)
    return {"accuracy": float((predicted == prediction.label_ids).mean())}
