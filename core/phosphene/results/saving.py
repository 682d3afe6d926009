"""The values of a result as JSON and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

FORMAT = 1


def encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON, its tensors added to ``tensors``.

    Only tensors that share memory with another are copied, since safetensors refuses them: the features of a
    large data set are in a file, which is not read into memory.
    """
    match value:
        case Tensor():
            tensor = value.detach().cpu().contiguous()
            storage = tensor.untyped_storage()
            memory = {other.untyped_storage().data_ptr() for other in tensors.values()}
            is_shared = storage.data_ptr() in memory or storage.nbytes() != tensor.nbytes
            tensors[key] = tensor.clone() if is_shared else tensor
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
