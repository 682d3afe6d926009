"""``load_result``: a saved result, with type and network from the method that computed it."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError
from ..files.documents import RESULT
from ..registry.lookup import methods
from ..results import ResultSequence
from ..results.base import Result
from ..results.reading import read_result
from ..torch_state import cpu_by_default


@cpu_by_default()
def load_result(folder: str | os.PathLike[str]) -> Result:
    """A saved result, with its provenance and inputs, or a bundled one ("builtin:shapes-styles").

    The numbered folders of images of different sizes are a ``ResultSequence``. Nothing in the folder is
    executed. Raises InputError where there is no complete result, UnknownName for a type or a bundled result
    that does not exist.
    """
    if not Path(folder, RESULT).is_file() and Path(ResultSequence.subfolder(folder, 0), RESULT).is_file():
        return _load_sequence(Path(folder))
    return read_result(folder, methods.__getitem__)


def _load_sequence(folder: Path) -> ResultSequence:
    """The results in the folders ``000``, ``001``, ... Raises InputError where one is missing."""
    numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())
    if numbers != list(range(len(numbers))):
        missing = next(number for number in range(len(numbers)) if number not in numbers)
        raise InputError(f"{folder} lacks the result {ResultSequence.subfolder('', missing)} of an image")
    results = [read_result(ResultSequence.subfolder(folder, n), methods.__getitem__) for n in numbers]
    return ResultSequence(results=tuple(results), provenance=results[-1].provenance)
