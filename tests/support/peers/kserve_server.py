"""KServe's model server with a transformers pipeline; runs in KServe's own environment.

python tests/support/peers/kserve_server.py VICTIM TOKENIZER PORT
"""

import sys
from typing import Any

from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from transformers import pipeline


class Classifier(Model):  # type: ignore[misc]
    """Label and probabilities of each text."""

    def __init__(self, victim: str, tokenizer: str) -> None:
        super().__init__("demo")
        self.run: Any = pipeline(
            "text-classification", model=victim, tokenizer=tokenizer, top_k=None
        )
        config: Any = self.run.model.config
        self.labels = [*config.id2label.values()]
        self.ready = True

    async def predict(
        self, payload: InferRequest, headers: Any = None, response_headers: Any = None
    ) -> InferResponse:
        """Answer an inference request."""
        texts = [row[0] if isinstance(row, list) else row for row in payload.inputs[0].data]
        found = self.run(texts)
        rows = [{one["label"]: one["score"] for one in row} for row in found]
        label = InferOutput("label", [len(texts)], "BYTES", [row[0]["label"] for row in found])
        data = [row[name] for row in rows for name in self.labels]
        scores = InferOutput("scores", [len(texts), len(self.labels)], "FP32", data)
        return InferResponse(payload.id or "", self.name, [label, scores])


if __name__ == "__main__":
    victim, tokenizer, port = sys.argv[1:]
    server = ModelServer(http_port=int(port), enable_grpc=False, workers=1)
    server.start([Classifier(victim, tokenizer)])
