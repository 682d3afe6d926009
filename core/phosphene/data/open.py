"""``open_dataset``: a data set from files, a tensor, a torch or Hugging Face data set, or a bundled one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as _TorchDataset

from ..builtin.textures import PAINTINGS, TEXTURES
from ..errors import InputError, type_name
from ..images.decode import array_images
from ..images.paths import expand_path, local_path
from .annotations import CocoDataset, VocDataset, is_voc
from .bundled import PartSceneDataset, SceneDataset, TextureDataset
from .datasets import Dataset, TensorDataset
from .folders import FileDataset, FolderDataset
from .items import Transform
from .manifests import SEPARATORS, ManifestDataset
from .torch_datasets import TorchDataset

#: Suffixes of the files that list a data set: manifests, COCO annotations, lists of Pascal VOC.
DATASET_SUFFIXES = (*SEPARATORS, ".parquet", ".json", ".txt")

#: Digits of the largest bundled data set.
_MOST_DIGITS = 9


def open_dataset(value: object, transform: Transform, size: tuple[int, int]) -> Dataset:
    """A data set from whatever holds images.

    Args:
        value: a folder, a glob pattern, a list of files or images, a manifest (``.csv``, ``.tsv``,
            ``.parquet``), a COCO annotation file (``.json``), a Pascal VOC folder or a list of names in it
            (``.txt``), a tensor (N, C, H, W), an array (N, H, W, C), a map-style torch data set or a
            ``DataLoader``, a Hugging Face data set, ``builtin:scenes/1000``,
            ``builtin:part-scenes/100`` or ``builtin:textures/64``.
        transform: reads a file or a Pillow image as a tensor (C, H, W).
        size: (H, W) that bundled images are resized to.

    Raises:
        InputError: another type, a file that is no data set, or a bundled one that does not exist.
    """
    if isinstance(value, Dataset):
        return value
    if isinstance(value, Tensor):
        return TensorDataset(value)
    if isinstance(value, np.ndarray):
        return TensorDataset(array_images(value))
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        return _bundled(text, size) if text.startswith("builtin:") else _from_path(text, transform)
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(item, (str, os.PathLike)) for item in value):
            return FileDataset([path for item in value for path in expand_path(item)], transform)
        return TorchDataset(list(value), transform)
    if isinstance(value, Mapping) and not isinstance(value, _TorchDataset):
        splits = ", ".join(map(repr, value))
        raise InputError(f"a mapping is no data set: pass one of its splits, {splits}, by its name")
    if isinstance(value, DataLoader) or hasattr(value, "__getitem__") or isinstance(value, _TorchDataset):
        return TorchDataset(value, transform)
    raise InputError(
        "a data set is a folder, a manifest, a list of files, a tensor, a torch or Hugging Face data set, "
        f"or builtin:scenes, not {type_name(value)}"
    )


def _from_path(text: str, transform: Transform) -> Dataset:
    path: Any = local_path(text)
    suffix = path.suffix.lower()
    if path.is_dir():
        return VocDataset(path, transform) if is_voc(path) else FolderDataset(path, transform)
    if suffix in SEPARATORS or suffix == ".parquet":
        return ManifestDataset(path, transform)
    if suffix == ".json":
        return CocoDataset(path, transform)
    if suffix == ".txt":
        if path.is_file() and "ImageSets" in Path(path).resolve().parts[-3:-1]:
            return VocDataset(path, transform)
        raise InputError(f"{text!r} is no list of Pascal VOC (ImageSets/Main/val.txt); a manifest is a .csv")
    if not path.exists() and any(c in text for c in "*?["):
        return FileDataset(expand_path(path), transform)
    if path.is_file():
        raise InputError(
            f"{text!r} is a file: a data set is a folder, a manifest (.csv, .tsv, .parquet), "
            "a COCO annotation (.json) or a list of images"
        )
    return FolderDataset(path, transform)  # raises the error for a missing folder


def _bundled(uri: str, size: tuple[int, int]) -> Dataset:
    match = re.fullmatch(r"builtin:(biased-|part-)?(scenes|textures)(?:/0*([1-9]\d*))?", uri)
    if match is None or match[1] and match[2] == "textures":
        allowed = (
            "builtin:scenes, builtin:biased-scenes, builtin:part-scenes, builtin:textures, "
            "and builtin:scenes/1000"
        )
        if (name := uri.removeprefix("builtin:")) in (*TEXTURES, *PAINTINGS):
            kind = "painting" if name in PAINTINGS else "texture"
            raise InputError(
                f"{uri} is a bundled {kind}, which methods take as styles or texture; images are {allowed}"
            )
        raise InputError(f"no bundled data set {uri!r}; there are {allowed}")
    if len(match[3] or "") > _MOST_DIGITS:
        raise InputError(f"{uri!r:.60} is too large: at most {10**_MOST_DIGITS - 1:,} images")
    if match[2] == "textures":
        return TextureDataset(int(match[3] or 256), size=size)
    if match[1] == "part-":
        return PartSceneDataset(int(match[3] or 512), size=size)
    return SceneDataset(int(match[3] or 512), size=size, biased=match[1] == "biased-")
