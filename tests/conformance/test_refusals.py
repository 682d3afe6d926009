"""Bad input is refused by every method, in a sentence, before the model has seen a single picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import NAMES, awkward, inputs_of, params_of, traffic

from phosphene import Method, Model, PhospheneError, methods
from phosphene.datasets import TensorDataset

each_method = pytest.mark.parametrize("name", NAMES)


def assert_refused(
    method: Method[..., Any], model: Model, inputs: dict[str, Any], params: dict[str, Any], what: str
) -> None:
    model.anatomy  # noqa: B018  - what the wrapper looks at once is not the method's work
    with traffic(model.module) as seen:
        try:
            method(**inputs, **params)
        except PhospheneError as refusal:
            sentence = str(refusal)
        else:
            pytest.fail(f"{what} was accepted")
    assert seen.passes == 0, f"{what} was refused after {seen.passes} forward passes"
    assert len(sentence) > 15, f"{what}: {sentence!r} explains nothing"


def bad_pictures(good: Tensor) -> Iterator[tuple[str, Any]]:
    yield "a picture without a batch axis", good[0]
    yield "a five-dimensional tensor", good[None]
    yield "an empty batch", good[:0]
    yield "pictures of no size", good[:, :, :0]
    yield "bytes", (good * 255).to(torch.uint8)
    yield "an array that is not a tensor", good.numpy()
    yield "a list", good.tolist()
    for what, value in (("NaN", float("nan")), ("inf", float("inf")), ("1.5", 1.5), ("-0.5", -0.5)):
        spoiled = good.clone()
        spoiled[-1, -1, -1, -1] = value
        yield f"a pixel of {what}", spoiled


def bad_values(role: str, good: Any, images: Tensor | None) -> Iterator[tuple[str, Any]]:
    """What must be refused in an input of this role."""
    match role:
        case "model":
            yield "a bare module", good.module
            yield "a name", "resnet18"
        case "images" | "texture" | "styles":
            yield from bad_pictures(good)
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
            yield "half a place", "conv1[0,1]"
            yield "a number that is no index", 1.5
            if images is not None:
                yield "too few classes", [0] * (len(images) - 1)
        case "dataset":
            yield "an empty data set", TensorDataset(torch.zeros(0, 3, 32, 32))
            yield "a path", "somewhere"
            yield from bad_pictures(torch.rand(4, 3, 32, 32))
        case "stylizer":
            yield "a path", "somewhere"
        case _:
            pytest.fail(f"no bad values are known for the role {role!r}: add them here")


@each_method
def test_bad_inputs_are_refused_before_any_work(name: str) -> None:
    method, model = methods[name], awkward()
    inputs = inputs_of(method, model)
    images = inputs.get("images")
    for declared in method.spec.inputs:
        for what, value in bad_values(declared.role, inputs[declared.name], images):
            assert_refused(
                method, model, inputs | {declared.name: value}, params_of(method), f"{declared.name}: {what}"
            )
        if declared.required:
            rest = {n: v for n, v in inputs.items() if n != declared.name}
            assert_refused(method, model, rest, params_of(method), f"a call without {declared.name}")


@each_method
def test_too_many_positional_inputs_are_refused(name: str) -> None:
    method, model = methods[name], awkward()
    inputs = inputs_of(method, model)
    with traffic(model.module) as seen, pytest.raises(PhospheneError, match="inputs"):
        method(*inputs.values(), 3)
    assert seen.passes == 0


@each_method
def test_unknown_layers_are_refused_with_the_nearest(name: str) -> None:
    method, model = methods[name], awkward()
    inputs = inputs_of(method, model)
    for parameter in method._layers:
        kind = str(method.spec.params.model_fields[parameter].annotation)
        unknown = ["no_such_layer"] if "list" in kind or "tuple" in kind else "no_such_layer"
        params = params_of(method) | {parameter: unknown}
        assert_refused(method, model, inputs, params, f"{parameter}={unknown!r}")


@each_method
def test_unknown_parameters_and_values_out_of_bounds_are_refused(name: str) -> None:
    method, model = methods[name], awkward()
    inputs = inputs_of(method, model)
    assert_refused(method, model, inputs, params_of(method) | {"no_such": 1}, "an unknown parameter")
    for parameter, schema in method.spec.params_schema["properties"].items():
        for value in out_of_bounds(schema):
            params = params_of(method) | {parameter: value}
            assert_refused(method, model, inputs, params, f"{parameter}={value!r}")


def out_of_bounds(schema: dict[str, Any]) -> list[Any]:
    """Values just outside what a parameter's schema allows, and one of another kind."""
    branches = schema.get("anyOf", [schema])
    if any(b.get("type") == "string" and "enum" not in b for b in branches):
        return []  # a free string takes anything; what it names is tried elsewhere
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
