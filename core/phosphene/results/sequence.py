"""``ResultSequence``: the results of images of different sizes, one for each image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .base import Panel, Result
from .tables import Table


@dataclass(frozen=True, eq=False, kw_only=True)
class ResultSequence(Result):
    """The results of images of different sizes, which are no batch: one for each image, in their order.

    ``sequence[i]`` is the result of image i. ``save`` writes each into a folder of its own, ``000``, ``001``,
    ..., from which ``load_result`` and ``replay`` read it.
    """

    results: tuple[Result, ...]

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, index: int) -> Result:
        return self.results[index]

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __repr__(self) -> str:
        method = f" of {self.provenance.method}" if self.provenance else ""
        lines = [f"  {n}  {str(result).splitlines()[0]}" for n, result in enumerate(self.results)]
        return "\n".join([f"{type(self).__name__}{method}: {len(self)} results", *lines])

    def panels(self) -> list[list[Panel]]:
        return [group for result in self.results for group in result.panels()]

    def rows(self) -> list[list[Panel]]:
        return [row for result in self.results for row in result.rows()]

    def lines(self) -> list[str]:
        """The lines of every result, below the number of its image."""
        return [f"{n:03d}  {line[5:] if line[:3].isdecimal() else line}" for n, line in self._lines()]

    def _lines(self) -> list[tuple[int, str]]:
        return [(n, line) for n, result in enumerate(self.results) for line in result.lines()]

    def to_numpy(self) -> dict[str, Any]:
        """The arrays of every result, by field: a tuple with one for each image."""
        converted = [result.to_numpy() for result in self.results]
        return {name: tuple(arrays[name] for arrays in converted) for name in converted[0]}

    def table(self) -> Table:
        """The tables of all results, one below the other, with the number of the image."""
        return self._joined([result.table() for result in self.results])

    def detections(self) -> Table:
        """The detections of all results, one below the other, with the number of the image."""
        return self._joined([result.detections() for result in self.results])

    def _joined(self, tables: list[Table]) -> Table:
        joined: Table = {name: [] for table in tables for name in table}
        for number, table in enumerate(tables):
            count = len(next(iter(table.values())))
            for name, column in joined.items():
                column += [number] * count if name == "image" else table.get(name, [None] * count)
        return joined

    def animation_frames(self) -> list[Tensor]:
        """None: every result has its own, of its own size."""
        return []

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write every result into a folder of its own inside ``folder``: ``000``, ``001``, ..."""
        for number, result in enumerate(self.results):
            result.save(self.subfolder(folder, number))
        return Path(folder)

    @staticmethod
    def subfolder(folder: str | os.PathLike[str], number: int) -> Path:
        """The folder of one image's result."""
        return Path(folder) / f"{number:03d}"
