"""``Rows`` and ``LabelRows``: one row per image of a data set, in memory or in a file that only grows."""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .files.system import error_text, sync


class Rows:
    """A row per image of a data set: the tensor (N, ...) of which a fold computes a batch of rows at a time.

    Rows are written by the index of their image, so merging does not depend on the order, and rows that are
    written twice are the same. They are on the CPU. Inside ``run(..., out=folder)`` the rows of completed
    shards are in a file, each written once, and ``tensor`` maps that file into memory.

    Example::

        rows = Rows()
        rows.write(batch.indices[0], features)
        rows.tensor()  # (N, D)
    """

    def __init__(self) -> None:
        self.chunks: dict[int, Tensor] = {}
        self._file: Path | None = None
        self._shape: tuple[int, ...] = ()
        self._dtype: torch.dtype | None = None
        self._count = 0
        self._on_failure: Callable[[OSError], None] | None = None

    def write(self, first: int, rows: Tensor) -> None:
        """Set the rows (n, ...) of the images ``first``, ``first + 1``, ..."""
        self.chunks[first] = rows.detach().cpu()

    def merge(self, other: Rows) -> Rows:
        """The rows of both. Where this one has a file, the other's are written to it."""
        if self._file is None:
            merged = type(self)()
            merged.chunks = self.chunks | other.chunks
            return merged
        try:
            for first, rows in sorted(other.chunks.items()):
                self._append(first, rows)
        except OSError as error:  # such as a full disk: a checkpoint is a help, the work goes on in memory
            self.chunks, self._file = {0: self.tensor()} if self._count else {}, None
            if self._on_failure is not None:
                self._on_failure(error)
            return self.merge(other)
        return self

    def tensor(self) -> Tensor:
        """All rows (N, ...) in the order of the images; (0,) without any."""
        chunks = [self.chunks[first] for first in sorted(self.chunks)]
        if self._file is not None and self._count:
            chunks.insert(0, self._mapped())
        return torch.cat(chunks) if len(chunks) > 1 else chunks[0] if chunks else torch.empty(0)

    def to_file(self, file: Path, on_failure: Callable[[OSError], None]) -> None:
        """Store rows that are merged from now on in a file; if that fails later, they stay in memory."""
        if os.path.lexists(file) and not _is_regular(file):
            raise FileExistsError(errno.EEXIST, "it is not a file", str(file))
        file.open("wb").close()
        self._file, self._on_failure = file, on_failure

    def sync(self) -> None:
        """Flush the file to the disk."""
        if self._file is not None:
            sync(self._file)

    def record(self) -> dict[str, Any]:
        """What JSON holds of them: the file, or the first index of every chunk in memory."""
        record: dict[str, Any] = {"chunks": list(self.chunks)}
        if self._file is not None:
            dtype = str(self._dtype).removeprefix("torch.")
            record |= {"file": self._file.name, "shape": self._shape, "dtype": dtype, "count": self._count}
        return record

    def restore(
        self,
        record: Mapping[str, Any],
        chunks: Sequence[Tensor],
        folder: Path | None,
        on_failure: Callable[[OSError], None],
    ) -> None:
        """Set them to those of a ``record`` with its chunks; its file is in ``folder``, as of ``to_file``.

        Raises InputError for a record without its file, see ``check_record``.
        """
        check_record(record, len(chunks), folder)
        self.chunks, self._on_failure = dict(zip(record["chunks"], chunks, strict=True)), on_failure
        if "file" not in record:
            return
        assert folder is not None
        self._file = folder / record["file"]
        self._shape, self._dtype, self._count = tuple(record["shape"]), _dtype(record), record["count"]

    def _row_bytes(self) -> int:
        assert self._dtype is not None
        return math.prod(self._shape) * self._dtype.itemsize

    def _append(self, first: int, rows: Tensor) -> None:
        """Write rows to the file at their position. Raises OSError."""
        assert self._file is not None
        if self._dtype is None:
            self._shape, self._dtype = tuple(rows.shape[1:]), rows.dtype
        if rows.shape[1:] != self._shape or rows.dtype != self._dtype or first > self._count:
            raise ValueError(f"rows {first} are {tuple(rows.shape)} {rows.dtype}, not {self._shape}")
        data = rows.contiguous().flatten().view(torch.uint8).numpy().tobytes() if rows.numel() else b""
        with self._file.open("r+b") as stream:
            stream.seek(first * self._row_bytes())
            stream.write(data)
        self._count = max(self._count, first + len(rows))

    def _mapped(self) -> Tensor:
        """The rows of the file, read from the disk when they are used."""
        size = self._count * math.prod(self._shape)
        if not size:
            return torch.empty(self._count, *self._shape, dtype=self._dtype)
        rows = torch.from_file(str(self._file), shared=False, size=size, dtype=self._dtype)
        return rows.view(self._count, *self._shape)


def check_record(record: Mapping[str, Any], chunks: int, folder: Path | None) -> None:
    """Raise InputError for a record of ``Rows`` that cannot be restored from its chunks and its file."""
    if len(record["chunks"]) != chunks:
        raise InputError(f"it has {chunks} of {len(record['chunks'])} chunks of rows")
    if "file" not in record:
        return
    name, count = record["file"], record["count"]
    if not isinstance(name, str) or os.path.basename(name) != name:
        raise InputError(f"it names an invalid file {name!r:.80}")
    if folder is None or not _is_regular(folder / name):
        raise InputError(f"the file of rows {name} is missing")
    dtype = _dtype(record)
    if count and (dtype is None or (folder / name).stat().st_size < _size(record, dtype)):
        raise InputError(f"the file of rows {name} is incomplete")
    try:
        (folder / name).open("r+b").close()
    except OSError as error:
        raise InputError(f"the file of rows {name} cannot be opened: {error_text(error)}") from error


def _dtype(record: Mapping[str, Any]) -> torch.dtype | None:
    """The type of the rows of a record; None before the first row."""
    dtype = getattr(torch, record["dtype"], None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _size(record: Mapping[str, Any], dtype: torch.dtype) -> int:
    """The bytes of the rows of a record."""
    return int(record["count"]) * math.prod(record["shape"]) * dtype.itemsize


def _is_regular(file: Path) -> bool:
    """Whether it is a file itself, not a symbolic link to one."""
    try:
        return stat.S_ISREG(file.lstat().st_mode)
    except OSError:
        return False


class LabelRows(Rows):
    """The class name of every image: rows of numbers, and the ``names`` by number.

    Example::

        labels = LabelRows()
        labels.write_labels(batch.indices[0], ("dog", "cat"))
        labels.labels()  # ("dog", "cat")
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def write_labels(self, first: int, labels: Sequence[str]) -> None:
        """Set the class names of the images ``first``, ``first + 1``, ..."""
        self.write(first, self._numbers(labels))

    def _numbers(self, labels: Sequence[str]) -> Tensor:
        self.names = list(dict.fromkeys([*self.names, *map(str, labels)]))
        numbers = {name: number for number, name in enumerate(self.names)}
        return torch.tensor([numbers[str(label)] for label in labels], dtype=torch.int32)

    def merge(self, other: Rows) -> Rows:
        """The labels of both; the other's names get the numbers that they have here."""
        assert isinstance(other, LabelRows)
        renamed = LabelRows()
        renamed.names = self.names
        numbers = renamed._numbers(other.names)
        renamed.chunks = {first: numbers[chunk.long()] for first, chunk in other.chunks.items()}
        merged = super().merge(renamed)
        assert isinstance(merged, LabelRows)
        merged.names = renamed.names
        return merged

    def labels(self) -> tuple[str, ...]:
        """The class names of all images in their order."""
        return tuple(self.names[number] for number in self.tensor().tolist())

    def record(self) -> dict[str, Any]:
        return super().record() | {"names": self.names}

    def restore(
        self,
        record: Mapping[str, Any],
        chunks: Sequence[Tensor],
        folder: Path | None,
        on_failure: Callable[[OSError], None],
    ) -> None:
        super().restore(record, chunks, folder, on_failure)
        self.names = list(record["names"])
