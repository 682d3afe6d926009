"""A method's inputs and parameters as rows of text: name, option, type, bounds, default, meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..parameter_text import bounds_text, default_text, kind_text, option_name

if TYPE_CHECKING:
    from ..spec import MethodSpec


def argument_rows(spec: MethodSpec) -> list[tuple[str, ...]]:
    """A row for each input and parameter: name, option, type, bounds, default, meaning."""
    from ..roles import ROLES  # late: roles import torch, and listing methods does not need it

    roles = {i.name: ROLES[i.role] for i in spec.inputs}
    rows = [(name, role.metavar, "", "", role.help) for name, role in roles.items()]
    for name, schema in spec.params_schema["properties"].items():
        limits = bounds_text(schema), default_text(schema)
        rows.append((name, kind_text(schema), *limits, schema.get("description", "")))
    return [(name, option_name(name, spec.short_name), *row) for name, *row in rows]
