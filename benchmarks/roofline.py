"""How near the guarded pass comes to what the processor can: achieved FLOP/s beside a GEMM's.

The peak is that of `torch.matmul` in the same dtype, on the same threads, in the same rounds.
"""

from collections.abc import Callable
from functools import partial

import torch
from guarded_pass import guarded, load_engine
from harness import Result, Setup, in_turn, pin
from tqdm import tqdm
from transformers import AutoConfig, PretrainedConfig

from models.bundle.verify import read_manifest
from models.engines.base import Encoding
from models.engines.pytorch import DTYPES

GEMMS, BATCH, LENGTHS = (512, 1024, 2048), 32, (16, 32, 128)


def trunk_flops(config: PretrainedConfig, rows: int, tokens: int, layers: int) -> float:
    """Return the multiplications and additions of `layers` layers over rows x tokens, padded.

    Per token and layer 2 (4 H² + 2 H I) in the matrices, and 4 T H in the attention: Kaplan et al.,
    Scaling Laws for Neural Language Models (2020), table 1, with H = d_model = d_attn, I = d_ff.
    """
    h, wide = int(config.hidden_size), int(config.intermediate_size)
    return rows * tokens * layers * (2 * (4 * h * h + 2 * h * wide) + 4 * tokens * h)


def guarded_flops(
    config: PretrainedConfig, rows: int, tokens: int, checkpoints: int, rank: int, watched: int
) -> float:
    """Return the operations of a guarded pass whose adapters are in the last layer.

    The trunk as above, and for each row the last layer as `models.network.last_layer` computes it,
    for N branches (the checkpoints, of which the first is the victim): a query, 2 H²; the key
    folded into the queries, 2 N H²; scores and attended states of A heads, 4 N A T H; values,
    output projection and feed-forward, N (4 H² + 4 H I); what the adapters add, 2 r (3 H + A H)
    each; pooler and classifier, N (2 H² + 2 H C). And M distances to C classes, M (2 H² + 3 C H).
    """
    h, wide = int(config.hidden_size), int(config.intermediate_size)
    heads, classes, n = (
        int(config.num_attention_heads),
        int(config.num_labels or 0),
        checkpoints,
    )
    tail = 2 * h * h + n * (2 * h * h + 4 * heads * tokens * h + 4 * h * h + 4 * h * wide)
    tail += (n - 1) * 2 * rank * (3 * h + heads * h) + n * (2 * h * h + 2 * h * classes)
    tail += watched * (2 * h * h + 3 * classes * h)
    return trunk_flops(config, rows, tokens, config.num_hidden_layers - 1) + rows * tail


def measure(setup: Setup) -> Result:
    """Return FLOP/s of square products and of guarded batches, by dtype and round."""
    pin(setup)
    manifest, _ = read_manifest(setup.bundle)
    config = AutoConfig.from_pretrained(setup.bundle / "victim")
    watched = len(manifest.activations.layers) if manifest.activations else 0
    rows = []
    for dtype in tqdm(setup.dtypes, desc="roofline"):
        engine = load_engine(setup, dtype)
        ways: dict[str, Callable[[], object]] = {}
        flops: dict[str, float] = {}
        for size in GEMMS:
            a, b = (torch.randn(size, size, dtype=DTYPES[dtype]) for _ in range(2))
            ways[f"GEMM {size}"], flops[f"GEMM {size}"] = partial(torch.matmul, a, b), 2.0 * size**3
        for tokens in LENGTHS:
            ids = tuple(torch.randint(1000, config.vocab_size, (tokens,)).tolist())
            batch = [Encoding(ids, truncated=False)] * BATCH
            name = f"guarded, {BATCH} x {tokens} tokens"
            ways[name] = partial(guarded, engine, batch)
            shape = len(manifest.psim.checkpoints), manifest.psim.rank, watched
            flops[name] = guarded_flops(config, BATCH, tokens, *shape)
        # A product takes milliseconds, and rounds cost nothing here.
        seconds = in_turn(ways, 1 if setup.quick else 5 * setup.rounds)
        rows += [
            {"dtype": dtype, "what": name, "gflops": [flops[name] / s / 1e9 for s in found]}
            for name, found in seconds.items()
        ]
    return {"engine": engine.name, "threads": setup.threads, "rows": rows}
