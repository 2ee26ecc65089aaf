"""LitServe with a transformers pipeline; runs in LitServe's own environment.

python benchmarks/peers/litserve_server.py VICTIM DTYPE PORT THREADS
"""

import sys
from typing import Any

import litserve
import torch
from transformers import pipeline


class Classifier(litserve.LitAPI):  # type: ignore[misc]
    """Batches of what comes within a hundredth of a second, LitServe's own example."""

    def __init__(self, victim: str, dtype: str, threads: int) -> None:
        super().__init__(max_batch_size=32, batch_timeout=0.01, api_path="/classify")
        self.victim, self.dtype, self.threads = victim, dtype, threads

    def setup(self, device: str) -> None:
        """Load the model, in the worker."""
        torch.set_num_threads(self.threads)
        dtype = getattr(torch, self.dtype)
        self.classifier: Any = pipeline(
            "text-classification", model=self.victim, dtype=dtype, device="cpu", top_k=None
        )

    def decode_request(self, request: dict[str, str]) -> str:
        """Return the text of a request."""
        return request["inputs"]

    def predict(self, texts: list[str]) -> Any:
        """Classify a batch."""
        return self.classifier(texts, batch_size=len(texts), truncation=True)

    def encode_response(self, output: Any) -> dict[str, Any]:
        """Return the answer to one request."""
        return {"scores": output}


if __name__ == "__main__":
    victim, dtype, port, threads = sys.argv[1:]
    server = litserve.LitServer(Classifier(victim, dtype, int(threads)), accelerator="cpu")
    server.run(port=int(port), num_api_servers=1, generate_client_file=False, log_level="warning")
