"""``ResultStream``: the results of a method over a data set, in shards on disk that are read when used."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor

from ..errors import InputError, MissingExtra, PhospheneError, UnknownName, value_repr
from .base import FindMethod, Panel, Result
from .field_types import check_fields
from .saving import FORMAT, decode, encode
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The index of a stream, a row for each image.
INDEX = "index.parquet"

#: How many images the figure of a stream shows.
FIGURE_IMAGES = 8

#: Rows of the index that are written at once.
_INDEX_ROWS = 16_384

#: The key of a shard's document in its metadata.
_METADATA = "phosphene"


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:06d}.safetensors"


def encode_shard(result: Result, index: Table) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a shard: the result of one batch, and its rows of the index."""
    tensors: dict[str, Tensor] = {}
    document = {
        "format": FORMAT,
        "fields": {name: encode(value, name, tensors) for name, value in result.fields()},
        "index": index,
        "provenance": result.provenance.model_dump(mode="json") if result.provenance else None,
    }
    return tensors, {_METADATA: json.dumps(document)}


def read_shard_document(file: Path) -> dict[str, Any]:
    """A shard's document, without its tensors. Raises InputError for a file that is no shard."""
    try:
        with safe_open(file, "pt") as shard:
            document: dict[str, Any] = json.loads((shard.metadata() or {})[_METADATA])
            if document["format"] != FORMAT:
                raise ValueError(f"its format is {document['format']}")
            return document
    except Exception as error:  # safetensors and JSON each raise their own
        raise InputError(f"{file} is no shard of a stream: {type(error).__name__} {error}") from error


def load_pyarrow() -> Any:
    """``pyarrow`` with its Parquet module. Raises MissingExtra where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("a stream of results, whose index is a Parquet file,", "tables") from None
    return pyarrow


def write_index(shards: Sequence[Path], file: Path) -> None:
    """Write the index of these shards as Parquet: id, target, prediction, confidence, shard, row, ...

    The rows are those in the shards' metadata; some thousands are in memory at once.
    """
    pyarrow = load_pyarrow()
    first = {"id": "string", "target": "string", "prediction": "string", "confidence": "float64"}
    last = {"shard": "string", "row": "int32"}
    types = {name: getattr(pyarrow, kind)() for name, kind in (first | last).items()}
    writer, rows = None, 0
    group: dict[str, list[Any]] = {}
    try:
        for number, shard in enumerate(shards, start=1):
            index = read_shard_document(shard)["index"]
            count = len(index["id"])
            index |= {"shard": [shard.name] * count, "row": [*range(count)]}
            for name, values in index.items():
                group.setdefault(name, []).extend(values)
            rows += count
            if rows >= _INDEX_ROWS or number == len(shards):
                names = dict.fromkeys([*first, *group])
                arrays = {n: pyarrow.array(group[n], types.get(n)) for n in names}
                table = pyarrow.table(arrays)
                writer = writer or pyarrow.parquet.ParquetWriter(file, table.schema)
                writer.write_table(table)
                types, group, rows = dict(zip(table.schema.names, table.schema.types, strict=True)), {}, 0
    finally:
        if writer is not None:
            writer.close()


@dataclass(frozen=True, eq=False, kw_only=True)
class ResultStream(Result):
    """Results of a per-image method over a data set: ``count`` images in shards of ``shard_size``.

    ``len(stream)`` is the number of images, ``stream[i]`` the ordinary result of image i, ``stream[a:b]``
    that of several, of the type that ``result_type`` names; iterating yields the result of each image, and
    ``batches()`` that of each shard. At most one shard is in memory. ``table()`` and ``to_pandas()`` are the
    index: a row per image with its ``id`` in the data set, the ``target``, the model's ``prediction`` of the
    image and its ``confidence``, the file ``shard`` and the ``row`` there, and every field of the result that
    is one number or text per image. Figures show the first images.
    """

    count: int
    shard_size: int
    result_type: str
    #: Loads the method, which defines the type of the results.
    _find_method: FindMethod | None = field(default=None, repr=False, metadata={"saved": False})
    _last: list[tuple[int, Result]] = field(
        default_factory=list, init=False, repr=False, metadata={"saved": False}
    )

    @classmethod
    def restore(cls, fields: dict[str, Any], find_method: FindMethod, **rest: Any) -> Result:
        stream = cls(**fields, _find_method=find_method, **rest)
        if stream.count < 1 or stream.shard_size < 1:
            raise InputError("a stream has at least one image, and one in each shard")
        if stream.result_type not in Result.types and stream.provenance is not None:
            find_method(stream.provenance.method)  # its module defines the type
        if stream.result_type not in Result.types:
            raise UnknownName("result type", stream.result_type, Result.types)
        if not Result.types[stream.result_type].per_image:
            raise InputError(f"a {stream.result_type} has no row for each image")
        for file in (*map(stream._shard_file, range(stream._shard_count)), stream.folder / INDEX):
            if not file.is_file():
                raise InputError(f"it has no {file.name}")
        return stream

    @property
    def folder(self) -> Path:
        """The folder with the shards."""
        if self.uri is None:
            raise InputError("this stream was not loaded from a folder: load_result(folder)")
        return Path(self.uri)

    @property
    def _shard_count(self) -> int:
        return -(-self.count // self.shard_size)

    def _shard_file(self, number: int) -> Path:
        return self.folder / shard_name(number)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int | slice) -> Result:
        """The result of one image, or of those of a slice. Raises IndexError, InputError for no image."""
        if isinstance(index, slice):
            return self._select(range(self.count)[index])
        try:
            number = range(self.count)[index]
        except TypeError:
            raise InputError(
                f"an image of a stream is a number or a slice, not {value_repr(index)}"
            ) from None
        except IndexError:
            raise IndexError(f"image {index} of a stream of {self.count}") from None
        return self._select(range(number, number + 1))

    def __iter__(self) -> Iterator[Result]:
        for batch, first in zip(self.batches(), range(0, self.count, self.shard_size), strict=True):
            for row in range(min(self.shard_size, self.count - first)):
                yield batch.select([row])

    def batches(self) -> Iterator[Result]:
        """The result of each shard, in order; the last one may have fewer images."""
        for number in range(self._shard_count):
            yield self._read(number)

    def _select(self, indices: range) -> Result:
        if not indices:
            raise InputError(f"the slice contains none of the {self.count} images of the stream")
        parts = [
            self._read(number).select([index % self.shard_size for index in group])
            for number, group in itertools.groupby(indices, lambda index: index // self.shard_size)
        ]
        return parts[0] if len(parts) == 1 else type(parts[0]).concatenate(parts)

    def _read(self, number: int) -> Result:
        """The result of a shard; the last one that was read is reused."""
        for cached, result in self._last:
            if cached == number:
                return result
        file = self._shard_file(number)
        document = read_shard_document(file)
        cls = Result.types[self.result_type]
        try:
            with safe_open(file, "pt") as shard:
                tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
            fields = {name: decode(value, tensors) for name, value in document["fields"].items()}
            check_fields(cls, fields)
            assert self._find_method is not None
            result = cls.restore(fields, self._find_method, provenance=self.provenance)
        except PhospheneError as error:
            raise InputError(f"{file} is no shard of a stream: {error}") from error
        except Exception as error:  # safetensors and constructors each raise their own
            raise InputError(f"{file} is no shard of a stream: {type(error).__name__} {error}") from error
        expected = min(self.shard_size, self.count - number * self.shard_size)
        if (rows := len(getattr(result, cls.per_image[0]))) != expected:
            raise InputError(f"{file} is no shard of this stream: it has {rows} images, not {expected}")
        self._last[:] = [(number, result)]
        return result

    def _first(self) -> Result:
        return self._select(range(min(FIGURE_IMAGES, self.count)))

    def panels(self) -> list[list[Panel]]:
        return self._first().panels()

    def rows(self) -> list[list[Panel]]:
        return self._first().rows()

    def draw(self) -> Figure:
        return self._first().draw()

    def lines(self) -> list[str]:
        return [f"{self.count:,} images in {self._shard_count:,} shards of {self.result_type}"]

    def table(self) -> Table:
        pyarrow = load_pyarrow()
        try:
            table: Table = pyarrow.parquet.read_table(self.folder / INDEX).to_pydict()
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{self.folder / INDEX} cannot be read: {error}") from error
        return table

    def index_rows(self, size: int) -> Iterator[list[Mapping[str, Any]]]:
        """The rows of the index as mappings by column, ``size`` at a time; the last list may be shorter."""
        pyarrow = load_pyarrow()
        with pyarrow.parquet.ParquetFile(self.folder / INDEX) as file:
            rows: list[Mapping[str, Any]] = []
            for batch in file.iter_batches(size):
                rows += batch.to_pylist()
                while len(rows) >= size:
                    yield rows[:size]
                    rows = rows[size:]
            if rows:
                yield rows

    def _write(self, folder: Path) -> None:
        """Copy the stream into an empty folder."""
        for file in (*map(self._shard_file, range(self._shard_count)), self.folder / INDEX):
            shutil.copyfile(file, folder / file.name)
        super()._write(folder)


def write_summary(stream: ResultStream, folder: Path, token: str) -> None:
    """Write all files of a stream but its shards, which are in ``stream.folder``, into an empty folder.

    ``token`` is stored in ``result.json``.
    """
    names = [shard_name(number) for number in range(stream._shard_count)]
    write_index([stream.folder / name for name in names], folder / INDEX)
    Result._write(stream, folder)
    document = json.loads((folder / "result.json").read_text())
    document |= {"files": sorted([*document["files"], *names]), "token": token}
    (folder / "result.json").write_text(json.dumps(document, indent=2))
