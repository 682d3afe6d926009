"""``check_fields``: whether saved fields have the types and shapes that a result type declares."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from ..errors import InputError, type_name


def check_fields(cls: Any, fields: Mapping[str, Any]) -> None:
    """Raise InputError, naming the field, where saved fields are not those of the result type ``cls``.

    Checked are names, types by the annotations, shapes by ``cls.shapes``, one row per image in the fields of
    ``per_image`` and ``per_step``, and that tensors are finite.
    """
    declared = {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("saved", True)}
    for name in fields:
        if name not in declared:
            raise InputError(f"a {cls.__name__} has no field {name!r}, it has {', '.join(declared)}")
    hints = get_type_hints(cls)
    for name, definition in declared.items():
        optional = (definition.default, definition.default_factory) != (dataclasses.MISSING,) * 2
        if name not in fields and not optional:
            raise InputError(f"the field {name!r} of the {cls.__name__} is missing")
        value = fields.get(name)
        if name in fields and not (value is None and definition.default is None):
            _check_type(value, hints[name], name)
    _check_shapes(cls, fields)


def _check_type(value: Any, hint: Any, name: str) -> None:
    """Raise InputError unless the value decoded from a file is of the annotated type."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        valid = value in arguments if isinstance(value, (str, int, type(None))) else False
    elif kind in (Union, types.UnionType):
        return _check_union(value, arguments, name)
    elif isinstance(kind, type) and issubclass(kind, nn.Module):
        return _check_type(value, dict[str, Tensor], name)  # a network is saved as its tensors by name
    elif kind in (float, int):  # JSON writes 1.0 and 1 alike; True is a boolean only
        valid = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    elif kind in (tuple, list, Sequence):  # a tuple's items are all of one type or each of its own
        valid = isinstance(value, tuple)
        each = kind is not tuple or arguments[1:] == (...,)
        if valid and arguments and not each and len(value) != len(arguments):
            raise InputError(f"the field {name!r} has {len(value)} items instead of {len(arguments)}")
        items = zip(value, arguments[:1] * len(value) if each else arguments, strict=False) if valid else ()
        for number, (item, item_hint) in enumerate(items):
            _check_type(item, item_hint, f"{name}.{number}")
    elif kind in (dict, Mapping):
        valid = isinstance(value, Mapping)
        for key, item in value.items() if valid and arguments else ():
            _check_type(item, arguments[1], f"{name}.{key}")
    elif kind is Tensor:
        valid = isinstance(value, Tensor)
        if valid and (value.is_floating_point() or value.is_complex()) and not value.isfinite().all():
            raise InputError(f"the field {name!r} contains NaN or infinity")
    else:
        valid = kind is Any or not isinstance(kind, type) or isinstance(value, kind)
    if not valid:
        text = getattr(hint, "__name__", str(hint)) if not arguments else str(hint).replace("typing.", "")
        raise InputError(f"the field {name!r} is {type_name(value)}, not of type {text}")


def _check_union(value: Any, hints: Sequence[Any], name: str) -> None:
    """Raise the last member's InputError unless the value is of one of the types."""
    for number, hint in enumerate(hints):
        try:
            return _check_type(value, hint, name)
        except InputError:
            if number == len(hints) - 1 or (isinstance(value, Tensor) and hint is Tensor):
                raise


def _check_shapes(cls: Any, fields: Mapping[str, Any]) -> None:
    """Raise InputError where tensors or tuples are not of the shapes that ``cls`` declares.

    The same letter is the same size in all fields.
    """
    shapes: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        shapes |= vars(base).get("shapes", {})
    sizes: dict[str, tuple[int, str]] = {}
    for name, text in shapes.items():
        if (value := fields.get(name)) is None:
            continue
        shape, axes = _shape(value), text.split()
        if len(shape) != len(axes):
            raise InputError(f"the field {name!r} has shape {shape}, not ({', '.join(axes)})")
        for size, axis in zip(shape, axes, strict=True):
            expected, owner = (int(axis), "") if axis.isdigit() else sizes.setdefault(axis, (size, name))
            if size != expected:
                reason = f", from the field {owner!r}" if owner else ""
                raise InputError(f"the field {name!r} has shape {shape}: {axis} is {expected}{reason}")
    rows: tuple[int, str] | None = None
    for name, dimension in [(n, 0) for n in cls.per_image] + [(n, 1) for n in cls.per_step]:
        if (value := fields.get(name)) is None or name in shapes:
            continue
        shape = _shape(value)
        if len(shape) <= dimension:
            raise InputError(f"the field {name!r} has shape {shape}, without an axis for the images")
        rows = rows or (shape[dimension], name)
        if shape[dimension] != rows[0]:
            raise InputError(f"the field {name!r} has {shape[dimension]} rows, but {rows[1]!r} has {rows[0]}")


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else (len(value),)
