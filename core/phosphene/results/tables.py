"""Results as tables: a row for each image, data frames, CSV and Parquet."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError, MissingExtra
from ..files.system import error_text

#: A table: values by column, one for each row.
Table = dict[str, list[Any]]


def image_table(fields: Mapping[str, Any], names: Sequence[str]) -> Table:
    """A table with a row per image from the fields whose rows belong to images.

    Numbers and texts are one column, vectors a column per entry (``points_0``, ``points_1``); fields of more
    axes, such as images and maps, are left out.
    """
    table: Table = {}
    for name in names:
        value = fields.get(name)
        rows = value.detach().cpu().tolist() if isinstance(value, Tensor) and value.ndim <= 2 else value
        if isinstance(rows, (Tensor, type(None))):
            continue
        if rows and isinstance(rows[0], (list, tuple)):
            columns = itertools.zip_longest(*rows)
            table |= {f"{name}_{number}": list(column) for number, column in enumerate(columns)}
        else:
            table[name] = list(rows)
    count = max(map(len, table.values()), default=0)
    return {"image": list(range(count)), **table} if table else {}


def numpy_value(value: Any) -> Any:
    """A tensor as an array, also inside tuples and mappings; None for what holds no tensor."""
    match value:
        case Tensor():
            value = value.detach().cpu()
            return (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
        case tuple() | list() if value and all(isinstance(item, Tensor) for item in value):
            return tuple(map(numpy_value, value))
        case Mapping() if value and all(isinstance(item, Tensor) for item in value.values()):
            return {name: numpy_value(item) for name, item in value.items()}
    return None


def data_frame(table: Table) -> Any:
    """A table as a ``pandas.DataFrame``. Raises MissingExtra without pandas."""
    try:
        import pandas
    except ImportError:
        raise MissingExtra("a data frame", "tables") from None
    return pandas.DataFrame(table)


def write_csv(table: Table, path: str | os.PathLike[str]) -> Path:
    """Write a table as CSV, in UTF-8. Raises InputError where it cannot be written."""
    file = Path(path)
    try:
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(table)
            writer.writerows(zip(*table.values(), strict=True))
    except OSError as error:
        raise InputError(f"the table cannot be written to {file}: {error_text(error)}") from error
    return file


def write_parquet(table: Table, path: str | os.PathLike[str]) -> Path:
    """Write a table as Parquet. Raises MissingExtra without pyarrow, InputError for an unwritable file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("writing Parquet", "tables") from None
    try:
        pyarrow.parquet.write_table(pyarrow.table(table), path)
    except OSError as error:
        raise InputError(f"the table cannot be written to {path}: {error_text(error)}") from error
    return Path(path)


def arrays(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors among the fields as arrays, by name."""
    converted = {name: numpy_value(value) for name, value in fields.items()}
    return {name: value for name, value in converted.items() if value is not None}
