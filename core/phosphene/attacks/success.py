"""The success criterion of an attack on class labels, and an attack's result."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import Model
from ..results import AdversarialExamples


def predict_logits(model: Model, images: Tensor) -> Tensor:
    """The logits (N, K) without a graph."""
    with torch.no_grad():
        return model(images)


def is_adversarial(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """(N,) bool: the predicted class is the label (``targeted``), or any class but the label."""
    predictions = logits.argmax(1)
    return predictions.eq(labels) if targeted else predictions.ne(labels)


def not_adversarial(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """Indices (n,) of the images that are not adversarial yet: those that an attack works on."""
    return (~is_adversarial(logits, labels, targeted)).nonzero()[:, 0]


def is_zero(gradient: Tensor) -> Tensor:
    """(N,) bool: the gradient of an image (N, C, H, W) is zero at every pixel."""
    return gradient.flatten(1).eq(0).all(1)


def build_result(
    model: Model,
    images: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    before: Tensor,
    *,
    targeted: bool,
    zero_gradient: Tensor | None = None,
) -> AdversarialExamples:
    """An attack's result from ``adversarial`` (N, C, H, W) and the images' logits ``before`` (N, K).

    Images that are adversarial by ``before`` are returned unchanged; ``adversarial`` is ignored there.
    ``zero_gradient`` has an element for each of the other images (n,): see ``is_zero``.
    """
    active = not_adversarial(before, labels, targeted)
    adversarial, after = images.index_copy(0, active, adversarial[active]), before
    if len(active):
        after = before.index_copy(0, active, predict_logits(model, adversarial[active]))
    if zero_gradient is not None:
        none = torch.zeros_like(labels, dtype=torch.bool)
        zero_gradient = none.index_copy(0, active, zero_gradient)
    return AdversarialExamples.from_logits(
        model, images, adversarial, labels, before, after, targeted=targeted, zero_gradient=zero_gradient
    )
