"""The loss of an image and its gradient, evaluated once per step, and the checks on both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..errors import DivergenceError, InputError
from ..hooks import deconvnet, rewrite_backward
from .augmentations import Transform
from .parametrizations import Parametrization

#: Images (N, C, H, W) -> one number per image (N,).
PerImage = Callable[[Tensor], Tensor]


#: From this side on, convolutions are faster in the channels-last memory format.
CHANNELS_LAST_SIDE = 96


#: Number of steps without any change after which an objective counts as flat.
FLAT_STEPS = 10


class Evaluation(NamedTuple):
    """Objective, loss and gradients at one value of the parameter. Optimizers minimize the loss.

    scores: objective of each image (N,).
    loss: objective with its sign and all penalties (N,).
    pixel_gradient: gradient of the objective alone with respect to the images (N, C, H, W).
    gradient: gradient of the loss with respect to the parameter (N, ...).
    """

    scores: Tensor
    loss: Tensor
    pixel_gradient: Tensor
    gradient: Tensor


@dataclass
class Evaluator:
    """Evaluates objective, penalties and gradients at the current value of an image's parameter.

    With ``through_closed_relus`` gradients of the objective pass ReLUs by the ``deconvnet`` rule, except
    those of images for which it passes none.
    """

    image: Parametrization
    objective: PerImage
    maximize: bool
    regularizer: PerImage | None
    transform: Transform | None
    generator: Generator
    through_closed_relus: bool = False

    def __call__(self) -> Evaluation:
        with torch.enable_grad():
            return self._evaluate()

    def _evaluate(self) -> Evaluation:
        images = self.image.image()
        inputs = images if self.transform is None else self.transform(images, self.generator)
        if min(inputs.shape[2:]) >= CHANNELS_LAST_SIDE:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        scores, pixel_gradient = self._objective_and_gradient(inputs, images)
        loss, loss_gradient = (-scores, -pixel_gradient) if self.maximize else (scores, pixel_gradient)
        if self.regularizer is not None:
            value, value_gradient = _value_and_gradient(self.regularizer, images, images, "regularizer")
            loss, loss_gradient = loss + value, loss_gradient + value_gradient
        (gradient,) = torch.autograd.grad(images, self.image.parameter, loss_gradient)
        if (penalty := self.image.penalty()) is not None:
            loss = loss + penalty.detach()
            gradient = gradient + torch.autograd.grad(penalty.sum(), self.image.parameter)[0]
        return Evaluation(scores, loss, pixel_gradient, gradient)

    def _objective_and_gradient(self, inputs: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        if not self.through_closed_relus:
            return _value_and_gradient(self.objective, inputs, images, "objective")
        sign = 1 if self.maximize else -1  # a descent follows the positive gradients of -S
        with rewrite_backward(deconvnet, required=False):
            scores, gradient = _value_and_gradient(
                lambda x: sign * self.objective(x), inputs, images, "objective", retain_graph=True
            )
        scores, gradient = sign * scores, sign * gradient
        if (blocked := (gradient == 0).flatten(1).all(1)).any():
            _, plain = _value_and_gradient(self.objective, inputs, images, "objective")
            gradient = torch.where(blocked.view(-1, 1, 1, 1), plain, gradient)
        return scores, gradient


def _value_and_gradient(
    function: PerImage, inputs: Tensor, images: Tensor, name: str, *, retain_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """``function(inputs)``, (N,), and its gradient with respect to the images behind the inputs."""
    values = function(inputs)
    if values.shape != images.shape[:1]:
        raise InputError(f"the {name} must return one number per image, not shape {tuple(values.shape)}")
    if values.requires_grad:
        (gradient,) = torch.autograd.grad(values.sum(), images, allow_unused=True, retain_graph=retain_graph)
        if gradient is not None:
            return values.detach(), gradient
    raise InputError(f"the {name} does not depend on the images by differentiable operations")


def check_finite(evaluation: Evaluation, step: int, lr: float) -> None:
    """Raise DivergenceError if a loss, a score or a gradient is infinite or NaN."""
    finite = (evaluation.loss + evaluation.scores).isfinite()
    finite &= evaluation.gradient.flatten(1).isfinite().all(1)
    if not finite.all():
        raise DivergenceError(
            f"step {step}: the objective or its gradient is no longer finite for images "
            f"{(~finite).nonzero().flatten().tolist()}; lower lr (now {lr:g}) or the regularizer's weight"
        )


def zero_gradient(evaluation: Evaluation, maximize: bool) -> Tensor:
    """Images (N,) whose objective has a zero gradient; a minimized objective of 0 is at its optimum."""
    is_zero = (evaluation.pixel_gradient == 0).flatten(1).all(1)
    return is_zero if maximize else is_zero & (evaluation.scores != 0)


def check_start(no_gradient: Tensor) -> None:
    """Raise DivergenceError for the images (N,) that have had no gradient so far."""
    if no_gradient.any():
        raise DivergenceError(
            f"images {no_gradient.nonzero().flatten().tolist()} cannot start: the objective's gradient is "
            "zero at every pixel (a dead ReLU, or an objective at its optimum); try another seed, a start "
            "from noise or another initial image"
        )


def check_flat(scores: Tensor, maximize: bool) -> None:
    """Raise DivergenceError for images whose scores (steps, N) are the same number at every step."""
    flat = (scores == scores[0]).all(0)
    if not maximize:
        flat &= scores[0] != 0  # a loss of 0 is at its minimum
    if flat.any():
        raise DivergenceError(
            f"the objective of images {flat.nonzero().flatten().tolist()} is flat: {len(scores)} steps have "
            "not changed it at all (saturated, or at its optimum); try a larger lr or another start"
        )
