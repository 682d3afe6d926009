"""``read_concept``: a concept of a saved result as a target, ``concept:folder#name``."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..errors import InputError
from ..targets.objectives import Direction
from .base import InputContext

#: The prefix of a target that names a concept.
CONCEPT = "concept:"


def is_concept(value: Any) -> bool:
    """Whether a value is text that names a concept."""
    return isinstance(value, str) and value.startswith(CONCEPT)


def read_concept(text: str, context: InputContext) -> Direction:
    """The direction of ``concept:folder#name``, of a result of ``concept_vectors`` or another factorization.

    ``name`` is the concept's name or number. Raises InputError for a result without concepts, UnknownName for
    a concept that it does not have.
    """
    folder, mark, name = text.removeprefix(CONCEPT).rpartition("#")
    if not mark or not folder or not name:
        raise InputError(f"a concept is named as concept:folder#name, not {text!r}")
    result = context.result(folder)
    if not hasattr(result, "direction"):
        kind = type(result).__name__
        raise InputError(f"{folder} is a result of type {kind}, which has no concepts; concept_vectors has")
    # Vectors are named, and parts of a factorization numbered.
    concept = result.direction(name if hasattr(result, "concepts") else _number(name, text))
    return dataclasses.replace(concept, source=text)


def _number(name: str, text: str) -> int:
    if not name.isdecimal():
        raise InputError(f"the concepts of a factorization have numbers: concept:folder#0, not {text!r}")
    return int(name)
