"""Checks of a single run: result, side effects, cost, progress."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...finite_values import NonFiniteResultError
from ...results import AdversarialExamples, Result, TrainedNetwork
from ...roles import ROLES
from ..cases import sizes
from ..observation import (
    Observation,
    input_tensors,
    tensors_in,
)

if TYPE_CHECKING:
    from .base import AnyMethod

from .base import register_check

#: Work of more forward passes than this has to report progress.
PASSES_WITHOUT_PROGRESS = 40
#: The most seconds that a call with quick parameters may take.
QUICK_SECONDS = 30


@register_check(
    "run",
    "A call returns a result or is refused with a message.",
    "raise InputError or ModelError with what was wrong and what is allowed",
)
def answers(method: AnyMethod, run: Observation) -> None:
    if run.crash is not None:
        raise AssertionError(f"it raised {type(run.crash).__name__}: {run.crash}") from run.crash
    if run.refusal is not None:
        assert len(str(run.refusal)) > 15, f"the refusal {str(run.refusal)!r} explains nothing"


@register_check(
    "observation",
    "A result has the declared type, a row for every image, and the model's device and dtype.",
    "what the function returns",
)
def declared_result(method: AnyMethod, run: Observation) -> None:
    result = run.result
    assert type(result).__name__ == method.spec.returns, f"{type(result).__name__}, not {method.spec.returns}"
    tensors = list(tensors_in(result))
    assert tensors, "the result contains no tensor"
    # A method without a network returns float32; a trained network has a dtype of its own.
    dtype = run.model.dtype if method.spec.input("model") else None
    for path, tensor in tensors:
        assert tensor.device == run.model.device, f"{path} is on {tensor.device}"
        assert not tensor.is_inference(), f"{path} is an inference tensor: autograd cannot use it"
        assert tensor.grad_fn is None, f"{path} is attached to a graph: detach it"
        if tensor.is_floating_point() and dtype is not None and not isinstance(result, TrainedNetwork):
            assert tensor.dtype == dtype, f"{path} is {tensor.dtype}, the model {dtype}"
    for name in _per_image_fields(method, result):
        rows = len(getattr(result, name))
        assert rows == run.case.count, f"{name} has {rows} rows for {run.case.count} images"


def _per_image_fields(method: AnyMethod, result: Result) -> list[str]:
    """The fields with a row for every image, without those that are None."""
    per_image = any(i.required and ROLES[i.role].per_image for i in method.spec.inputs)
    return [name for name in result.per_image if per_image and getattr(result, name) is not None]


@register_check("run", "Every number in a result is finite.", "divisions by a range, a norm or a sum of zero")
def finite(method: AnyMethod, run: Observation) -> None:
    # A call raises for such a result. On networks of finite features and gradients it is not a refusal.
    assert not isinstance(run.refusal, NonFiniteResultError), str(run.refusal)


@register_check("run", "Inputs are not changed.", "in-place operations on an input: clone it first")
def inputs_unchanged(method: AnyMethod, run: Observation) -> None:
    after = input_tensors(run.inputs)
    recorded = {} if run.result is None else input_tensors(run.result.inputs)
    for name, before in run.tensors_before.items():
        assert not after[name].requires_grad, f"{name} requires a gradient afterwards"
        assert torch.equal(after[name], before), f"{name} was changed"
        if name in recorded:
            assert torch.equal(recorded[name], before.to(recorded[name])), (
                f"{name} was changed inside the method"
            )


@register_check(
    "run",
    "The model is unchanged: weights, flags, gradients, hooks, mode.",
    "model.tap and rewrite_backward restore what they change; register no hooks and train no parameter",
)
def model_unchanged(method: AnyMethod, run: Observation) -> None:
    assert not run.model_changes, f"it changed {'; '.join(run.model_changes)}"


@register_check(
    "run",
    "It has no side effects: no file, thread, setting, random state or output.",
    "write only to the folder that was asked for; use a generator of your own; report by progress_bar(...)",
)
def no_side_effects(method: AnyMethod, run: Observation) -> None:
    assert not run.side_effects, "; ".join(run.side_effects)


@register_check(
    "observation",
    "It never takes more forward and backward passes than its declared cost.",
    "cost=Cost(forward=..., backward=...), and passes inside loops",
    lambda method: None if method.spec.cost else "it declares no cost",
)
def within_cost(method: AnyMethod, run: Observation) -> None:
    assert method.spec.cost is not None
    params = method.validate(run.result.provenance.params)
    known_sizes = sizes(method, run.case)
    required = [i for i in method.spec.inputs if i.required]
    if not any("images" in ROLES[i.role].cost_sizes(run.inputs[i.name]) for i in required):
        images = getattr(run.result, "images", None)
        known_sizes["images"] = 0 if images is None else len(images)
    forward, backward = method.spec.cost.evaluate(params, **known_sizes)
    if run.attacked_models(method) is not None:
        forward += known_sizes["images"]  # where the objective's reference is fixed
    if "objective" in params and (params["objective"] is not None or run.model.task == "detection"):
        forward *= 2  # the objective is that of each image itself, which passes once before it is changed
    if run.model.task == "detection":
        # For the table of detections in the provenance, of the images and of those of the result.
        forward += known_sizes["images"] * (2 if hasattr(run.result, "adversarial") else 1)
    passes = run.passes
    assert passes.forward <= forward, f"{passes.forward} images went forward, {forward} are declared"
    assert passes.backward <= backward, f"{passes.backward} images went backward, {backward} are declared"


@register_check(
    "run",
    "With its quick parameters, a call on a small network takes seconds.",
    "quick={...}: a small value for every parameter that makes a call long",
)
def quick_is_quick(method: AnyMethod, run: Observation) -> None:
    assert run.seconds < QUICK_SECONDS, f"it took {run.seconds:.0f} seconds"


@register_check(
    "observation",
    "Long work reports its progress, with correct counts.",
    "for x in phosphene.progress_bar(iterable, 'description'): ...",
)
def shows_progress(method: AnyMethod, run: Observation) -> None:
    if not run.events:
        passes = run.passes.started
        assert passes <= PASSES_WITHOUT_PROGRESS, f"{passes} forward passes without a progress event"
    counted: dict[str, int] = {}
    for event in run.events:
        assert event.done >= 1 and (event.total is None or event.done <= event.total), (
            f"the counts of {event} are impossible"
        )
        # A count increases by one, or starts again for the next batch.
        expected = counted.get(event.description, 0) + 1
        assert event.done in (expected, 1), f"{event} follows {expected - 1}"
        counted[event.description] = event.done


@register_check(
    "observation",
    "What is reported as a success is one by the model's logits.",
    "AdversarialExamples.from_logits reads it from the logits",
    lambda method: None if method.result is AdversarialExamples else "it is no attack",
)
def honest_success(method: AnyMethod, run: Observation) -> None:
    result = run.result
    logits = run.logits(method, result.adversarial)
    best = logits.topk(min(2, logits.shape[1])).values
    unambiguous = best[:, 0] - best[:, -1] > 1e-5 * best[:, 0].abs()
    after = logits.argmax(1)
    truth = after.eq(result.labels) if result.targeted else after.ne(result.labels)
    for n in unambiguous.nonzero().flatten().tolist():
        assert int(result.after[n]) == int(after[n]), (
            f"image {n}: the result has class {int(result.after[n])}, the model predicts {int(after[n])}"
        )
        reported = bool(result.success[n])
        assert reported == bool(truth[n]), f"image {n}: success is {reported}, by the logits {bool(truth[n])}"


@register_check(
    "observation",
    "The panels of a result are images (3, H, W), finite, in [0, 1].",
    "the result type's panels()",
)
def panels_in_range(method: AnyMethod, run: Observation) -> None:
    images = [panel.image for group in run.result.panels() for panel in group]
    assert images, "it has no panels"
    for image in images:
        assert image.ndim == 3 and len(image) == 3, f"a panel has the shape {tuple(image.shape)}"
        assert image.isfinite().all() and image.min() >= 0 and image.max() <= 1, "a panel is not in [0, 1]"
