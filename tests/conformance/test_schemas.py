"""A method's signature, its JSON schema and its command line mean the same values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import NAMES

from phosphene import methods
from phosphene.options import is_flag, parameter_schemas, read_option, write_option
from phosphene.spec import Invariant, MethodSpec

each_method = pytest.mark.parametrize("name", NAMES)


def values_of(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a parameter's JSON schema allows, from its own bounds."""
    if "anyOf" in schema:
        return st.one_of([values_of(branch) for branch in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "integer":
            low, high = schema.get("minimum"), schema.get("maximum")
            if "exclusiveMinimum" in schema:
                low = schema["exclusiveMinimum"] + 1
            if "exclusiveMaximum" in schema:
                high = schema["exclusiveMaximum"] - 1
            return st.integers(low, high)
        case "number":
            low = schema.get("minimum", schema.get("exclusiveMinimum"))
            high = schema.get("maximum", schema.get("exclusiveMaximum"))
            return st.floats(
                low,
                high,
                exclude_min="exclusiveMinimum" in schema,
                exclude_max="exclusiveMaximum" in schema,
                allow_nan=False,
                allow_infinity=False,
            )
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "string":
            return st.from_regex(schema["pattern"]) if "pattern" in schema else st.text("abc.0", min_size=1)
        case "array" if "prefixItems" in schema:
            return st.tuples(*(values_of(item) for item in schema["prefixItems"])).map(list)
        case "array":
            most = min(schema.get("maxItems", 4), 4)
            least = schema.get("minItems", 0)
            return st.lists(values_of(schema["items"]), min_size=least, max_size=max(least, most))
        case "object" if isinstance(schema.get("additionalProperties"), dict):
            inside = values_of(schema["additionalProperties"])
            return st.dictionaries(st.text("abc", min_size=1), inside, max_size=3)
    pytest.fail(f"a command line cannot offer {schema}")


def from_a_command_line(parameter: str, value: Any, schema: Mapping[str, Any]) -> Any:
    """A value written as an option and read again."""
    written = write_option(parameter, value, schema)
    if is_flag(schema):
        return not written[0].startswith("--no-")
    (text,) = written[1:] or [written[0].partition("=")[2]]
    return read_option([text], schema)


@each_method
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_values_mean_the_same_as_json_as_words_and_in_python(name: str, data: st.DataObject) -> None:
    method = methods[name]
    schemas = parameter_schemas(json.loads(json.dumps(method.spec.params_schema)))
    drawn = {name: data.draw(values_of(schema), label=name) for name, schema in schemas.items()}
    in_python = method.validate(drawn)
    from_json = method.spec.params.model_validate_json(json.dumps(drawn))
    assert {parameter: getattr(from_json, parameter) for parameter in in_python} == in_python
    typed = {p: from_a_command_line(p, value, schemas[p]) for p, value in drawn.items()}
    assert method.validate(typed) == in_python
    # What provenance keeps can be given again.
    kept = method.spec.params(**in_python).model_dump(mode="json")
    assert method.validate(json.loads(json.dumps(kept))) == in_python


@each_method
def test_defaults_are_what_the_schema_says(name: str) -> None:
    method = methods[name]
    schema = method.spec.params_schema
    required = set(schema.get("required", []))
    stated = {n: s["default"] for n, s in schema["properties"].items() if n not in required}
    needed = {n: method.spec.quick.get(n) for n in required}
    for values in (stated, method.spec.quick, method.spec.demo):
        method.validate(needed | values)


@each_method
def test_spec_is_json_and_its_invariants_come_back(name: str) -> None:
    spec = methods[name].spec
    document = json.loads(json.dumps(spec.model_dump(mode="json")))
    assert document["name"] == spec.name
    assert document["params_schema"] == json.loads(json.dumps(spec.params_schema))
    again = MethodSpec.model_validate(
        {n: v for n, v in document.items() if n != "params_schema"} | {"params": spec.params}
    )
    assert again.invariants == spec.invariants
    assert all(type(one) is Invariant.kinds[one.kind] for one in again.invariants)
    assert again.cost == spec.cost
