"""Parameters as a command line writes them, and back again, by their JSON schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

Schema = Mapping[str, Any]

_JSON_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
_SHOWN_KINDS = {
    "boolean": "true|false", "integer": "INT", "number": "FLOAT", "string": "TEXT", "null": "none",
}  # fmt: skip


def parameter_schemas(schema: Schema) -> dict[str, Schema]:
    """Each parameter's own schema out of a method's, references resolved."""
    definitions = schema.get("$defs", {})

    def resolved(part: Any) -> Any:
        if isinstance(part, Mapping):
            if "$ref" in part:
                rest = {k: v for k, v in part.items() if k != "$ref"}
                return resolved({**definitions[part["$ref"].rpartition("/")[2]], **rest})
            return {k: resolved(v) for k, v in part.items()}
        return [resolved(p) for p in part] if isinstance(part, list) else part

    return {name: resolved(part) for name, part in schema.get("properties", {}).items()}


def option_name(name: str) -> str:
    """``step_size`` -> ``step-size``."""
    return name.strip("_").replace("_", "-")


def is_flag(schema: Schema) -> bool:
    """Whether a parameter is written ``--x`` or ``--no-x``."""
    return _kinds(schema) == {"boolean"}


def read_option(texts: Sequence[str], schema: Schema) -> Any:
    """A parameter's value from what was written for it, once or repeatedly.

    Lists are ``a,b`` or JSON, mappings ``a=1,b=2`` or JSON, nothing is ``none``, and a number may
    be a fraction (``8/255``). What fits nothing stays text, for the validation to speak about.
    """
    values = [_read(text, schema) for text in texts]
    if len(values) == 1 or not _kinds(schema) & {"array", "object"}:
        return values[-1]
    if all(isinstance(v, dict) for v in values):
        return {key: item for value in values for key, item in value.items()}
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def _read(text: str, schema: Schema) -> Any:
    kinds = _kinds(schema)
    if kinds == {"string"}:
        return text
    if "null" in kinds and text.lower() == "none":
        return None
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    kind = _JSON_KINDS.get(type(value))
    if kind in kinds or (kind in ("integer", "number") and kinds & {"integer", "number"}):
        return value
    if "number" in kinds and re.fullmatch(r"-?\d+/[1-9]\d*", text):
        return float(Fraction(text))
    if "object" in kinds and "=" in text:
        pairs = (pair.partition("=") for pair in text.split(","))
        return {k.strip(): _read(v.strip(), _part(schema, "additionalProperties")) for k, _, v in pairs}
    if "array" in kinds and ("string" not in kinds or "," in text):
        items = _part(schema, "items")
        return [_read(item.strip(), items) for item in text.split(",")] if text else []
    return text


def write_option(name: str, value: Any, schema: Schema) -> list[str]:
    """The words that ``read_option`` reads back as ``value``."""
    value = json.loads(json.dumps(value))  # tuples as lists
    if is_flag(schema):
        return [f"--{option_name(name)}" if value else f"--no-{option_name(name)}"]
    for text in (_plain(value), json.dumps(value)):
        if _read(text, schema) == value:
            break
    # Written with "=", so that a value that begins with a dash is not taken for an option.
    return [f"--{option_name(name)}={text}"] if text.startswith("-") else [f"--{option_name(name)}", text]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_plain, value))
    if isinstance(value, dict):
        return ",".join(f"{k}={_plain(v)}" for k, v in value.items())
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _kinds(schema: Schema) -> set[str]:
    if "anyOf" in schema:
        return set().union(*map(_kinds, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return {"null" if v is None else _JSON_KINDS[type(v)] for v in values}
    kind = schema.get("type", ["null", "boolean", "integer", "number", "string", "array", "object"])
    return {kind} if isinstance(kind, str) else set(kind)


def _part(schema: Schema, key: str) -> Schema:
    """The schema of a list's items or a mapping's values; an empty one allows anything."""
    for option in (schema, *schema.get("anyOf", ())):
        if isinstance(option.get(key), Mapping):
            found: Schema = option[key]
            return found
        if key == "items" and option.get("prefixItems"):
            return {"anyOf": option["prefixItems"]}
    return {}


def kind_text(schema: Schema) -> str:
    """What kind of value a parameter takes, in a word: ``FLOAT``, ``linf|l2``, ``TEXT,...``."""
    if "anyOf" in schema:
        return "|".join(dict.fromkeys(kind_text(s) for s in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return "|".join(map(_plain, schema.get("enum", [schema.get("const")])))
    kind = schema.get("type", "")
    if kind == "array":
        return f"{kind_text(_part(schema, 'items'))},..."
    if kind == "object":
        return f"NAME={kind_text(_part(schema, 'additionalProperties'))},..."
    return _SHOWN_KINDS.get(kind, "JSON")


def bounds_text(schema: Schema) -> str:
    """A parameter's bounds, ``> 0, <= 1``; empty where there are none worth a word."""
    words = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    words |= {"minItems": "at least", "maxItems": "at most"}
    found = []
    for part in (schema, *schema.get("anyOf", ())):
        for key, word in words.items():
            if key in part and abs(part[key]) < 2**53:  # a seed's upper bound tells nobody anything
                found.append(f"{word} {part[key]}" + (" items" if "Items" in key else ""))
        if isinstance(part.get("items"), Mapping) and (inner := bounds_text(part["items"])):
            found.append(f"each {inner}")
    return ", ".join(found)


def default_text(schema: Schema) -> str:
    """A parameter's default as a person would write it; empty where it is none or must be given."""
    value = schema.get("default")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else _plain(value)
