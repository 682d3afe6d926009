"""Checks of what a call and an oracle vary: labels, optional inputs, precision, earlier calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pytest
import torch
from defects import Maker, Makers, assert_defect_is_refused, outcome
from pydantic import Field
from test_named_techniques import NamedNumbers
from torch import Tensor
from wrong_methods import attribution

from phosphene import Cost, Method, input_gradient, method
from phosphene.attacks import build_result, project
from phosphene.results import AdversarialExamples, Attribution
from phosphene.roles import Content, Images, Labels, Masks, Model, Styles, Target
from phosphene.spec import param

MAKERS = Makers(needs=["gradients"])
caught_by = MAKERS.caught_by


@caught_by("labels_matter")
def targets(wrong: bool) -> Callable[..., Any]:
    def step_to_target(
        model: Model,
        images: Images,
        labels: Labels,
        *,
        eps: Annotated[float, Field(gt=0, le=1, description="radius")] = 0.03,
        targeted: Annotated[bool, Field(description="whether the labels are target classes")] = False,
    ) -> AdversarialExamples:
        """A gradient step away from the labels, or to them."""
        with torch.no_grad():
            before = model(images)
        chosen = before.argsort(1)[:, -2] if wrong and targeted else labels
        loss = (
            model(points := images.clone().requires_grad_()).log_softmax(1).gather(1, chosen[:, None]).sum()
        )
        (gradient,) = torch.autograd.grad(loss, points)
        step = eps if targeted else -eps
        adversarial = project(images + step * gradient.sign(), images, eps, "linf")
        return build_result(model, images, adversarial, labels, before, targeted=targeted)

    return step_to_target


@caught_by("labels_matter")
def error_norms(wrong: bool) -> Callable[..., Any]:
    def error_l2_norm(model: Model, images: Images, labels: Labels) -> NamedNumbers:
        """Norm of the difference between probabilities and one-hot labels, of each image."""
        with torch.no_grad():
            probabilities = model(images).double().softmax(1)
        classes = probabilities.argmax(1) if wrong else labels
        hot = torch.nn.functional.one_hot(classes, probabilities.shape[1])
        return NamedNumbers(values=(probabilities - hot).norm(dim=1))

    return error_l2_norm


@caught_by("inputs_unchanged")
def outside_of_masks(wrong: bool) -> Callable[..., Any]:
    def mean_outside(model: Model, images: Images, masks: Masks = None) -> NamedNumbers:
        """Mean of the pixels outside the masks, of each image."""
        if masks is None:
            masks = torch.zeros_like(images[:, 0], dtype=torch.bool)
        outside = masks.logical_not_() if wrong else ~masks
        return NamedNumbers(values=(images.mean(1) * outside).flatten(1).mean(1))

    return mean_outside


@caught_by("computed_in_double_precision")
def saliency(wrong: bool) -> Callable[..., Any]:
    def squared_gradient(model: Model, images: Images, target: Target = None) -> Attribution:
        """Square of the gradient, summed over the channels."""
        gradient = input_gradient(model, images, target)
        square = gradient.float().square().to(gradient) if wrong else gradient.square()
        maps = square.sum(1).float().to(gradient) if wrong else square.sum(1)
        return attribution(model, images, maps, target)

    return squared_gradient


# --- the calls of an oracle ----------------------------------------------------------------------------


def _placed(images: Tensor, styles: Tensor, steps: int, row: float, column: float) -> Tensor:
    shift = round(row * images.shape[2]), round(column * images.shape[3])
    mean = styles.mean((0, 2, 3))[:, None, None]
    return (images + steps * (mean - images) / 100).roll(shift, (2, 3)).flatten(1).sum(1)


def method_with_oracle(calls: list[tuple[int, float, float, tuple[int, int]]]) -> Method[Any, Any]:
    """A method whose oracle calls it with these steps, rows, columns and sizes of the style."""

    def by_the_formula() -> None:
        draw = torch.Generator().manual_seed(0)
        images = torch.rand(2, 3, 4, 6, generator=draw)
        for steps, row, column, style_size in calls:
            styles = torch.rand(1, 3, *style_size, generator=draw)
            result: Any = pulled(images, styles, steps=steps, row=row, column=column)
            torch.testing.assert_close(result.values, _placed(images, styles, steps, row, column))

    @method(family="claims", cost=Cost(forward=param.steps), oracle=by_the_formula)
    def pulled(
        images: Content,
        styles: Styles,
        *,
        steps: Annotated[int, Field(ge=1, le=50, description="number of steps")] = 5,
        row: Annotated[float, Field(ge=0, le=1, description="share of the image's side")] = 0.1,
        column: Annotated[float, Field(ge=0, le=1, description="share of the image's side")] = 0.1,
    ) -> NamedNumbers:
        """Sums of images that are pulled to the mean of a style and moved."""
        return NamedNumbers(values=_placed(images, styles, steps, row, column))

    return pulled


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([(1, 0.2, 0.4, (5, 7)), (1, 0.0, 0.4, (5, 7))], "steps is 1 in each call"),
        ([(2, 0.2, 0.2, (5, 7)), (3, 0.4, 0.4, (5, 7))], "row and column are equal in each call"),
        ([(2, 0.2, 0.4, (4, 6))], "the style has the content's size"),
    ],
    ids=["one step", "equal parameters", "one size"],
)
def test_calls_of_an_oracle_without_variety_are_refused(calls: Any, message: str) -> None:
    refused = outcome("oracle_calls_are_varied", method_with_oracle(calls))
    assert refused.verdict == "failed" and message in refused.reason, refused
    varied = outcome("oracle_calls_are_varied", method_with_oracle([*calls, (4, 0.0, 0.4, (5, 7))]))
    assert varied.verdict == "passed", varied


# --- every defect --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("check", "make"), MAKERS, ids=MAKERS.ids)
def test_defects_are_refused(check: str, make: Maker) -> None:
    assert_defect_is_refused(check, make)
