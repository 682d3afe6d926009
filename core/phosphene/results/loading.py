"""``load_result``: a saved result, read without executing anything."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path

from safetensors.torch import load_file

from ..builtin.networks import WEIGHTS
from ..errors import InputError, PhospheneError, UnknownName
from ..registry.lookup import methods
from .base import Result
from .provenance import Provenance
from .saving import FORMAT, decode


def load_result(folder: str | os.PathLike[str]) -> Result:
    """A saved result, with its provenance and inputs, or a bundled one ("builtin:shapes-styles").

    Nothing in the folder is executed. Raises InputError where there is no whole result, UnknownName where
    nobody knows its type or its bundled name.
    """
    if str(folder).startswith("builtin:"):
        name = str(folder).removeprefix("builtin:")
        known = [path.parent.name for path in WEIGHTS.glob("*/result.json")]
        if name not in known:
            raise UnknownName("bundled result", name, sorted(known))
        return dataclasses.replace(load_result(WEIGHTS / name), uri=str(folder))  # not this machine's place
    folder = Path(folder)
    if not (folder / "result.json").is_file():
        raise InputError(f"{folder} holds no saved result (no result.json)")
    try:
        document = json.loads((folder / "result.json").read_text())
        if document["format"] != FORMAT:
            raise ValueError(f"saved in format {document['format']}; this version reads {FORMAT}")
        tensors = load_file(folder / "arrays.safetensors")
        fields, inputs = (decode(document[part], tensors) for part in ("fields", "inputs"))
        provenance = Provenance(**document["provenance"]) if document["provenance"] else None
        name = document["type"]
    except Exception as error:  # whatever a damaged file makes the parsers say
        raise InputError(f"{folder} is not a whole result: {error}") from error
    if name not in Result.types and provenance:  # its plugin may bring it
        with contextlib.suppress(PhospheneError):
            _ = methods[provenance.method]
    if name not in Result.types:
        raise UnknownName("result type", name, Result.types)
    return Result.types[name].restore(fields, provenance=provenance, inputs=inputs, uri=str(folder.resolve()))
