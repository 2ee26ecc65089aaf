"""The tokenizer of a bundle."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checked copy of a bundle; no code of the bundle is run."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        path / "tokenizer", trust_remote_code=False, local_files_only=True
    )
    return tokenizer
