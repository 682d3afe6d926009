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
    """The request that ``phosphene run NAME --json`` reads; every key may be left out.

    ``inputs`` are those of ``run`` in JSON: paths, URIs, names, numbers, lists of these, and a model also as
    ``{"uri": ..., "weights": ..., "pretrained": ...}``. ``params`` are the method's parameters.
    """

    model_config = ConfigDict(extra="forbid")

    inputs: dict[str, Any] = {}
    params: dict[str, Any] = {}
    out: str | None = None
    device: str | None = None
    batch_size: int | None = Field(default=None, ge=1)
    executor: str | None = None
    stream: bool | None = None


def read_request(file: str, spec: MethodSpec) -> dict[str, Any]:
    """The arguments for ``run`` from a JSON file, or from standard input for ``-``.

    Raises InputError for an invalid request, UnknownName for inputs and parameters that the method does not
    have. Values are checked by ``run``.
    """
    name = "standard input" if file == "-" else file
    try:
        document = json.loads(sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error}") from error
    except ValueError as error:
        raise InputError(f"{name} is not JSON: {error}") from error
    request = read_document(Request, document, lambda path: name)
    declared = {"input": [i.name for i in spec.inputs], "parameter": list(spec.params.model_fields)}
    for kind, arguments in (("input", request.inputs), ("parameter", request.params)):
        for key in arguments:
            if key not in declared[kind]:
                raise UnknownName(kind, key, declared[kind], spec.short_name)
    how = request.model_dump(exclude={"inputs", "params"}, exclude_none=True)
    return how | request.inputs | request.params


def format_response(result: Result, folder: Path, seconds: float) -> str:
    """A saved result as JSON: type, folder, files, text lines, duration and provenance."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    response = {
        "type": type(result).__name__,
        "folder": str(folder.resolve()),
        "files": files,
        "lines": result.lines(),
        "seconds": round(seconds, 3),
        "provenance": result.provenance.model_dump(mode="json") if result.provenance else None,
    }
    return json.dumps(response, indent=2, ensure_ascii=False)
