"""Saving results: JSON and safetensors in a folder that appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

FORMAT = 1


def check_output_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that a result cannot be saved in: a file, one with other things, one in use."""
    folder = Path(folder).resolve()
    for place in (folder, *folder.parents):
        if place.is_file():
            raise InputError(f"{place} is a file; results are saved in a folder")
    if folder == Path.cwd():
        raise InputError(f"{folder} is the folder you work in; choose another")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "result.json").is_file():
        raise InputError(f"{folder} holds other things than a result; choose an empty or a new folder")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling of ``folder`` to write into, which takes its place at the end."""
    check_output_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Everything is written inside one hidden folder, and an earlier result moves in there to be deleted.
    with tempfile.TemporaryDirectory(prefix=".phosphene-", dir=folder.parent) as hidden:
        new, old = Path(hidden, "new"), Path(hidden, "old")
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:  # an interruption, too, must not cost the earlier result
            if old.exists():
                old.rename(folder)
            raise


def encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON holds it; tensors go aside, each a copy, for safetensors refuses shared memory."""
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
