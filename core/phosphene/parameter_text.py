"""Parameters as text: reading command-line values, printing types, bounds and errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from fractions import Fraction
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import ValidationError

from .errors import InputError, UnknownName

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    D = TypeVar("D", bound=BaseModel)


#: What options mean in every run; an input or parameter of such a name gets its method's before it.
RESERVED_OPTIONS = {
    "batch_size",
    "debug",
    "device",
    "events",
    "help",
    "image",
    "json",
    "out",
    "pretrained",
    "quiet",
}


RESERVED_OPTIONS |= {"weights"}


_KINDS = {"boolean": "true|false", "integer": "INT", "number": "FLOAT", "string": "TEXT", "null": "none"}


#: What pydantic says of its own insides.
_SAID = dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "should be a mapping of keys")


_BOUNDS = {"exclusiveMinimum": "> {}", "minimum": ">= {}", "exclusiveMaximum": "< {}", "maximum": "<= {}"}


_BOUNDS |= {"minItems": "at least {} items", "maxItems": "at most {} items"}


def option_name(name: str, method: str) -> str:
    """The option of a method's input or parameter: ``step_size`` -> ``--step-size``."""
    if name == "images":
        return "--image"
    return "--" + (f"{method}_{name}" if name in RESERVED_OPTIONS else name).strip("_").replace("_", "-")


def read_option(text: str, field: FieldInfo) -> Any:
    """A parameter's value from what was written for it.

    Lists are ``a,b`` or JSON, mappings ``a=1,b=2`` or JSON, nothing is ``none``, and a number may
    be a fraction (``8/255``). What fits nothing is left for the method's validation to speak about.
    """
    from pydantic import TypeAdapter  # late, so that the command line's help need not wait for it

    readings: list[Any] = [None] if text.lower() == "none" else []
    with suppress(ValueError):
        readings.append(json.loads(text))
    items = [item.strip() for item in text.split(",")] if text else []
    if len(items) != 1:
        readings += [items, list(map(_fraction, items))]
    if not text:
        readings.append({})
    if "=" in text:
        pairs = [item.partition("=") for item in items]
        readings.append({name.strip(): _fraction(value.strip()) for name, _, value in pairs})
    readings += [_fraction(text), text, [text]]
    adapter, failed = TypeAdapter(field.rebuild_annotation()), []
    for value in readings:
        try:
            return adapter.validate_python(value)
        except ValidationError as error:
            failed.append((max(len(fault["loc"]) for fault in error.errors()), value))
    return max(failed, key=itemgetter(0))[1]  # what came furthest in


def _fraction(text: str) -> Any:
    return float(Fraction(text)) if re.fullmatch(r"-?\d+/[1-9]\d*", text) else text


#: Where something stands in a document: keys and numbers of entries, outermost first.
DocumentPath = tuple[int | str, ...]


def read_document(kind: type[D], document: Any, where: Callable[[DocumentPath], str]) -> D:
    """What a program or a person wrote, as the pydantic model that says what may be written.

    ``where`` says of a place in it how to find it ("plan.yaml, line 7"). Raises InputError with a
    sentence for each fault; of a key that does not exist it tells the nearest that does.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        told: dict[DocumentPath, str] = {}
        for fault in error.errors():
            loc = fault["loc"]
            place = loc if fault["type"] == "missing" else _known_part(document, loc)
            if place in told:  # of several kinds of value none is right
                told[place] += f" or {_said(fault).removeprefix('should be ')}"
            elif fault["type"] == "extra_forbidden":
                told[place] = f"{where(place)}: {UnknownName('key', loc[-1], _keys(kind, loc[:-1]))}"
            else:
                told[place] = f"{where(place)}: {fault_text({**fault, 'loc': place})}"
        raise InputError("\n".join(told.values())) from None


def _known_part(document: Any, place: DocumentPath) -> DocumentPath:
    """As much of a place as the document has: pydantic also names the kind of value that it tried."""
    for count, step in enumerate(place):
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError):
            return place[:count]
    return place


def _keys(kind: Any, place: DocumentPath) -> Iterable[str]:
    """The keys that may stand at a place: a list's item has its kind's, a field its annotation's."""
    for step in place:
        kind = get_args(kind)[0] if isinstance(step, int) else kind.model_fields[step].annotation
    return kind.model_fields  # type: ignore[no-any-return]


def fault_text(fault: Mapping[str, Any]) -> str:
    """One of pydantic's errors in words: ``eps=5000 should be less than or equal to 1``."""
    name = ".".join(map(str, fault["loc"]))
    if fault["type"] == "missing":
        return f"{name!r} is missing"
    return f"{name}={fault['input']!r:.80} {_said(fault)}".removeprefix("=")


def _said(fault: Mapping[str, Any]) -> str:
    said = re.sub("^(Value error,|Input|Value|List|Tuple) | after validation", "", fault["msg"])
    return _SAID.get(fault["type"], said[0].lower() + said[1:])


def value_text(value: Any) -> str:
    """A value as a person would write it; ``read_option`` reads most of these back."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(value_text, value))
    if isinstance(value, dict) and any(isinstance(v, (dict, list, tuple)) for v in value.values()):
        return json.dumps(value)
    if isinstance(value, dict):
        return ",".join(f"{k}={value_text(v)}" for k, v in value.items())
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def kind_text(schema: Mapping[str, Any]) -> str:
    """What kind of value a parameter takes, in a word: ``FLOAT``, ``linf|l2``, ``TEXT,...``."""
    if "anyOf" in schema:
        return "|".join(dict.fromkeys(map(kind_text, schema["anyOf"])))
    if "enum" in schema or "const" in schema:
        return "|".join(map(value_text, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return kind_text(schema.get("items") or {"anyOf": schema.get("prefixItems", [{}])}) + ",..."
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return f"NAME={kind_text(values if isinstance(values, dict) else {})},..."
    return _KINDS.get(schema.get("type", ""), "JSON")


def bounds_text(schema: Mapping[str, Any]) -> str:
    """A parameter's bounds, ``> 0, <= 1``; empty where there are none worth a word."""
    parts = (schema, *schema.get("anyOf", ()))
    # A seed's upper bound tells nobody anything.
    found = [t.format(p[key]) for p in parts for key, t in _BOUNDS.items() if key in p and p[key] < 2**53]
    inner = [bounds_text(p["items"]) for p in parts if p.get("items")]
    return ", ".join(found + [f"each {bounds}" for bounds in inner if bounds])


def default_text(schema: Mapping[str, Any]) -> str:
    """A parameter's default as a person would write it."""
    value = schema.get("default", "required")
    return f"{value:.4g}" if isinstance(value, float) else value_text(value)
