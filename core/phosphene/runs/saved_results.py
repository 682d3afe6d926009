"""``load_result``: a saved result, with type and network from the method that computed it."""

from __future__ import annotations

import os

from ..registry.lookup import methods
from ..results.base import Result
from ..results.reading import read_result
from ..torch_state import cpu_by_default


@cpu_by_default()
def load_result(folder: str | os.PathLike[str]) -> Result:
    """A saved result, with its provenance and inputs, or a bundled one ("builtin:shapes-styles").

    Nothing in the folder is executed. Raises InputError where there is no complete result, UnknownName for
    a type or a bundled result that does not exist.
    """
    return read_result(folder, methods.__getitem__)
