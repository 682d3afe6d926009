"""Checks of what a method declares: documentation, defaults, JSON and command line, oracle."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ...parameter_text import read_option, value_text
from ...registry.method_info import NOMINAL_SIZES
from ...spec.spec import MethodSpec
from ..cases import Case

if TYPE_CHECKING:
    from .base import AnyMethod

from .base import ARITHMETIC_UNTESTED, register_check
from .oracle_calls import recorded_calls


@register_check(
    "method", "It is documented: summary, parameters, cost and sources.", "the @method(...) arguments"
)
def documented(method: AnyMethod) -> None:
    spec = method.spec
    assert spec.summary.endswith((".", ":", "?")), f"the summary is not a sentence: {spec.summary!r}"
    properties = spec.params_schema.get("properties", {})
    undocumented = [n for n, s in properties.items() if not s.get("description") and n != method.seed]
    assert not undocumented, f"parameters without a description: {', '.join(undocumented)}"
    document = json.loads(json.dumps(spec.model_dump(mode="json")))
    del document["params_schema"]
    again = MethodSpec.model_validate(document | {"params": spec.params})
    same = again.invariants == spec.invariants and again.relations == spec.relations
    assert same and again.cost == spec.cost, "the spec changes when it is written to JSON and read again"


@register_check(
    "method",
    "Defaults, quick and demo parameters are within the schema's own bounds, and have a cost.",
    "quick=, demo=; cost=: length(either(param.layers, size.stages)) for a list that may be None",
)
def valid_defaults(method: AnyMethod) -> None:
    schema = method.spec.params_schema
    required = set(schema.get("required", []))
    defaults = {n: s["default"] for n, s in schema.get("properties", {}).items() if n not in required}
    for name in required:
        assert name in method.spec.quick, f"{name!r} has no default: give quick= a value for test calls"
    needed = {n: method.spec.quick[n] for n in required}
    sizes = NOMINAL_SIZES | {"attention_layers": 12, "attention_heads": 144}
    for values in (defaults, method.spec.quick, method.spec.demonstration()[1]):
        params = method.validate(needed | values)
        if method.spec.cost is not None:  # an error in a call would be a refusal of that call
            method.spec.cost.evaluate(params, **sizes)


@register_check(
    "method",
    "Parameters mean the same in Python, as JSON and on the command line.",
    "the parameters' annotations",
)
def same_values_everywhere(method: AnyMethod) -> None:
    arguments = Case().arguments(method)
    in_python = method.validate(arguments)
    as_json = method.spec.params(**in_python).model_dump(mode="json")
    assert method.validate(json.loads(json.dumps(as_json))) == in_python, (
        "the values change when they are written to JSON and read again"
    )
    for name, field in method.spec.params.model_fields.items():
        text = value_text(as_json[name])
        read = read_option(text, field)
        assert method.validate(arguments | {name: read}) == in_python, f"{name}: {text!r} is read as {read!r}"


@register_check(
    "method",
    "On an input with a closed-form answer, it returns that answer.",
    "the oracle",
    lambda method: (
        None
        if method.spec.oracle
        else "it has no oracle; its relations are tested"
        if method.spec.relations
        else ARITHMETIC_UNTESTED
    ),
)
def oracle(method: AnyMethod) -> None:
    recorded_calls(method)
