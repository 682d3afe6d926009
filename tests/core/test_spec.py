"""Specs: invalid declarations are refused, valid ones survive JSON."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, create_model

from phosphene import InputError, UnknownName, load_model, method
from phosphene.results import AdversarialExamples, Attribution
from phosphene.roles import Images, LayerName, Model, Seed, Target
from phosphene.spec import (
    Cost,
    Expression,
    Invariant,
    MethodSpec,
    Nonnegative,
    ParameterGroup,
    PixelRange,
    Reference,
    SameShape,
    UnitRange,
    WithinBall,
    ceil,
    either,
    length,
    maximum,
    minimum,
    param,
    size,
)

PARAMS = create_model("params", eps=(float, 0.1), norm=(str, "linf"), relu=(bool, True))


def spec(**more: Any) -> MethodSpec:
    defaults = {
        "name": "attacks.example", "family": "attacks", "title": "Example", "summary": "An example.",
        "description": "", "inputs": (), "params": PARAMS, "returns": "Attribution",
    }  # fmt: skip
    return MethodSpec(**(defaults | more))


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        ("invariants", {"invariants": [WithinBall(radius="epz", norm="norm")]}),
        ("invariants", {"invariants": [WithinBall(radius="eps", norm="nrom")]}),
        ("when", {"invariants": [Nonnegative(when=param.rely.is_true())]}),
        ("when", {"invariants": [Nonnegative(when=~param.rely.is_true())]}),
        ("cost", {"cost": Cost(forward=size.images * param.epz)}),
        ("cost", {"cost": Cost(forward=size.images, backward=param.rely)}),
        ("quick", {"quick": {"epz": 1}}),
        ("demo", {"demo": {"epz": 1}}),
    ],
)
def test_spec_that_names_an_unknown_parameter_is_refused_with_the_nearest(
    where: str, wrong: dict[str, Any]
) -> None:
    with pytest.raises(UnknownName, match="did you mean '(eps|norm|relu)'") as refusal:
        spec(**wrong)
    assert "attacks.example" in str(refusal.value)


def test_unknown_kind_of_invariant_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'nonnegative'"):
        spec(invariants=[{"kind": "nonnegativ"}])
    with pytest.raises(UnknownName):
        spec(invariants=[{"field": "maps"}])


def test_invariant_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError):
        spec(invariants=[{"kind": "nonnegative", "feild": "maps"}])


@pytest.mark.parametrize(
    "name", ["example", "Attacks.example", "attacks.ex-ample", "attacks.a.b", ".example"]
)
def test_ill_formed_method_name_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        spec(name=name)


def test_spec_is_frozen() -> None:
    with pytest.raises(ValidationError):
        spec().family = "style"


def test_invariants_survive_a_round_trip_through_json() -> None:
    promises = (
        WithinBall(radius="eps", norm="norm"),
        PixelRange(field="adversarial", when=param.relu.is_true()),
        SameShape(),
        Nonnegative(when=~param.relu.is_true()),
        UnitRange(field="maps"),
    )
    document = json.loads(json.dumps(spec(invariants=promises).model_dump(mode="json")))
    again = spec(invariants=document["invariants"])
    assert again.invariants == promises
    assert [type(i) for i in again.invariants] == [type(i) for i in promises]


def test_new_kind_of_invariant_exists_once_it_is_defined() -> None:
    class Bright(Invariant):
        """Maps reach a level."""

        kind: Literal["bright_in_a_test"] = "bright_in_a_test"
        level: float

        def check(self, inputs: Any, params: Any, result: Any) -> None:
            assert result.maps.max() >= self.level

    try:
        (invariant,) = spec(invariants=[{"kind": "bright_in_a_test", "level": 0.5}]).invariants
        assert invariant == Bright(level=0.5)
    finally:
        del Invariant.kinds["bright_in_a_test"]


def test_invariant_without_a_kind_is_refused_where_it_is_defined() -> None:
    with pytest.raises(TypeError, match="kind"):

        class Nameless(Invariant):
            pass


def test_invariant_of_a_kind_that_another_module_has_is_refused() -> None:
    with pytest.raises(TypeError, match="'nonnegative' is one of phosphene.spec"):

        class Nonnegative(Invariant):
            kind: Literal["nonnegative"] = "nonnegative"


def attribution(*values: float) -> Attribution:
    maps = torch.tensor(values, dtype=torch.float64).reshape(1, 1, -1)
    return Attribution(images=maps[None], maps=maps, targets=("x",))


@pytest.mark.parametrize(
    ("promise", "satisfying", "violating"),
    [
        (Nonnegative(), (0.0, 7.0), (-1e-9, 7.0)),
        (UnitRange(), (0.0, 1.0), (0.0, 1.0 + 1e-9)),
        (UnitRange(), (0.5, 0.5), (float("nan"), 0.5)),
        (Nonnegative(), (0.5, 0.5), (float("nan"), 0.5)),
        (PixelRange(), (0.0, 1.0), (-0.1, 1.0)),
    ],
)
def test_invariants_detect_violations(
    promise: Invariant, satisfying: tuple[float, ...], violating: tuple[float, ...]
) -> None:
    promise.check({}, {}, attribution(*satisfying))
    with pytest.raises(AssertionError):
        promise.check({}, {}, attribution(*violating))


def test_same_shape_compares_with_the_input_images() -> None:
    result = attribution(0.0, 1.0)
    SameShape().check({"images": torch.zeros(1, 1, 1, 2)}, {}, result)
    with pytest.raises(AssertionError, match="shape"):
        SameShape().check({"images": torch.zeros(1, 1, 2, 1)}, {}, result)


def test_ball_is_measured_in_its_norm() -> None:
    zeros, moved = torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1, 4), 0.1)
    fields = dict.fromkeys(
        ("labels", "before", "after", "confidence_before", "confidence_after", "success"), torch.zeros(1)
    )
    names = {"names_before": ("a",), "names_after": ("b",)}
    result = AdversarialExamples(images=zeros, adversarial=moved, **fields, **names)
    promise = WithinBall(radius="eps", norm="norm")
    for norm, distance in (("linf", 0.1), ("l2", 0.2), ("l1", 0.4)):
        promise.check({}, {"eps": distance + 1e-5, "norm": norm}, result)
        with pytest.raises(AssertionError, match="outside the ball"):
            promise.check({}, {"eps": distance - 1e-4, "norm": norm}, result)


def test_invariant_applies_only_under_its_condition() -> None:
    assert Nonnegative().applies({})
    assert Nonnegative(when=param.relu.is_true()).applies({"relu": True})
    assert not Nonnegative(when=param.relu.is_true()).applies({"relu": False})
    assert Nonnegative(when=~param.relu.is_true()).applies({"relu": False})
    assert not Nonnegative(when=~param.relu.is_true()).applies({"relu": True})


@pytest.mark.parametrize(("value", "holds"), [("l1", True), ("l2", True), ("linf", False), (None, False)])
def test_condition_may_list_values(value: str | None, holds: bool) -> None:
    condition = param.norm.one_of("l1", "l2")
    assert str(condition) == "norm in {l1, l2}" and str(~condition) == "not norm in {l1, l2}"
    assert Nonnegative(when=condition).parameters() == Nonnegative(when=~condition).parameters() == {"norm"}
    assert Nonnegative(when=condition).applies({"norm": value}) == holds
    assert Nonnegative(when=~condition).applies({"norm": value}) != holds


# --- cost ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(images=st.integers(1, 9), steps=st.integers(1, 9), height=st.integers(1, 99), stride=st.integers(1, 9))
def test_cost_evaluates_to_its_arithmetic(images: int, steps: int, height: int, stride: int) -> None:
    rows = maximum(1, size.height // param.stride)
    cost = Cost(
        forward=size.images * (param.steps + 2) - 1,
        backward=ceil(size.height / param.stride) + minimum(size.images, param.steps) * rows,
    )
    forward, backward = cost.evaluate({"steps": steps, "stride": stride}, images=images, height=height)
    assert forward == images * (steps + 2) - 1
    assert backward == -(-height // stride) + min(images, steps) * max(1, height // stride)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (size.images * (param.steps + 2), "images * (steps + 2)"),
        (size.images * param.steps + 2, "images * steps + 2"),
        (2 - (param.a - param.b), "2 - (a - b)"),
        (param.a / (param.b * 2), "a / (b * 2)"),
        (param.a + (param.b + 1), "a + b + 1"),
        (either(param.window, 8) + 1, "(window or 8) + 1"),
        (length(param.layers, 4) * maximum(1, param.k), "len(layers, 4) * max(1, k)"),
    ],
)
def test_expression_prints_as_it_is_written(expression: Expression, text: str) -> None:
    assert str(expression) == text


def test_either_and_length_replace_none() -> None:
    cost = Cost(forward=either(param.window, 8), backward=length(param.layers, 4))
    assert cost.evaluate({"window": None, "layers": None}) == (8, 4)
    assert cost.evaluate({"window": 3, "layers": ["a"]}) == (3, 1)


def test_cost_lists_the_parameters_it_depends_on() -> None:
    cost = Cost(
        forward=size.images * param.steps + ceil(size.dataset / 2),
        backward=minimum(size.height, size.width) * param.scales,
    )
    assert cost.names() == {"steps", "scales"}
    assert not cost.depends_on("channels")
    assert Cost(forward=size.images, backward=size.channels * size.images).depends_on("channels")
    assert Cost(forward=size.images * size.channels).names() == set()


def test_cost_from_json_compares_and_prints_but_does_not_evaluate() -> None:
    cost = Cost(forward=size.images * (param.steps + 2))
    again = Cost.model_validate(cost.model_dump(mode="json"))
    assert again == cost and str(again.forward) == "images * (steps + 2)"
    assert again.names() == {"steps"} and again.depends_on("images")
    with pytest.raises(InputError, match="printed form"):
        again.evaluate({"steps": 1}, images=1)


def test_invalid_parts_of_a_cost_are_refused() -> None:
    with pytest.raises(AttributeError, match="no size 'pictures'; there are images"):
        _ = size.pictures
    with pytest.raises(TypeError, match="built from numbers"):
        _ = size.images * "steps"
    with pytest.raises(InputError, match="'steps' is needed"):
        Cost(forward=param.steps).evaluate({})


# --- parameter groups --------------------------------------------------------------------------


class Shared(ParameterGroup):
    l2: Annotated[float, Field(ge=0, le=1, description="weight of the squared norm")] = 0.0
    blur: Annotated[int, Field(ge=0, description="blur every so many steps")] = 4


@method(family="attribution")
def grouped(
    model: Model,
    images: Images,
    *,
    before: int = 1,
    shared: Shared = Shared(l2=0.5),
    after: int = 2,
) -> Attribution:
    """Return the parameters."""
    values = torch.tensor([before, shared.l2, shared.blur, after], dtype=torch.float64)
    return Attribution(images=images, maps=values.expand(len(images), 1, -1), targets=("x",) * len(images))


def test_group_is_flattened_into_the_schema_and_collected_for_the_function() -> None:
    schema = grouped.spec.params_schema["properties"]
    assert [*schema] == ["before", "l2", "blur", "after"]
    assert schema["l2"]["default"] == 0.5 and schema["l2"]["maximum"] == 1
    assert schema["l2"]["description"] == "weight of the squared norm"
    model = load_model("builtin:shapes-vgg")
    images = torch.rand(1, 3, 64, 64)
    assert grouped(model, images).maps.flatten().tolist() == [1, 0.5, 4, 2]
    result = grouped(model, images, l2=0.25, blur=3)
    assert result.maps.flatten().tolist() == [1, 0.25, 3, 2]
    assert result.provenance is not None and result.provenance.params["l2"] == 0.25
    with pytest.raises(InputError, match="l2"):
        grouped(model, images, l2=2.0)
    with pytest.raises(UnknownName, match="did you mean 'blur'"):
        grouped(model, images, blurr=2)


def test_parameter_declared_twice_is_refused_at_import() -> None:
    def twice(model: Model, *, l2: float = 0.0, shared: Shared = Shared()) -> Attribution:
        """Do."""
        raise AssertionError

    with pytest.raises(TypeError, match="l2 is declared twice"):
        method(family="attribution")(twice)


# --- the decorator ---------------------------------------------------------------------------


def test_signature_becomes_the_spec() -> None:
    @method(family="attribution", references=[Reference(key="k", title="t", authors="a", year=1, url="u")])
    def example(
        model: Model,
        images: Images,
        target: Target = None,
        *,
        layer: LayerName | None = None,
        steps: Annotated[int, Field(ge=1, le=9, description="how many")] = 3,
        norm: Literal["l1", "l2"] = "l2",
        seed: Seed = None,
    ) -> Attribution:
        """Do something.

        More of it.
        """
        raise AssertionError

    spec = example.spec
    assert (spec.name, spec.family, spec.short_name) == ("attribution.example", "attribution", "example")
    assert (spec.title, spec.summary, spec.description) == ("Example", "Do something.", "More of it.")
    assert [(i.name, i.role, i.required) for i in spec.inputs] == [
        ("model", "model", True), ("images", "images", True), ("target", "target", False),
    ]  # fmt: skip
    assert spec.returns == "Attribution"
    steps = spec.params_schema["properties"]["steps"]
    assert {k: steps[k] for k in ("minimum", "maximum", "default", "description")} == {
        "minimum": 1, "maximum": 9, "default": 3, "description": "how many",
    }  # fmt: skip
    assert spec.params_schema["properties"]["norm"]["enum"] == ["l1", "l2"]
    assert spec.input("labels") is None
    assert example.validate({"steps": "4"}) == {"layer": None, "steps": 4, "norm": "l2", "seed": None}


def test_incomplete_function_is_refused_at_import() -> None:
    def no_role(model: Model, images: int) -> Attribution:
        """Do."""
        raise AssertionError

    def no_result(model: Model) -> int:
        """Do."""
        raise AssertionError

    def no_docstring(model: Model) -> Attribution:
        raise AssertionError

    for function, message in ((no_role, "role"), (no_result, "result type"), (no_docstring, "docstring")):
        with pytest.raises(TypeError, match=message):
            method(family="attribution")(function)
