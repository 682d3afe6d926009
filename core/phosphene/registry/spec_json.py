"""``spec_from_json``: a method's spec from its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..spec.spec import MethodSpec
from .extensions import extensions


def spec_from_json(document: Mapping[str, Any]) -> MethodSpec:
    """The spec of a JSON document as ``phosphene show --json`` prints it, with ``params``, a pydantic model.

    Kinds of invariants that plugins define are included. Raises UnknownName for any other kind.
    """
    extensions.manager.hook.phosphene_invariants()  # importing the extensions defines their kinds
    return MethodSpec.model_validate(dict(document))
