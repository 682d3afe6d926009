"""Checks that invalid inputs and parameters are refused before any work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...data.datasets import TensorDataset
from ...errors import PhospheneError
from ..cases import Case, properties_of
from ..networks import make_network
from ..observation import (
    count_passes,
)

if TYPE_CHECKING:
    from .base import AnyMethod

from .base import register_check


def _assert_refused(method: AnyMethod, inputs: dict[str, Any], params: dict[str, Any], what: str) -> None:
    model = next((v for v in inputs.values() if hasattr(v, "module")), make_network("double"))
    model.structure  # noqa: B018
    with count_passes(model.module) as passes:
        try:
            method(**inputs, **params)
        except PhospheneError as refusal:
            sentence = str(refusal)
        except Exception as crash:
            raise AssertionError(f"{what} raised {type(crash).__name__}: {crash}") from crash
        else:
            raise AssertionError(f"{what} was accepted")
    assert passes.started == 0, f"{what} was refused after {passes.started} forward passes"
    assert len(sentence) > 15, f"{what}: {sentence!r} explains nothing"


@register_check(
    "method",
    "Invalid input is refused with a message, before any work.",
    "roles check inputs one by one; check combinations in the first lines of the function",
)
def refuses_bad_input(method: AnyMethod) -> None:
    case = Case("double", count=3)
    inputs = case.inputs(method, case.model())
    params = case.arguments(method)
    for declared in method.spec.inputs:
        for what, value in bad_values(declared.role, inputs[declared.name], inputs.get("images")):
            if "channels" in what and not method.spec.input("model"):
                continue  # without a model, any number of channels is valid
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


def bad_values(role: str, good: Any, images: Tensor | None) -> Iterator[tuple[str, Any]]:
    """Values that must be refused for an input of this role, each with its description."""
    match role:
        case "model":
            yield "a bare module", good.module
            yield "a name", "resnet18"
        case "images" | "texture" | "styles":
            yield from _bad_images(good)
            yield "two channels", good[:, :2]
            yield "four channels", torch.cat([good, good[:, :1]], 1)
        case "labels":
            yield "too few labels", good[:-1]
            yield "labels that are fractions", good.float()
            yield "labels of two axes", good[:, None]
            yield "a label that no class has", torch.full_like(good, 99)
            yield "a negative label", torch.full_like(good, -1)
            yield "nothing", None
        case "target":
            yield "a class that does not exist", 99
            yield "a negative class", -1
            yield "the name of no class", "no such class"
            yield "a layer that does not exist", "no_such_layer[0]"
            yield "two coordinates", "conv1[0,1]"
            yield "a number that is no index", 1.5
            if images is not None:
                yield "too few classes", [0] * (len(images) - 1)
        case "dataset":
            yield "an empty data set", TensorDataset(torch.zeros(0, 3, 32, 32))
            yield "a path", "somewhere"
            yield from _bad_images(torch.rand(4, 3, 32, 32))
        case _:
            yield "a path", "somewhere"


def _bad_images(good: Tensor) -> Iterator[tuple[str, Any]]:
    yield "an image without a batch axis", good[0]
    yield "a five-dimensional tensor", good[None]
    yield "an empty batch", good[:0]
    yield "images of no size", good[:, :, :0]
    yield "bytes", (good * 255).to(torch.uint8)
    yield "an array that is not a tensor", good.numpy()
    yield "a list", good.tolist()
    for what, value in (("NaN", float("nan")), ("inf", float("inf")), ("1.5", 1.5), ("-0.5", -0.5)):
        invalid = good.clone()
        invalid[-1, -1, -1, -1] = value
        yield f"a pixel of {what}", invalid


def out_of_bounds(schema: dict[str, Any]) -> list[Any]:
    """Values just outside the bounds of a parameter's schema, and one of another type."""
    branches = schema.get("anyOf", [schema])
    if any(b.get("type") == "string" and "enum" not in b for b in branches):
        return []  # a free string accepts any text
    values: list[Any] = ["no such value"]
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
