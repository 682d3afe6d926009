"""A method's inputs, parameters and result type, read from its function's signature."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from inspect import Parameter
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..errors import UnknownName
from ..results import Result
from ..roles import ROLES
from ..spec.parameter_group import ParameterGroup
from ..spec.spec import Input, Role

#: The arguments of ``run`` itself, beside a method's inputs and parameters.
RUN_ARGUMENTS = {"name", "out", "device", "batch_size", "progress", "executor"}


class Signature(NamedTuple):
    """What a method's function declares.

    ``fields`` are its parameters for ``pydantic.create_model``, those of ``groups`` (by the argument that
    holds them) among them. ``call`` is the signature that callers see: plain types, groups flattened.
    """

    inputs: tuple[Input, ...]
    fields: dict[str, Any]
    groups: dict[str, type[ParameterGroup]]
    result: type[Any]
    call: inspect.Signature


def read_signature(function: Callable[..., Any]) -> Signature:
    """A function's inputs, parameters and result type. Raises TypeError for what no method can have."""
    # Not get_type_hints, which drops the Annotated metadata.
    signature = inspect.signature(function, eval_str=True)
    inputs: list[Input] = []
    fields: dict[str, Any] = {}
    groups: dict[str, type[ParameterGroup]] = {}
    call: list[Parameter] = []
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
        role = _role(parameter.annotation)
        if role is None:
            raise TypeError(f"{function.__name__}: input {name!r} needs a role (phosphene.roles.Images, ...)")
        if role.name not in ROLES:
            raise UnknownName("input role", role.name, ROLES)
        inputs.append(
            Input(
                name=name,
                role=role.name,
                required=required,
                own_size=role.own_size,
                replaces=role.replaces,
            )
        )
        call.append(parameter.replace(annotation=plain_type(parameter.annotation)))
    result = signature.return_annotation
    if not (isinstance(result, type) and issubclass(result, Result)):
        raise TypeError(f"{function.__name__} must say which result type it returns, not {result!r}")
    for name, (annotation, default) in fields.items():
        value = Parameter.empty if (default := _default(default)) is ... else default
        call.append(Parameter(name, Parameter.KEYWORD_ONLY, default=value, annotation=plain_type(annotation)))
    plain = inspect.Signature(call, return_annotation=result)
    return Signature(_require_replaced(inputs), fields, groups, result, plain)


def _role(annotation: Any) -> Role | None:
    """The role of an input's annotation, also of ``Model | None``."""
    for part in get_args(annotation):
        role = part if isinstance(part, Role) else _role(part) if get_args(part) else None
        if role is not None:
            return role
    return None


def _require_replaced(inputs: list[Input]) -> tuple[Input, ...]:
    """The inputs, those required that have a default only because others can replace them."""
    replaced = {name for i in inputs for name in i.replaces}
    return tuple(
        i.model_copy(update={"required": True})
        if i.name in replaced or (replaced and i.role == "model")
        else i
        for i in inputs
    )


def _default(default: Any) -> Any:
    """A field's default value; ``...`` where it is required."""
    if not isinstance(default, FieldInfo):
        return default
    return ... if default.is_required() else default.get_default(call_default_factory=True)


def plain_type(annotation: Any) -> Any:
    """The type without what is attached to it: ``list[Annotated[int, Field(ge=0)]]`` -> ``list[int]``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return plain_type(arguments[0])
    if origin is None or origin is Literal or not all(map(_is_type, arguments)):
        return annotation
    plain = tuple(map(plain_type, arguments))
    if origin in (Union, UnionType):
        return functools.reduce(operator.or_, plain)
    return origin[plain]


def admits(annotation: Any, *kinds: type) -> bool:
    """Whether the annotation admits a value of one of these types, or one inside a list or mapping."""
    if annotation is Any or annotation in kinds:
        return True
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return any(admits(field.annotation, *kinds) for field in annotation.model_fields.values())
    if get_origin(annotation) is Literal:
        return any(type(choice) in kinds for choice in get_args(annotation))
    return any(admits(part, *kinds) for part in get_args(annotation) if _is_type(part))


def holds_bool(value: Any) -> bool:
    """Whether a value is a bool, also one of NumPy or torch, or contains one."""
    if isinstance(value, Mapping):
        return any(map(holds_bool, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(holds_bool, value))
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _is_type(argument: Any) -> bool:
    return argument is ... or not isinstance(argument, (list, str))
