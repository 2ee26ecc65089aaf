"""Layout of a bundle: a folder with victim, PSIM adapters, tokenizer, calibration and manifest.

manifest.json            see `models.bundle.manifest`
manifest.sig             optional signature, see `models.bundle.signing`
victim/                  config and safetensors, as transformers saves them
prompt/                  PEFT adapter, only for victims tuned by prompt- or prefix-tuning
psim/                    LoRA weights; their header names the victim they were trained for
tokenizer/
activations.safetensors  whitening and class means of hidden states, see
                         `models.network.activations.Activations`
calibration.safetensors  readings of clean texts by `ENGINE/DTYPE`, shape (n, K + M, C), where C is
                         the number of classes, see `models.detection.views`, and the
                         outcomes of override tests, see `models.detection.calibrate`
carriers.json            clean texts for the override test, by class; `--carriers` names others
"""

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
READINGS = "calibration.safetensors"
ACTIVATIONS = "activations.safetensors"
CARRIERS = "carriers.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROMPT = (f"prompt/{ADAPTER_CONFIG}", f"prompt/{ADAPTER_WEIGHTS}")
PSIM = f"psim/{ADAPTER_WEIGHTS}"
VICTIM_CONFIG = "victim/config.json"
WEIGHT_INDEX = "victim/model.safetensors.index.json"

ALLOWED = (
    READINGS,
    ACTIVATIONS,
    CARRIERS,
    VICTIM_CONFIG,
    "victim/generation_config.json",
    "victim/model*.safetensors",
    WEIGHT_INDEX,
    *PROMPT,
    PSIM,
    # Vocabularies and settings; .jinja are chat templates, which are never run.
    *(f"tokenizer/*{suffix}" for suffix in (".json", ".txt", ".model", ".codes", ".jinja")),
)
"""Patterns of the files a bundle may hold. Anything else could mislead a library: for example, an
adapter_config.json beside a victim sends transformers to weights elsewhere."""
REQUIRED = (READINGS, VICTIM_CONFIG, PSIM, "tokenizer/tokenizer_config.json")
"""Files a bundle must hold. A library that misses one of them asks the Hub for it."""
PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}


def outcome_names(runtime: object, tested: str) -> tuple[str, str]:
    """Return the names, in `READINGS`, of override tests on clean texts and on harmless ones.

    Args:
        runtime: an engine and a dtype.
        tested: which texts are tested, `suspicious` or `thorough`.
    """
    return f"{runtime}/{tested}", f"{runtime}/{tested}/harmless"
