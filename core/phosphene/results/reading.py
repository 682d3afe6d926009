"""``read_result``: a saved result from its folder, without executing anything in it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import textwrap
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..builtin.networks import WEIGHTS
from ..errors import InputError, ModelError, PhospheneError, UnknownName, type_name
from ..files.work_folders import sweep
from ..parameter_text import read_document
from .base import FindMethod, Result
from .field_types import check_fields
from .provenance import Provenance
from .saving import FORMAT, decode

#: Most folders that may refer to one another: a network trained from one that was trained from one ...
_MAX_DEPTH = 8

#: The folders that are being read, outermost first.
_reading: ContextVar[tuple[Path, ...]] = ContextVar("phosphene_reading", default=())


def read_result(folder: str | os.PathLike[str], find_method: FindMethod) -> Result:
    """A saved result, with its provenance and inputs, or a bundled one ("builtin:shapes-styles").

    ``find_method`` loads a method by name: the one that computed the result defines its type and builds its
    network. Raises InputError where there is no complete result, UnknownName for a type or a bundled result
    that does not exist.
    """
    if str(folder).startswith("builtin:"):
        name = str(folder).removeprefix("builtin:")
        names = [path.parent.name for path in WEIGHTS.glob("*/result.json")]
        if name not in names:
            raise UnknownName("bundled result", name, sorted(names))
        # Its name, and not the folder on this machine, goes into records.
        return dataclasses.replace(read_result(WEIGHTS / name, find_method), uri=str(folder))
    folder = Path(folder)
    if not folder.exists():  # a process that replaced it may have been killed between two renames
        sweep(folder.resolve().parent, folder.resolve().name)
    if not (folder / "result.json").is_file():
        raise InputError(f"{folder} holds no saved result (no result.json)")
    with _refuse_recursion(folder):
        document, tensors = _read_files(folder)
        with _describe_damage(folder):
            fields, inputs = (_decode_part(document, part, tensors) for part in ("fields", "inputs"))
            provenance, name = _read_provenance(document), document["type"]
        if not isinstance(name, str):
            raise InputError(f"{folder} is not a complete result: its type is {type_name(name)}")
        if name not in Result.types and provenance:  # the type of a plugin that is not loaded yet
            with contextlib.suppress(PhospheneError):
                find_method(provenance.method)
        if name not in Result.types:
            raise UnknownName("result type", name, Result.types)
        cls = Result.types[name]
        origin = {"provenance": provenance, "inputs": inputs, "uri": str(folder.resolve())}
        with _describe_damage(folder):
            check_fields(cls, fields)
            return cls.restore(fields, find_method, **origin)


@contextlib.contextmanager
def _refuse_recursion(folder: Path) -> Iterator[None]:
    """Raise InputError for a folder that is being read already, and for a long chain of folders."""
    folder, outer = folder.resolve(), _reading.get()
    if folder in outer:
        raise InputError(f"{folder} refers to itself as the network that it was computed from")
    if len(outer) == _MAX_DEPTH:
        raise InputError(f"{outer[0]} refers to other results over more than {_MAX_DEPTH} folders")
    token = _reading.set((*outer, folder))
    try:
        yield
    finally:
        _reading.reset(token)


@contextlib.contextmanager
def _describe_damage(folder: Path) -> Iterator[None]:
    """Any error about the content of a folder as one sentence that names the folder."""
    try:
        yield
    except (UnknownName, ModelError):
        raise
    except Exception as error:  # JSON, safetensors, torch and constructors each raise their own
        reason = textwrap.shorten(f"{type(error).__name__} {error}", 300, placeholder=" ...")
        reason = str(error).splitlines()[0] if isinstance(error, PhospheneError) else reason
        raise InputError(f"{folder} is not a complete result: {reason}") from error


def _read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Document and tensors of one result, also while another process replaces the folder by a newer one."""
    file = folder / "result.json"
    while True:
        before, damage = file.stat(), None
        try:
            with _describe_damage(folder):
                document = _read_document(folder)
                tensors = load_file(folder / "arrays.safetensors")
        except PhospheneError as error:
            damage = error
        after = file.stat()
        # The two files may be of different results if the folder was replaced in between: read them again.
        if (before.st_ino, before.st_ctime_ns) != (after.st_ino, after.st_ctime_ns):
            continue
        if damage is not None:
            raise damage
        return document, tensors


def _read_document(folder: Path) -> dict[str, Any]:
    """The content of ``result.json``. Raises InputError where a part is missing."""
    document = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    keys = {"format", "type", "fields", "inputs", "provenance"}
    if not isinstance(document, dict) or (missing := keys - document.keys()):
        what = f"without {', '.join(sorted(missing))}" if isinstance(document, dict) else "no mapping"
        raise InputError(f"result.json is {what}")
    if document["format"] != FORMAT:
        raise InputError(f"it is saved in format {document['format']}; this version reads {FORMAT}")
    if not (folder / "arrays.safetensors").is_file():
        raise InputError("it has no arrays.safetensors")
    return document


def _decode_part(document: dict[str, Any], part: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The decoded fields or inputs of a document."""
    if not isinstance(document[part], dict):
        raise InputError(f"its {part} are {type_name(document[part])}, not a mapping")
    try:
        return {name: decode(value, tensors) for name, value in document[part].items()}
    except KeyError as error:
        raise InputError(f"arrays.safetensors has no tensor {error}, which its {part} refer to") from error


def _read_provenance(document: dict[str, Any]) -> Provenance | None:
    """The provenance in a document, if it has one."""
    if document["provenance"] is None:
        return None
    return read_document(Provenance, document["provenance"], lambda path: "its provenance")
