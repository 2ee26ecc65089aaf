"""Binary tensors of the Open Inference Protocol: after the JSON, or in a gRPC message."""

from collections.abc import Mapping
from typing import Any

SIZE = "binary_data_size"
LENGTH_BYTES = 4
"""Bytes of a text's length, which stands before it, little-endian."""


def texts_of(raw: bytes) -> list[str]:
    """Return the texts of a tensor of type BYTES.

    Raises:
        ValueError: a length is wrong, or a text is not UTF-8; the message quotes nothing.
    """
    texts: list[str] = []
    place = 0
    while place < len(raw):
        begin = place + LENGTH_BYTES
        place = begin + int.from_bytes(raw[place:begin], "little")
        if begin > len(raw) or place > len(raw):
            raise ValueError(f"text {len(texts)} (from 0) is longer than the binary data")
        texts.append(text_of(raw[begin:place], len(texts)))
    return texts


def text_of(raw: bytes, number: int) -> str:
    """Return a text.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"text {number} (from 0) is not UTF-8") from None


def with_binary(data: object, binary: bytes) -> object:
    """Return JSON with the data of those inputs that have it after the JSON, in their order.

    Raises:
        ValueError: sizes do not fit, or an input has data twice; the message quotes nothing.
    """
    inputs = data.get("inputs") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(inputs, list):
        return data
    found, place = [], 0
    for tensor in inputs:
        size = _size(tensor)
        if size is not None:
            tensor = _filled(tensor, binary[place : place + size])
            place += size
        found.append(tensor)
    if place != len(binary):
        raise ValueError(f"{len(binary)} bytes after the JSON, where inputs name {place}")
    return data | {"inputs": found}


def _size(tensor: object) -> int | None:
    """Return how many bytes a tensor has after the JSON; None if its data is in the JSON."""
    parameters = tensor.get("parameters") if isinstance(tensor, dict) else None
    if not isinstance(parameters, dict) or SIZE not in parameters:
        return None
    size = parameters[SIZE]
    if type(size) is not int or size < 0:
        raise ValueError(f"{SIZE} must be a number of bytes")
    return size


def _filled(tensor: Mapping[str, Any], raw: bytes) -> dict[str, Any]:
    if "data" in tensor:
        raise ValueError(f"an input has both data and {SIZE}")
    parameters = {name: value for name, value in tensor["parameters"].items() if name != SIZE}
    return {**tensor, "parameters": parameters, "data": texts_of(raw)}
