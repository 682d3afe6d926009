"""Values that a parameter is tried with, from its schema alone, and parameters for a longer call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import PhospheneError
from .cases import MOST_PASSES, Case, _choices, _size_and_layers, declared_cost

if TYPE_CHECKING:
    from ..registry.method import Method

#: The largest number without a declared cost that is tried for a parameter.
LARGEST = 64


def largest_accepted(method: Method[..., Any], arguments: Mapping[str, Any], name: str, most: int) -> int:
    """``most``, halved until the method accepts it for a parameter beside the arguments; at least 1."""
    while most > 1:
        try:
            method.validate({**arguments, name: most})
        except PhospheneError:
            most //= 2
        else:
            break
    return most


def candidate_values(method: Method[..., Any], name: str, schema: Mapping[str, Any], case: Case) -> list[Any]:
    """Valid values of a parameter that differ from the one in the case, and are cheap to run."""
    arguments = case.arguments(method)
    usual = arguments.get(name, schema.get("default"))
    values = _layer_values(schema, case) if name in method.layers else _values(schema, usual)
    accepted = []
    for value in values:
        if (
            _is_same(value, usual)
            or value in accepted
            or not _cheap(method, case, {**case.params, name: value})
        ):
            continue
        try:
            method.validate({**arguments, name: value})
        except PhospheneError:
            continue
        accepted.append(value)
    return accepted


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(one) == list(other)
    return bool(one == other)


def _cheap(method: Method[..., Any], case: Case, params: Mapping[str, Any]) -> bool:
    cost = declared_cost(method, replace(case, params=dict(params)))
    if cost is None:
        return all(
            not isinstance(v, int) or v <= max(LARGEST, method.spec.quick.get(n) or 0)
            for n, v in params.items()
        )
    return sum(cost) <= 3 * MOST_PASSES


def _layer_values(schema: Mapping[str, Any], case: Case) -> list[Any]:
    layers = _size_and_layers(case.network)[1]
    chosen = layers[:: max(1, len(layers) // 5)]
    values: list[Any] = []
    for branch in schema.get("anyOf", [schema]):
        match branch.get("type"):
            case "array":
                values += [[layer] for layer in chosen]
            case "object":
                values += [{layer: 1.0} for layer in chosen]
            case "string":
                values += chosen
    return values


def _values(schema: Mapping[str, Any], usual: Any) -> list[Any]:
    values: list[Any] = list(_choices(schema))
    for branch in schema.get("anyOf", [schema]):
        match branch.get("type"):
            case "integer":
                low = branch.get("minimum", branch.get("exclusiveMinimum", 0) + 1)
                near = [usual + 1, low, 2 * usual, usual // 2, usual - 1] if isinstance(usual, int) else []
                values += [*near, low, low + 1, 3, 8, 16, branch.get("maximum", low + 2)]
            case "number":
                edges = ("minimum", "maximum", "exclusiveMaximum")
                ends = [float(branch[edge]) for edge in edges if edge in branch]
                if isinstance(usual, (int, float)):
                    values += [2.0 * usual, *ends, usual / 2, usual + 1.0, 0.5 * (usual + 1.0)]
                values += [0.5, *ends, 2.0, 10.0]
            case "null":
                values.append(None)
            case "array" if "prefixItems" in branch:
                columns = [_values(item, None)[:4] for item in branch["prefixItems"]]
                values += [list(row) for row in zip(*columns, strict=False)]
            case "array":
                values += _lists(branch, usual)
    return values


def _lists(branch: Mapping[str, Any], usual: Any) -> list[Any]:
    least, most = branch.get("minItems", 0), branch.get("maxItems", 4)
    if not (items := _values(branch.get("items", {}), None)):
        return []  # free text: no valid value is sure to exist
    lists = [[item] * max(1, least) for item in items[:6]] + (
        [items[: max(2, least)]] if len(items) > 1 else []
    )
    if isinstance(usual, (list, tuple)) and usual:
        lists += [list(usual)[:-1], list(usual)[::-1]]
    return [values for values in lists if least <= len(values) <= most] + ([[]] if least == 0 else [])


def larger_parameters(method: Method[..., Any], case: Case, limit: int) -> dict[str, Any]:
    """The parameters of a longer call: between the quick values and the defaults, up to ``limit`` passes."""
    quick = dict(method.spec.quick)
    defaults = {n: f.default for n, f in method.spec.params.model_fields.items() if n in quick}
    for share in (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01):
        params = {n: _between(value, defaults[n], share) for n, value in quick.items()}
        if _accepts(method, case, params, limit):
            return params
    return quick


def _between(quick: Any, default: Any, share: float) -> Any:
    numbers = isinstance(quick, (int, float)) and isinstance(default, (int, float))
    if not numbers or isinstance(quick, bool):
        return default if share == 1.0 and type(default) is not type(...) else quick
    value = quick + share * (default - quick)
    return round(value) if isinstance(quick, int) and isinstance(default, int) else value


def _accepts(method: Method[..., Any], case: Case, params: Mapping[str, Any], limit: int) -> bool:
    try:
        method.validate({**case.arguments(method), **params})
    except PhospheneError:
        return False
    cost = declared_cost(method, replace(case, params=dict(params)))
    if cost is None:
        return all(not isinstance(v, (int, float)) or v <= LARGEST for v in params.values())
    return sum(cost) <= limit
