"""``open_dataset``: a data set from a path, a URI, a tensor or a list of paths."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..errors import InputError
from .bundled import SceneDataset, TextureDataset
from .datasets import Dataset, TensorDataset
from .folders import FolderDataset


def open_dataset(value: object, transform: Callable[[Path], Tensor], size: tuple[int, int]) -> Dataset:
    """A data set from a folder, ``builtin:scenes/1000``, ``builtin:textures/64`` or a tensor."""
    if isinstance(value, Dataset):
        return value
    if isinstance(value, Tensor):
        return TensorDataset(value)
    if not isinstance(value, (str, Path)):
        raise InputError(f"a data set is a folder, builtin:scenes or a tensor, not a {type(value).__name__}")
    if not str(value).startswith("builtin:"):
        return FolderDataset(value, transform)
    told = re.fullmatch(r"builtin:(biased-)?(scenes|textures)(?:/0*([1-9]\d*))?", str(value))
    if told is None or told[1] and told[2] == "textures":
        known = "builtin:scenes, builtin:biased-scenes, builtin:textures, and builtin:scenes/1000"
        raise InputError(f"no bundled data set {value!r}; there are {known}")
    if told[2] == "textures":
        return TextureDataset(int(told[3] or 256), size=size)
    return SceneDataset(int(told[3] or 512), size=size, biased=told[1] is not None)
