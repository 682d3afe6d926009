"""Gradients of a loss with respect to images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from phosphene import Model
from phosphene.attacks import not_adversarial, predict_logits
from phosphene.optimize import TransformName, compose

from ._losses import Loss


def loss_gradient(
    model: Model,
    points: Tensor,
    labels: Tensor,
    loss: Loss,
    *,
    eot_samples: int = 1,
    augmentations: Sequence[TransformName] = (),
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss at ``points`` (N, C, H, W): values (N,), gradient (N, C, H, W), logits (N, K).

    Each is the mean over ``eot_samples`` passes, of a stochastic model or of images that ``augmentations``
    change at random: the expectation over transformations (EOT) of Athalye et al. 2018.

    Raises:
        ModelError: no gradient flows from the logits to the images.
    """
    augment = compose(augmentations)
    generator = generator or torch.Generator().manual_seed(0)
    total: list[Tensor] = []
    for _ in range(eot_samples):
        x = points.detach().requires_grad_()
        logits = differentiable_logits(model, augment(x, generator))
        values = loss(logits, labels)
        gradient = _gradient_at(x, values, model)
        # NaN gradients become 0: one NaN pixel would otherwise turn the image's normalized step into NaN.
        sample = [values.detach(), gradient.nan_to_num(0.0), logits.detach()]
        total = [a + b for a, b in zip(total, sample, strict=True)] if total else sample
    values, gradient, logits = (part / eot_samples for part in total)
    return values, gradient, logits


def initial_gradient(
    model: Model,
    images: Tensor,
    labels: Tensor,
    loss: Loss,
    *,
    targeted: bool,
    eot_samples: int = 1,
    augmentations: Sequence[TransformName] = (),
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """First gradient of an attack that starts at the images, with one pass where one is enough.

    Returns:
        Logits of the images (N, K), indices (n,) of those that are not adversarial yet, and the gradient
        of the loss at these (n, C, H, W).

    Raises:
        ModelError: no gradient flows from the logits to the images.
    """
    if eot_samples == 1 and not augmentations:
        _, gradient, before = loss_gradient(model, images, labels, loss)
        active = not_adversarial(before, labels, targeted)
        return before, active, gradient[active]
    before = predict_logits(model, images)
    active = not_adversarial(before, labels, targeted)
    if not len(active):
        return before, active, images[active]
    _, gradient, _ = loss_gradient(
        model, images[active], labels[active], loss, eot_samples=eot_samples, augmentations=augmentations,
        generator=generator,
    )  # fmt: skip
    return before, active, gradient


def raw_gradient(model: Model, images: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """The gradient at the images (N, C, H, W), NaN and infinity included, and the logits (N, K)."""
    x = images.detach().requires_grad_()
    logits = differentiable_logits(model, x)
    return _gradient_at(x, loss(logits, labels), model), logits.detach()


def differentiable_logits(model: Model, points: Tensor) -> Tensor:
    """The logits (N, K) on the graph; ModelError where no gradient flows from them to the images."""
    logits = model(points)
    if not logits.requires_grad:
        raise model.no_gradient()
    return logits


def _gradient_at(points: Tensor, values: Tensor, model: Model) -> Tensor:
    """The gradient of the values' sum with respect to the points; ModelError where they are not connected."""
    (gradient,) = torch.autograd.grad(values.sum(), points, allow_unused=True)
    if gradient is None:  # only parameters require a gradient, as behind a quantized layer
        raise model.no_gradient()
    return gradient
