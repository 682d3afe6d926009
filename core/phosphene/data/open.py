"""``open_dataset``: a data set from a folder, a tensor or the name of a bundled one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..errors import InputError
from .bundled import SceneDataset, TextureDataset
from .datasets import Dataset, TensorDataset
from .folders import FolderDataset

#: Digits of the largest bundled data set.
_MOST_DIGITS = 9


def open_dataset(value: object, transform: Callable[[Path], Tensor], size: tuple[int, int]) -> Dataset:
    """A data set from a folder, a tensor, or a bundled one: ``builtin:scenes/1000``, ``builtin:textures/64``.

    ``transform`` reads the files of a folder; ``size`` (H, W) is what bundled images are resized to.
    Raises InputError for another type and for a bundled data set that does not exist.
    """
    if isinstance(value, Dataset):
        return value
    if isinstance(value, Tensor):
        return TensorDataset(value)
    if not isinstance(value, (str, Path)):
        raise InputError(f"a data set is a folder, builtin:scenes or a tensor, not a {type(value).__name__}")
    if not str(value).startswith("builtin:"):
        return FolderDataset(value, transform)
    match = re.fullmatch(r"builtin:(biased-)?(scenes|textures)(?:/0*([1-9]\d*))?", str(value))
    if match is None or match[1] and match[2] == "textures":
        allowed = "builtin:scenes, builtin:biased-scenes, builtin:textures, and builtin:scenes/1000"
        raise InputError(f"no bundled data set {value!r}; there are {allowed}")
    if len(match[3] or "") > _MOST_DIGITS:
        raise InputError(f"{str(value)!r:.60} is too large: at most {10**_MOST_DIGITS - 1:,} images")
    if match[2] == "textures":
        return TextureDataset(int(match[3] or 256), size=size)
    return SceneDataset(int(match[3] or 512), size=size, biased=match[1] is not None)
