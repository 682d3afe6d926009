"""Parameters as text: reading command-line values, printing types, bounds and errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from fractions import Fraction
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from .errors import InputError, UnknownName, value_repr

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    D = TypeVar("D", bound=BaseModel)


#: Options of every run; a method's parameter of such a name has the method's name before it.
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


#: Readable texts for pydantic's error types about models.
_MESSAGES = dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "should be a mapping of keys")


_BOUNDS = {"exclusiveMinimum": "> {}", "minimum": ">= {}", "exclusiveMaximum": "< {}", "maximum": "<= {}"}


_BOUNDS |= {"minItems": "at least {} items", "maxItems": "at most {} items"}


def option_name(name: str, method: str) -> str:
    """The option of a method's input or parameter: ``step_size`` -> ``--step-size``."""
    if name == "images":
        return "--image"
    return "--" + (f"{method}_{name}" if name in RESERVED_OPTIONS else name).strip("_").replace("_", "-")


def read_option(text: str, field: FieldInfo) -> Any:
    """A parameter's value from its text on the command line.

    Lists are ``a,b`` or JSON, mappings ``a=1,b=2`` or JSON, None is ``none``, and a number may be a fraction
    (``8/255``). Text that is no valid value is returned unchanged, and the method's validation refuses it.
    """
    from pydantic import TypeAdapter, ValidationError  # late: listing methods does not need it

    readings: list[Any] = [None] if text.lower() == "none" else []
    with suppress(ValueError):
        readings.append(json.loads(text))
    # pydantic takes True for 1, and "true" is no number.
    kinds = (field.annotation, *get_args(field.annotation))
    if readings and isinstance(readings[-1], bool) and bool not in kinds:
        readings.pop()
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
    return max(failed, key=itemgetter(0))[1]  # the reading with the deepest error: its outer type is right


def _fraction(text: str) -> Any:
    return float(Fraction(text)) if re.fullmatch(r"-?\d+/[1-9]\d*", text) else text


#: The position of a value in a document: keys and list indices, outermost first.
DocumentPath = tuple[int | str, ...]


def read_document(kind: type[D], document: Any, where: Callable[[DocumentPath], str]) -> D:
    """A document (parsed JSON or YAML) as a pydantic model.

    ``where`` describes a position in it ("plan.yaml, line 7"). Raises InputError with a sentence for each
    error; for an unknown key with the nearest valid one.
    """
    from pydantic import ValidationError  # late: listing methods does not need it

    try:
        return kind.model_validate(document)
    except ValidationError as error:

        def text(fault: Mapping[str, Any], path: DocumentPath) -> str:
            loc = fault["loc"]
            if fault["type"] == "extra_forbidden":
                return f"{where(path)}: {UnknownName('key', loc[-1], _keys(kind, loc[:-1]))}"
            return f"{where(path)}: {fault_text(fault, path)}"

        raise InputError("\n".join(fault_texts(error.errors(), document, text))) from None


def _existing_part(document: Any, path: DocumentPath) -> DocumentPath:
    """The part of a path that exists in the document: pydantic appends the type that it tried."""
    for count, step in enumerate(path):
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError):
            return path[:count]
    return path


def _keys(kind: Any, path: DocumentPath) -> Iterable[str]:
    """The valid keys at a path, from the annotations of the model's fields."""
    for step in path:
        kind = get_args(kind)[0] if isinstance(step, int) else kind.model_fields[step].annotation
    return kind.model_fields  # type: ignore[no-any-return]


def fault_text(fault: Mapping[str, Any], path: DocumentPath) -> str:
    """A pydantic error about the value at a path as text: ``eps=5000 should be less than or equal to 1``."""
    name = ".".join(map(str, path))
    if fault["type"] == "missing":
        return f"{name!r} is missing"
    return f"{name}={value_repr(fault['input'])} {_message(fault)}".removeprefix("=")


def fault_texts(
    faults: Iterable[Mapping[str, Any]],
    values: Any,
    text: Callable[[Mapping[str, Any], DocumentPath], str] = fault_text,
) -> list[str]:
    """Pydantic errors about ``values`` as texts: of a value of several types one, with what each requires.

    ``text`` is called with the first error of each value, and its position in ``values``.
    """
    texts: dict[DocumentPath, str] = {}
    for fault in faults:
        path = fault["loc"] if fault["type"] == "missing" else _existing_part(values, fault["loc"])
        if path in texts:  # a union: the value is of none of its types
            texts[path] += f" or {_message(fault).removeprefix('should be ')}"
        else:
            texts[path] = text(fault, path)
    return list(texts.values())


def _message(fault: Mapping[str, Any]) -> str:
    text = re.sub("^(Value error,|Input|Value|List|Tuple) | after validation", "", fault["msg"])
    return _MESSAGES.get(fault["type"], text[0].lower() + text[1:])


def value_text(value: Any) -> str:
    """A value as text on the command line; ``read_option`` reads most of these back."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(value_text, value))
    if isinstance(value, dict) and any(isinstance(v, (dict, list, tuple)) for v in value.values()):
        return json.dumps(value)
    if isinstance(value, dict):
        return ",".join(f"{k}={value_text(v)}" for k, v in value.items())
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def kind_text(schema: Mapping[str, Any]) -> str:
    """A parameter's type as a placeholder: ``FLOAT``, ``linf|l2``, ``TEXT,...``."""
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
    """A parameter's bounds, ``> 0, <= 1``; empty if there are none."""
    parts = (schema, *schema.get("anyOf", ()))
    # Not a seed's upper bound of 2**63, which is no information.
    bounds = [t.format(p[key]) for p in parts for key, t in _BOUNDS.items() if key in p and p[key] < 2**53]
    inner = [bounds_text(p["items"]) for p in parts if p.get("items")]
    return ", ".join(bounds + [f"each {text}" for text in inner if text])


def input_help(text: str, default: Any) -> str:
    """The help text of an input's role, with a method's own default for it; None: the role's."""
    if default is None:
        return text
    return re.sub(r" \(default: [^()]*\)$", "", text) + f" (default: {default})"


def default_text(schema: Mapping[str, Any]) -> str:
    """A parameter's default as text on the command line; "required" if there is none."""
    value = schema.get("default", "required")
    return f"{value:.4g}" if isinstance(value, float) else value_text(value)
