"""Runs on images of different sizes: image by image."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import InputError
from ..images.paths import expand_path
from ..registry.lookup import methods
from ..registry.method import Method
from ..results import Result, ResultSequence
from ..roles import ROLES, DifferentSizesError, InputContext
from ..roles.table import is_per_image
from .saved_results import load_result


def run_separately(
    run: Callable[..., Result],
    name: str | Method[..., Any],
    error: DifferentSizesError,
    arguments: Mapping[str, Any],
    *,
    out: str | os.PathLike[str] | None,
    **how: Any,
) -> ResultSequence:
    """The results of ``run`` for each of the images of ``error``, with its own label, target, mask or start.

    Raises the error itself, with the reason, for a method whose results belong to several images at once.
    """
    method = methods[name] if isinstance(name, str) else name
    spec = method.spec
    images = spec.input("images")
    if images is None or not (spec.batch_independent and method.result.per_image):
        raise InputError(
            f"{spec.short_name} computes one result of all its images, which have to be one batch: {error}"
        ) from error
    shared = dict(arguments)
    if (owner := spec.input("model")) is not None:  # loaded once: random weights would differ
        value = owner.value(arguments.get(owner.name))
        shared[owner.name] = ROLES["model"].make(value, InputContext(None, {}, load_result))
    results: list[Result] = []
    for number, image in enumerate(error.files or error.images):
        own = {
            declared.name: _own_value(declared.role, arguments[declared.name], number, len(error.images))
            for declared in spec.inputs
            if arguments.get(declared.name) is not None and declared.role not in ("model", "images")
        }
        folder = None if out is None else ResultSequence.subfolder(out, number)
        result = run(name, out=folder, **how, **shared | own | {images.name: image})
        results.append(result)
        if result.provenance is not None and result.provenance.interrupted is not None:
            break
    last = results[-1].provenance
    return ResultSequence(results=tuple(results), provenance=last)


def _own_value(role: str, value: Any, number: int, count: int) -> Any:
    """The part of an input's value that belongs to one of ``count`` images; the value where it is of all."""
    if not is_per_image(role) or count == 1:
        return value
    if role in ("masks", "start") and isinstance(value, (str, os.PathLike)):
        files = [] if Path(value, "result.json").is_file() else expand_path(value)
        value = files if len(files) == count else value
    if not isinstance(value, (list, tuple, Tensor, np.ndarray)) or len(value) != count:
        return value
    part = value[number : number + 1]
    return part[0] if role == "target" and isinstance(part, (list, tuple)) else part
