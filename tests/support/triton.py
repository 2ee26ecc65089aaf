"""Triton's own client."""

from typing import Any

import numpy as np
import tritonclient.http as triton


def client_for(url: Any) -> triton.InferenceServerClient:
    """Return a client of a server, given its URL."""
    return triton.InferenceServerClient(str(url).removeprefix("http://").rstrip("/"))


def tensor(*texts: str) -> triton.InferInput:
    """Return texts as an input of a model."""
    found = triton.InferInput("text", [len(texts)], "BYTES")
    return found.set_data_from_numpy(np.array(texts, dtype=object), binary_data=False)
