"""How the cost grows: guarded beside bare, over text length, model size and batch size.

Models are MiniLM-wide BERTs by config, with random weights, adapters and distances: what they cost
does not depend on what they know. Run by PyTorch, whatever the service's engine is.
"""

from collections.abc import Callable
from functools import partial

import torch
from guarded_pass import bare, guarded
from harness import Result, Setup, in_turn, pin
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
)

from models.engines.base import Encoding
from models.engines.pytorch import DTYPES, TorchEngine
from models.network.activations import Activations
from models.network.adapters import lora_config
from models.network.guarded import Guarded, guard

LAYERS, LENGTHS, BATCHES = (6, 12, 24), (16, 64, 128, 256, 512), (1, 8, 32)
MOST_TOKENS = 4096
"""In a batch: the service's default budget, so that it never runs larger ones."""
CHECKPOINTS = 6


def config(layers: int) -> BertConfig:
    """Return the config of a BERT as wide as MiniLM."""
    return BertConfig(
        hidden_size=384, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=1536
    )


def random_guarded(model: PreTrainedModel) -> Guarded:
    """Return a model with six checkpoints on the last layer, and random distances.

    As in a bundle, the first checkpoint is the model itself.
    """
    module = guard(model, lora_config(model, 1), CHECKPOINTS)
    first, *_ = module.checkpoints
    for name, weights in module.psim.named_parameters():
        if ".lora_B." in name and f".{first}." not in name:
            nn.init.normal_(weights, std=0.02)
    module.reuse_untrained()
    watched, size = len(module.trunk.watched), module.hidden_size
    means = torch.randn(watched, int(model.config.num_labels or 0), size)
    module.activations = Activations(torch.eye(size).repeat(watched, 1, 1), means)
    return module


def guarded_engine(setup: Setup, layers: int, dtype: str) -> TorchEngine:
    """Return an engine of random weights."""
    module = random_guarded(BertForSequenceClassification(config(layers)))
    tokenizer = AutoTokenizer.from_pretrained(setup.bundle / "tokenizer")
    return TorchEngine(module, tokenizer, max(LENGTHS), dtype)


def measure(setup: Setup) -> Result:
    """Return seconds per batch of guarded and of bare, by layers, length, batch and round."""
    pin(setup)
    dtype, rows = setup.dtypes[-1], []
    grid = [(n, size) for n in LENGTHS for size in BATCHES if n * size <= MOST_TOKENS]
    if setup.quick:
        grid = grid[: len(BATCHES)]
    for layers in LAYERS[:1] if setup.quick else LAYERS:
        engine = guarded_engine(setup, layers, dtype)
        model = BertForSequenceClassification(config(layers)).to(DTYPES[dtype])  # type: ignore[arg-type]
        unguarded = bare(model)
        for length, size in tqdm(grid, desc=f"growth, {layers} layers"):
            batch = [Encoding(tuple(range(1000, 1000 + length)), truncated=False)] * size
            ways: dict[str, Callable[[], object]] = {
                "guarded": partial(guarded, engine, batch),
                "bare": partial(unguarded, batch),
            }
            rows += [
                {"layers": layers, "tokens": length, "batch": size, "way": way, "seconds": found}
                for way, found in in_turn(ways, setup.rounds).items()
            ]
    return {"dtype": dtype, "threads": setup.threads, "rows": rows}
