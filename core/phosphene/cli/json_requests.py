"""Runs as JSON requests and results as JSON responses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..errors import InputError, UnknownName
from ..parameter_text import read_document
from ..results import Result
from ..spec.spec import MethodSpec


class Request(BaseModel):
    """What ``phosphene run NAME --json`` reads; what is left out is as on the command line.

    ``inputs`` are what ``run`` takes that JSON can say: paths, URIs, names, numbers, lists of these, and
    a model also as ``{"uri": ..., "weights": ..., "pretrained": ...}``. ``params`` are the method's.
    """

    model_config = ConfigDict(extra="forbid")

    inputs: dict[str, Any] = {}
    params: dict[str, Any] = {}
    out: str | None = None
    device: str | None = None
    batch_size: int | None = Field(default=None, ge=1)
    executor: str | None = None


def read_request(file: str, spec: MethodSpec) -> dict[str, Any]:
    """The arguments for ``run`` out of a JSON file, or standard input where it is ``-``.

    Raises InputError for what is no such request, UnknownName for inputs and parameters that the method
    does not have; values are left to ``run``.
    """
    name = "standard input" if file == "-" else file
    try:
        document = json.loads(sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error}") from error
    except ValueError as error:
        raise InputError(f"{name} is no JSON: {error}") from error
    request = read_document(Request, document, lambda place: name)
    declared = {"input": [i.name for i in spec.inputs], "parameter": list(spec.params.model_fields)}
    for what, given in (("input", request.inputs), ("parameter", request.params)):
        for key in given:
            if key not in declared[what]:
                raise UnknownName(what, key, declared[what], spec.short_name)
    how = request.model_dump(exclude={"inputs", "params"}, exclude_none=True)
    return how | request.inputs | request.params


def format_response(result: Result, folder: Path, seconds: float) -> str:
    """A saved result as JSON: how it came about, where it lies, and what it says."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    told = {
        "type": type(result).__name__,
        "folder": str(folder.resolve()),
        "files": files,
        "lines": result.lines(),
        "seconds": round(seconds, 3),
        "provenance": result.provenance.model_dump(mode="json") if result.provenance else None,
    }
    return json.dumps(told, indent=2, ensure_ascii=False)
