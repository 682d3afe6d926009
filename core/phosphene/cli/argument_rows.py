"""A method's inputs and parameters as rows of text: name, option, type, bounds, default, meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..parameter_text import bounds_text, default_text, input_help, kind_text, option_name

if TYPE_CHECKING:
    from ..spec import MethodSpec


def argument_rows(spec: MethodSpec) -> list[tuple[str, ...]]:
    """A row for each input and parameter: name, option, type, bounds, default, meaning."""
    from ..roles import ROLES  # late: roles import torch, and listing methods does not need it

    roles = {i.role: (ROLES[i.role].metavar, ROLES[i.role].help) for i in spec.inputs}
    inputs = [i.model_dump() for i in spec.inputs]
    return document_rows(spec.short_name, inputs, spec.params_schema["properties"], roles)


def document_rows(
    short_name: str,
    inputs: Sequence[Mapping[str, Any]],
    properties: Mapping[str, Any],
    roles: Mapping[str, Sequence[str]],
) -> list[tuple[str, ...]]:
    """The same rows from a spec's JSON form and, for each role, its placeholder and help text."""
    rows = []
    for i in inputs:
        metavar, text = roles[i["role"]]
        rows.append((i["name"], metavar, "", "", input_help(text, i.get("default"))))
    for name, schema in properties.items():
        limits = bounds_text(schema), default_text(schema)
        rows.append((name, kind_text(schema), *limits, schema.get("description", "")))
    return [(name, option_name(name, short_name), *row) for name, *row in rows]
