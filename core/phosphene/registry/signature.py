"""A method's inputs, parameters and result type, read from its function's signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

from ..errors import UnknownName
from ..results import Result
from ..roles.kinds import ROLES
from ..spec.parameter_group import ParameterGroup
from ..spec.spec import Input, Role

#: What ``run`` itself takes beside a method's inputs and parameters.
RUN_ARGUMENTS = {"name", "out", "device", "batch_size", "progress", "executor"}


class Signature(NamedTuple):
    """What a method's function declares.

    ``fields`` are its parameters for ``pydantic.create_model``, those of ``groups`` (by the argument that
    holds them) among them.
    """

    inputs: tuple[Input, ...]
    fields: dict[str, Any]
    groups: dict[str, type[ParameterGroup]]
    result: type[Any]


def read_signature(function: Callable[..., Any]) -> Signature:
    """A function's inputs, parameters and result type. Raises TypeError for what no method can have."""
    # Not get_type_hints: it would resolve the forward references inside the roles as well.
    signature = inspect.signature(function, eval_str=True)
    inputs: list[Input] = []
    fields: dict[str, Any] = {}
    groups: dict[str, type[ParameterGroup]] = {}
    for name, parameter in signature.parameters.items():
        if name in RUN_ARGUMENTS:
            raise TypeError(f"{function.__name__}: {name!r} means something to run(); choose another name")
        required = parameter.default is parameter.empty
        if isinstance(parameter.annotation, type) and issubclass(parameter.annotation, ParameterGroup):
            groups[name] = parameter.annotation
            shared = (parameter.annotation() if required else parameter.default).parameters()
            if twice := fields.keys() & shared.keys():
                raise TypeError(f"{function.__name__}: {', '.join(sorted(twice))} is declared twice")
            fields |= shared
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            fields[name] = (parameter.annotation, ... if required else parameter.default)
            continue
        role = next((a for a in get_args(parameter.annotation) if isinstance(a, Role)), None)
        if role is None:
            raise TypeError(f"{function.__name__}: input {name!r} needs a role (phosphene.roles.Images, ...)")
        if role.name not in ROLES:
            raise UnknownName("input role", role.name, ROLES)
        inputs.append(Input(name=name, role=role.name, required=required, own_size=role.own_size))
    result = signature.return_annotation
    if not (isinstance(result, type) and issubclass(result, Result)):
        raise TypeError(f"{function.__name__} must say which result type it returns, not {result!r}")
    return Signature(tuple(inputs), fields, groups, result)
