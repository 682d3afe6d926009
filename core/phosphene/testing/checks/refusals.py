"""Checks that invalid inputs and parameters are refused before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import PhospheneError
from ...roles import ROLES, InputContext
from ..cases import Case, properties_of
from ..networks import make_network
from ..observation import count_passes
from .base import register_check

if TYPE_CHECKING:
    from .base import AnyMethod


def _assert_refused(method: AnyMethod, inputs: dict[str, Any], params: dict[str, Any], what: str) -> None:
    """Assert that a call raises a PhospheneError with a message, before any forward pass."""
    model = next((v for v in inputs.values() if hasattr(v, "module")), None) or make_network("double")
    with count_passes(model.module) as passes:
        try:
            method(**inputs, **params)
        except PhospheneError as refusal:
            message = str(refusal)
        except Exception as crash:
            raise AssertionError(f"{what} raised {type(crash).__name__}: {crash}") from crash
        else:
            raise AssertionError(f"{what} was accepted")
    assert passes.started == 0, f"{what} was refused after {passes.started} forward passes"
    assert len(message) > 15, f"{what}: the message {message!r} explains nothing"


@register_check(
    "method",
    "Invalid input is refused with a message, before any work.",
    "roles check inputs one by one; check combinations in the first lines of the function",
)
def refuses_bad_input(method: AnyMethod) -> None:
    case = Case("double", count=3)
    inputs = case.inputs(method, case.model())
    params, owner = case.arguments(method), method.spec.input("model")
    context = InputContext(inputs[owner.name] if owner else None, inputs)
    for declared in method.spec.inputs:
        for what, value in ROLES[declared.role].bad_values(inputs[declared.name], context):
            _assert_refused(method, inputs | {declared.name: value}, params, f"{declared.name}: {what}")
        if declared.required:
            rest = {n: v for n, v in inputs.items() if n != declared.name}
            _assert_refused(method, rest, params, f"a call without {declared.name}")


@register_check(
    "method",
    "Parameters outside their bounds, unknown ones and unknown layers are refused, before any work.",
    "bounds in the annotation: Annotated[float, Field(gt=0)]; layers are LayerName",
)
def refuses_bad_parameters(method: AnyMethod) -> None:
    case = Case("double", count=3)
    inputs, params = case.inputs(method, case.model()), case.arguments(method)
    _assert_refused(method, inputs, params | {"no_such_parameter": 1}, "an unknown parameter")
    for name, schema in properties_of(method.spec.params_schema).items():
        bad = ["no_such_layer", ["no_such_layer"]] if name in method.layers else out_of_bounds(schema)
        for value in bad:
            _assert_refused(method, inputs, params | {name: value}, f"{name}={value!r}")


def out_of_bounds(schema: dict[str, Any]) -> list[Any]:
    """Values just outside the bounds of a parameter's schema, and one of another type."""
    branches = schema.get("anyOf", [schema])
    if any(b.get("type") == "string" and "enum" not in b for b in branches):
        return []  # a free string accepts any text
    values: list[Any] = ["no such value"]
    kinds = {branch.get("type") for branch in branches}
    if kinds & {"integer", "number"} and "boolean" not in kinds:
        values.append(True)
    for branch in branches:
        step = 1 if branch.get("type") == "integer" else 1e-3
        if "minimum" in branch:
            values.append(branch["minimum"] - step)
        if "maximum" in branch:
            values.append(branch["maximum"] + step)
        values += [branch[bound] for bound in ("exclusiveMinimum", "exclusiveMaximum") if bound in branch]
        if branch.get("type") == "number":
            values.append(float("nan"))
    return values
