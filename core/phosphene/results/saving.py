"""The values of a result as JSON and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = 1


def encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON, its tensors added to ``tensors``: copies, since safetensors refuses shared memory."""
    match value:
        case Tensor():
            tensors[key] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            return {"$tensor": key}
        case nn.Module():
            encode(value.state_dict(), key, tensors)
            return {"$network": key}
        case tuple() | list():
            return [encode(v, f"{key}.{i}", tensors) for i, v in enumerate(value)]
        case Mapping():
            return {str(k): encode(v, f"{key}.{k}", tensors) for k, v in value.items()}
    return value


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that ``encode`` wrote; lists come back as tuples, networks as their tensors by name."""
    match value:
        case {"$tensor": key}:
            return tensors[key]
        case {"$network": key}:
            return {n.removeprefix(f"{key}."): t for n, t in tensors.items() if n.startswith(f"{key}.")}
        case dict():
            return {k: decode(v, tensors) for k, v in value.items()}
        case list():
            return tuple(decode(v, tensors) for v in value)
    return value
