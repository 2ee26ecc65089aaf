"""Where files of the repository are."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PEERS = Path(__file__).parent / "peers"
"""Scripts that run in the environments of peers."""
