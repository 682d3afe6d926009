"""What every registered method owes, tried on each of them in two worlds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from worlds import (
    NAMES,
    SEED,
    WORLDS,
    assert_same_bits,
    assert_same_state,
    first_run,
    fused,
    inputs_of,
    quick_run,
    state_of,
    tensors_in,
    traffic,
)

from phosphene import max_batch, methods, replay
from phosphene.results import Result, TrainedNetwork, load_result

each_method = pytest.mark.parametrize("name", NAMES)
each_world = pytest.mark.parametrize("world", WORLDS)


@each_method
def test_method_loads_and_says_who_brings_it(name: str) -> None:
    method = methods[name]
    assert method.spec.name == name.rpartition(":")[2]
    assert method.distribution != "unregistered"
    assert method.spec.summary.endswith(".")
    assert method.spec.references
    assert method.spec.cost is not None
    properties = method.spec.params_schema["properties"]
    silent = [parameter for parameter, schema in properties.items() if "description" not in schema]
    assert not silent, f"parameters without a description: {silent}"


@each_method
def test_oracle_agrees(name: str) -> None:
    oracle = methods[name].spec.oracle
    assert oracle is not None, "a method names an oracle: a case where the right answer is known"
    oracle()


@each_method
@each_world
def test_result_is_of_the_declared_type_finite_and_where_the_model_is(name: str, world: str) -> None:
    model, inputs, result = first_run(name, world)
    method = methods[name]
    assert type(result) is method.result
    assert type(result).__name__ == method.spec.returns
    dtype = model.dtype if "model" in inputs else torch.float32
    found = list(tensors_in(result))
    assert found
    for path, tensor in found:
        assert tensor.device == model.device, path
        assert not tensor.is_inference(), path
        assert tensor.grad_fn is None, f"{path} still carries a graph"
        if tensor.is_floating_point():
            assert tensor.isfinite().all(), path
            # A network's training has a precision of its own.
            assert tensor.dtype == dtype or isinstance(result, TrainedNetwork), f"{path} is {tensor.dtype}"


@each_method
@each_world
def test_run_leaves_inputs_model_and_randomness_alone_and_repeats_bit_for_bit(name: str, world: str) -> None:
    method = methods[name]
    first = first_run(name, world)[2]
    model = WORLDS[world]()
    inputs = inputs_of(method, model)
    kept = {n: v.clone() for n, v in inputs.items() if isinstance(v, Tensor)}
    state, randomness = state_of(model.module), torch.get_rng_state()
    again = quick_run(method, inputs)
    assert torch.equal(torch.get_rng_state(), randomness)
    assert_same_state(state, state_of(model.module))
    for n, value in kept.items():
        assert torch.equal(inputs[n], value), f"{n} was changed"
        assert not inputs[n].requires_grad
    assert_same_bits(first, again)


@each_method
@pytest.mark.parametrize(
    "error", [RuntimeError("a layer broke"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
def test_model_is_as_it_was_when_a_layer_raises_half_way(name: str, error: BaseException) -> None:
    method = methods[name]
    model, inputs, _ = first_run(name, "awkward")
    with traffic(model.module) as seen:
        quick_run(method, inputs)
    state, randomness = state_of(model.module), torch.get_rng_state()
    # A method that looks at weights alone never runs the model, and has no half-way.
    for calls in sorted({1, (seen.passes + 1) // 2, seen.passes} if seen.passes else ()):
        with fused(model.module, calls, error), pytest.raises(type(error)) as caught:
            quick_run(method, inputs)
        assert caught.value is error
        assert_same_state(state, state_of(model.module))
        assert torch.equal(torch.get_rng_state(), randomness)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@each_method
def test_batch_size_changes_nothing_but_memory(name: str) -> None:
    model, inputs, result = first_run(name, "awkward")
    with max_batch(1):
        one_by_one = quick_run(methods[name], inputs)
    with max_batch(5):
        in_fives = quick_run(methods[name], inputs)
    for other in (one_by_one, in_fives):
        for (path, want), (_, got) in zip(tensors_in(result), tensors_in(other), strict=True):
            assert want.dtype == got.dtype
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9, msg=lambda m, p=path: f"{p}: {m}")


@each_method
@each_world
def test_declared_cost_is_not_exceeded(name: str, world: str) -> None:
    method = methods[name]
    model, inputs, _ = first_run(name, world)
    with traffic(model.module) as seen:
        result = quick_run(method, inputs)
    assert method.spec.cost is not None
    assert result.provenance is not None
    forward, backward = method.spec.cost.of(result.provenance.params, **sizes(inputs, result))
    assert seen.forward <= forward, f"{seen.forward} images went forward, {forward} were foretold"
    assert seen.backward <= backward, f"{seen.backward} images went backward, {backward} were foretold"


def sizes(inputs: dict[str, Any], result: Result) -> dict[str, int]:
    """What the names in a cost expression stand for in this run."""
    pictures = next((v for v in inputs.values() if isinstance(v, Tensor) and v.ndim == 4), None)
    count = len(result.images) if pictures is None and hasattr(result, "images") else 0
    height, width = (0, 0) if pictures is None else pictures.shape[2:]
    return {
        "images": count if pictures is None else len(pictures),
        "height": height,
        "width": width,
        "dataset": next((len(v) for n, v in inputs.items() if n == "dataset"), 0),
    }


@each_method
@each_world
def test_declared_invariants_hold(name: str, world: str) -> None:
    method = methods[name]
    model, inputs, result = first_run(name, world)
    params = method.validate({} if result.provenance is None else result.provenance.params)
    for invariant in method.spec.invariants:
        if invariant.applies(params):
            invariant.check(method.check_inputs(inputs), params, result)


@each_method
def test_every_choice_of_every_parameter_works_and_keeps_the_invariants(name: str) -> None:
    """Each switch and each word of a list of choices once, the other parameters as they are."""
    method = methods[name]
    model, inputs, _ = first_run(name, "awkward")
    for parameter, schema in method.spec.params_schema["properties"].items():
        for choice in choices(schema):
            result = quick_run(method, inputs, **{parameter: choice})
            for path, tensor in tensors_in(result):
                assert not tensor.is_floating_point() or tensor.isfinite().all(), (parameter, choice, path)
            params = method.validate({} if result.provenance is None else result.provenance.params)
            for invariant in method.spec.invariants:
                if invariant.applies(params):
                    invariant.check(method.check_inputs(inputs), params, result)


def choices(schema: dict[str, Any]) -> list[Any]:
    if "anyOf" in schema:
        return [c for branch in schema["anyOf"] for c in choices(branch)]
    if schema.get("type") == "boolean":
        return [False, True]
    return [schema["const"]] if "const" in schema else list(schema.get("enum", []))


@each_method
@each_world
def test_saved_result_comes_back_the_same_and_replays_the_same(name: str, world: str, tmp_path: Path) -> None:
    model, _, result = first_run(name, world)
    folder = result.save(tmp_path / "result")
    back = load_result(folder)
    assert type(back) is type(result)
    assert_same_bits(back, result)
    assert back.provenance == result.provenance
    assert_same_bits(back.inputs, result.inputs)
    assert back.provenance is not None
    assert back.provenance.seed == (SEED if "seed" in back.provenance.params else None)
    again = replay(folder, model=None if world == "bundled" or back.provenance.model is None else model)
    assert again.same, str(again)
    assert str(again).startswith("the same")


@each_method
@each_world
def test_figure_shows_something(name: str, world: str) -> None:
    _, _, result = first_run(name, world)
    shown = [panel.image for row in result.panels() for panel in row]
    assert shown
    for image in shown:
        assert image.ndim == 3
        assert image.shape[0] == 3
        assert image.isfinite().all()
        assert image.min() >= 0
        assert image.max() <= 1
    assert any(image.amax() - image.amin() > 0.05 for image in shown), "every panel is blank"
    drawn = Image.open(io.BytesIO(result.png())).convert("RGB")
    colours = drawn.getcolors(maxcolors=2**24)
    assert colours is not None
    assert len(colours) > 20
    assert "data:image/png;base64," in result._repr_html_()
