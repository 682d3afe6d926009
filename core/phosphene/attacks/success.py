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


def build_result(
    model: Model, images: Tensor, adversarial: Tensor, labels: Tensor, before: Tensor, *, targeted: bool
) -> AdversarialExamples:
    """An attack's result from ``adversarial`` (N, C, H, W) and the images' logits ``before`` (N, K).

    Images that are adversarial by ``before`` are returned unchanged; ``adversarial`` is ignored there.
    """
    active = not_adversarial(before, labels, targeted)
    adversarial, after = images.index_copy(0, active, adversarial[active]), before
    if len(active):
        after = before.index_copy(0, active, predict_logits(model, adversarial[active]))
    return AdversarialExamples.from_logits(
        model, images, adversarial, labels, before, after, targeted=targeted
    )
