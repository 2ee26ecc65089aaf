"""LitServe with a transformers pipeline, as an endpoint of Hugging Face's; in its own environment.

python tests/support/peers/litserve_endpoint.py VICTIM TOKENIZER PORT
"""

import sys
from typing import Any

import litserve
from transformers import pipeline


class Classifier(litserve.LitAPI):  # type: ignore[misc]
    """Predictions for a text or a list."""

    def __init__(self, victim: str, tokenizer: str) -> None:
        super().__init__(api_path="/classify")
        self.victim, self.tokenizer = victim, tokenizer

    def setup(self, device: str) -> None:
        """Load the model, in the worker."""
        self.run: Any = pipeline(
            "text-classification", model=self.victim, tokenizer=self.tokenizer, device="cpu"
        )

    def predict(self, request: dict[str, Any]) -> Any:
        """Answer a request."""
        inputs = request["inputs"]
        found = self.run(inputs, **{"top_k": None} | request.get("parameters", {}))
        return [found] if isinstance(inputs, str) else found


if __name__ == "__main__":
    victim, tokenizer, port = sys.argv[1:]
    server = litserve.LitServer(Classifier(victim, tokenizer), accelerator="cpu")
    server.run(port=int(port), host="127.0.0.1", num_api_servers=1, generate_client_file=False)
