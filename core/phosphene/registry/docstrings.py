"""A method's docstring for ``help()``: its own text with a generated ``Args:`` section."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic.fields import FieldInfo

#: Sections that the generated one is placed before, in the order of a docstring.
_LATER_SECTIONS = ("Returns:", "Raises:", "Example:", "Source:", "Sources:")

_BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}"}


def with_arguments(doc: str, descriptions: Mapping[str, str]) -> str:
    """The docstring with an ``Args:`` section of these descriptions, before ``Returns:``.

    Where it has one already, arguments described there keep their text and the others are added to it.
    """
    lines = doc.rstrip().splitlines()
    own = lines.index("Args:") if "Args:" in lines else None
    first = 0 if own is None else own + 1
    end = next((n for n in range(first, len(lines)) if lines[n].startswith(_LATER_SECTIONS)), len(lines))
    if own is not None:
        end = next((n for n in range(first, end) if lines[n] and not lines[n].startswith(" ")), end)
    written = [line.partition(":")[0].strip() for line in lines[first:end]] if own is not None else []
    section = [] if own is not None else ["Args:"]
    for name, description in descriptions.items():
        if name not in written:
            indent = {"initial_indent": "    ", "subsequent_indent": "        "}
            section += textwrap.wrap(f"{name}: {description}", 100, **indent)  # type: ignore[arg-type]
    head, tail = lines[:end], lines[end:]
    while head and not head[-1]:
        head.pop()
    return "\n".join([*head, *([] if own is not None else [""]), *section, *(["", *tail] if tail else [])])


def describe_parameter(field: FieldInfo) -> str:
    """A parameter's description with its bounds: "radius of the ball (> 0, <= 1)"."""
    bounds = ", ".join(dict.fromkeys(_bounds(field.metadata, field.annotation)))
    text = field.description or ""
    return f"{text} ({bounds})".strip() if bounds else text


def _bounds(metadata: Any, annotation: Any) -> Iterator[str]:
    for constraint in metadata:
        for attribute, text in _BOUNDS.items():
            bound = getattr(constraint, attribute, None)
            if isinstance(bound, (int, float)) and bound < 2**53:  # a seed's upper bound is no information
                yield text.format(f"{bound:.4g}" if isinstance(bound, float) else bound)
        if isinstance(constraint, FieldInfo):
            yield from _bounds(constraint.metadata, None)
    for part in get_args(annotation):
        if get_args(part):  # not a choice or a type without bounds
            yield from _bounds(getattr(part, "__metadata__", ()), part)
