"""Saving results: JSON and safetensors in a folder that is written atomically."""

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
    """Raise InputError where no result can be saved: a file, the working directory, a folder in use."""
    folder = Path(folder).resolve()
    for path in (folder, *folder.parents):
        if path.is_file():
            raise InputError(f"{path} is a file; results are saved in a folder")
    if folder == Path.cwd():
        raise InputError(f"{folder} is the working directory; choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "result.json").is_file():
        raise InputError(f"{folder} contains files other than a result; choose an empty or a new folder")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` to write into, which replaces it at the end."""
    check_output_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # One hidden folder for the new files, and for an earlier result, which is deleted with it.
    with tempfile.TemporaryDirectory(prefix=".phosphene-", dir=folder.parent) as hidden:
        new, old = Path(hidden, "new"), Path(hidden, "old")
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:  # also after an interruption, the earlier result must not be lost
            if old.exists():
                old.rename(folder)
            raise


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
