"""``ManifestDataset``: the rows of a CSV, TSV or Parquet file with the columns image, label, mask and box."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from ..errors import InputError, MissingExtra, value_repr
from ..images.decode import read_image
from ..images.paths import local_path
from ..models.class_names import ClassLabel
from .items import Box, Item, ItemDataset, Transform
from .torch_datasets import BOX_KEYS, IMAGE_KEYS, LABEL_KEYS, MASK_KEYS, find_column

#: Suffixes of manifests, and what separates the columns of the text ones.
SEPARATORS = {".csv": ",", ".tsv": "\t"}


class ManifestDataset(ItemDataset):
    """A row per image. Paths are relative to the manifest's folder.

    Columns: ``image`` (a path; in Parquet also the bytes of a file), ``label`` (a class name or number),
    ``mask`` (the path of an image, white on the object) and ``box`` ("left top right bottom" in pixels,
    several separated by semicolons). Only ``image`` is required; other columns are ignored.

    Raises:
        InputError: a missing file or column, or a row that cannot be read; MissingExtra for Parquet without
            the extra ``tables``.
    """

    def __init__(self, path: str | Path, transform: Transform = read_image) -> None:
        super().__init__(transform)
        file = local_path(path)
        if not file.is_file():
            raise InputError(f"there is no manifest at {str(path)!r}")
        self.uri, self._file = str(file.resolve()), file
        is_text = file.suffix.lower() in SEPARATORS
        self._table: _Text | _Parquet = _Text(file) if is_text else _Parquet(file)
        names = self._table.names
        self._image_column = find_column(names, IMAGE_KEYS, str(file))
        optional = (LABEL_KEYS, MASK_KEYS, BOX_KEYS)
        self._optional = [find_column(names, keys, str(file), required=False) for keys in optional]

    def __len__(self) -> int:
        return len(self._table)

    def id(self, index: int) -> str:
        image = self._table.value(self._image_column, index)
        image = image.get("path") if isinstance(image, Mapping) else image
        return image if isinstance(image, str) else str(index)

    def item(self, index: int) -> Item:
        image = self._path(self._table.value(self._image_column, index))
        if image is None:
            raise InputError(f"row {index + 1} of {self._file} has no image")
        label, mask, boxes = (name and self._table.value(name, index) for name in self._optional)
        number = label if isinstance(label, int) and not isinstance(label, bool) else None
        if number is not None and self._table.class_names:
            label = ClassLabel(self._table.class_names[number], number)
        text = None if label in (None, "") else label if isinstance(label, str) else str(label)
        return Item(image, text, self._path(mask), self._read_boxes(boxes, index))

    def _path(self, value: Any) -> Any:
        """A path relative to the manifest, or what holds the content of a file."""
        if isinstance(value, str):
            return self._file.parent / local_path(value) if value else None
        return value

    def _read_boxes(self, value: Any, index: int) -> tuple[Box, ...] | None:
        if value in (None, ""):
            return None
        try:
            rows = value
            if isinstance(value, str):
                rows = [row.replace(",", " ").split() for row in value.split(";")]
            elif not isinstance(value[0], Sequence):
                rows = [value]
            boxes: list[Box] = []
            for left, top, right, bottom in rows:
                boxes.append((float(left), float(top), float(right), float(bottom)))
        except (TypeError, ValueError, IndexError):
            raise InputError(
                f"row {index + 1} of {self._file}: "
                f"a box is 'left top right bottom', not {value_repr(value, 60)}"
            ) from None
        for left, top, right, bottom in boxes:
            if not (left < right and top < bottom):
                raise InputError(f"row {index + 1} of {self._file}: the box {value_repr(value, 60)} is empty")
        return tuple(boxes)


class _Text:
    """A CSV or TSV file, read at once."""

    class_names: Sequence[str] = ()

    def __init__(self, file: Path) -> None:
        try:
            with file.open(encoding="utf-8-sig", newline="") as stream:
                reader = csv.DictReader(stream, delimiter=SEPARATORS[file.suffix.lower()], strict=True)
                self._rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read as a table: {error}") from error
        self.names = list(reader.fieldnames or ())
        for number, row in enumerate(self._rows, start=1):
            if None in row or None in row.values():
                raise InputError(f"row {number} of {file} has another number of columns than its heading")

    def __len__(self) -> int:
        return len(self._rows)

    def value(self, name: str, index: int) -> Any:
        return self._rows[index][name]


class _Parquet:
    """A Parquet file; of its row groups the last one that was used is in memory."""

    def __init__(self, file: Path) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise MissingExtra("reading Parquet", "tables") from None
        try:
            self._file = pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{file} cannot be read as Parquet: {error}") from error
        self.names = [*self._file.schema_arrow.names]
        self._lock = Lock()  # several threads read
        self._group: tuple[int, Any] | None = None
        ends, count = [], 0
        for number in range(self._file.num_row_groups):
            count += self._file.metadata.row_group(number).num_rows
            ends.append(count)
        self._ends = ends
        self.class_names = _huggingface_names(self._file.schema_arrow.metadata or {})

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def value(self, name: str, index: int) -> Any:
        number = next(n for n, end in enumerate(self._ends) if index < end)
        with self._lock:
            if self._group is None or self._group[0] != number:
                self._group = number, self._file.read_row_group(number)
            group = self._group[1]
        return group[name][index - (self._ends[number - 1] if number else 0)].as_py()


def _huggingface_names(metadata: Mapping[bytes, bytes]) -> Sequence[str]:
    """The class names that a data set of Hugging Face writes into a Parquet file."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return next((features[key].get("names", ()) for key in LABEL_KEYS if key in features), ())
