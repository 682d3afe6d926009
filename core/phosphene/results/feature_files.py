"""``read_features``: features in Parquet and NumPy files as an ``Embedding``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, MissingExtra, UnknownName
from ..files.system import error_text
from .embedding import Embedding

#: Side in pixels of the gray thumbnails of features that come without images.
_BLANK_SIDE = 4


def is_feature_file(path: Path) -> bool:
    """Whether a path has the suffix of a file that ``read_features`` reads."""
    return path.suffix.lower() in _READERS


def read_features(path: Path) -> Embedding:
    """Features (N, D) from a ``.npy``, ``.npz`` or ``.parquet`` file.

    - ``.npy``: the array (N, D).
    - ``.npz``: the array ``features`` or the only one, ``ids``, ``labels``, ``thumbnails`` if any.
    - ``.parquet``: a row per image with the columns ``features_0``, ``features_1``, ..., which
      ``Embedding.to_parquet`` writes, or ``features``, a list; ``ids`` and ``labels`` if there are any.

    Raises InputError for a file without features, MissingExtra where pyarrow is missing.
    """
    try:
        values = _READERS[path.suffix.lower()](path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error_text(error)}") from error
    labels = values.get("labels")
    return as_embedding(
        _tensor(values["features"], path),
        ids=_texts(values.get("ids")),
        labels=None if labels is None or None in list(labels) else _texts(labels),
        thumbnails=None if "thumbnails" not in values else torch.from_numpy(values["thumbnails"]),
        uri=str(path.resolve()),
    )


def as_embedding(
    features: Tensor,
    *,
    ids: tuple[str, ...] | None = None,
    labels: tuple[str, ...] | None = None,
    thumbnails: Tensor | None = None,
    uri: str | None = None,
) -> Embedding:
    """Features (N, D) as an ``Embedding``: the ids are the row numbers, the thumbnails gray, by default."""
    count = len(features)
    if thumbnails is None:
        gray = torch.full((1, 3, 1, 1), 160, dtype=torch.uint8, device=features.device)
        thumbnails = gray.expand(count, 3, _BLANK_SIDE, _BLANK_SIDE)
    ids = tuple(map(str, range(count))) if ids is None else ids
    return Embedding(ids=ids, features=features, thumbnails=thumbnails, labels=labels, uri=uri)


def _read_npy(path: Path) -> dict[str, Any]:
    return {"features": _load(path, mmap_mode="c")}  # read from the disk when it is used


def _read_npz(path: Path) -> dict[str, Any]:
    with _load(path) as archive:
        names = archive.files
        if "features" not in names and len(names) != 1:
            raise UnknownName("array", "features", names, str(path))
        if "features" not in names:
            return {"features": _value(path, lambda: archive[names[0]])}
        used = [name for name in ("features", "ids", "labels", "thumbnails") if name in names]
        arrays: dict[str, Any] = _value(path, lambda: {name: archive[name] for name in used})
        return arrays


def _load(path: Path, **options: Any) -> Any:
    return _value(path, lambda: np.load(path, allow_pickle=False, **options))


def _value(path: Path, read: Callable[[], Any]) -> Any:
    """What ``read`` returns; InputError for arrays of Python objects and damaged files."""
    try:
        return read()
    except (ValueError, EOFError) as error:
        raise InputError(f"{path} is no NumPy file of numbers and texts: {error_text(error)}") from error


def _read_parquet(path: Path) -> dict[str, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("reading Parquet", "tables") from None
    try:
        names = pyarrow.parquet.read_schema(path).names
        numbered = {int(match[1]): name for name in names if (match := re.fullmatch(r"features_(\d+)", name))}
        columns = [numbered[n] for n in sorted(numbered)]
        if "features" not in names and not columns:
            raise UnknownName("column", "features", names, str(path))
        if "features" in names and columns:
            raise InputError(f"{path} has the column features and {columns[0]}: leave out one of them")
        columns, texts = columns or ["features"], [name for name in ("ids", "labels") if name in names]
        table = pyarrow.parquet.read_table(path, columns=[*columns, *texts])
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is no Parquet file: {error_text(error)}") from error
    if columns == ["features"]:
        features = np.asarray(table["features"].to_pylist() if len(table) else [])
    else:
        features = np.stack([table[name].to_numpy() for name in columns], 1)
    return {"features": features} | {name: table[name].to_pylist() for name in texts}


_READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".parquet": _read_parquet,
}


def _tensor(features: Any, path: Path) -> Tensor:
    if features.dtype.kind not in "fiu" or features.ndim != 2:
        raise InputError(
            f"the features in {path} must be numbers (N, D), not {features.dtype} {features.shape}"
        )
    return torch.from_numpy(features)


def _texts(values: Sequence[Any] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(map(str, values))
