"""Scores of a target, and their gradients with respect to pixels and layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ModelError

if TYPE_CHECKING:
    from ..models import Model
from .parse import parse_target


def input_gradient(model: Model, images: Tensor, target: Any) -> Tensor:
    """dS/dI, the gradient of the target's score with respect to the pixels: (N, C, H, W), detached."""
    images = images.detach().clone().requires_grad_()
    score = scores(model, images, target)
    if not score.requires_grad:
        raise model.no_gradient()
    (gradient,) = torch.autograd.grad(score.sum(), images, allow_unused=True)
    if gradient is None:
        raise model.no_gradient("the target does not depend on it")
    return gradient


def layer_gradients(model: Model, images: Tensor, target: Any, *layers: str) -> list[tuple[Tensor, Tensor]]:
    """Each layer's maps A and gradients dS/dA, both (N, C, h, w) and detached.

    Nothing below the layers is differentiated. Raises ModelError for a layer without a spatial map, for one
    that the target does not depend on, and where the target depends on its class token only.
    """
    model = model.for_images(images)
    objective = parse_target(target, model)
    with model.tap(*layers, leaf=True) as tap:
        score = scores(model, images, objective)
    if not score.requires_grad:
        names = " or ".join(map(repr, layers))
        raise ModelError(f"{objective} does not depend on layer {names}: choose a layer below it")
    outputs = [tap[layer] for layer in layers]
    gradients = torch.autograd.grad(score.sum(), outputs, allow_unused=True)
    pairs = []
    for layer, output, gradient in zip(layers, outputs, gradients, strict=True):
        activations = model.maps(output.detach(), images, layer)
        if gradient is None:
            raise ModelError(
                f"{objective} does not depend on the last output of layer {layer!r}: choose another"
            )
        gradient_maps = model.maps(gradient, images, layer)
        if gradient.any() and not gradient_maps.any():
            raise ModelError(
                f"{objective} depends only on the class token of layer {layer!r}, which has no position in "
                "the image: choose an earlier layer"
            )
        pairs.append((activations, gradient_maps))
    return pairs


def scores(model: Model, images: Tensor, target: Any) -> Tensor:
    """The target's score for each image, (N,), on the graph; layers above the target's do not run.

    An open ``Tap`` reads its layers in the same pass, except those above the target's.
    """
    model = model.for_images(images)
    return parse_target(target, model).evaluate(model, images)
