"""Scores of a target and their gradients by pixels and by layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ModelError

if TYPE_CHECKING:
    from ..models import Model
from .objectives import Custom, Layer
from .parse import parse_target


def input_gradient(model: Model, images: Tensor, target: Any) -> Tensor:
    """dS/dI, the gradient of the target's scalar by every pixel: (N, C, H, W), off the graph."""
    images = images.detach().clone().requires_grad_()
    score = scores(model, images, target)
    if not score.requires_grad:
        raise ModelError(f"no gradient flows through {model.name} to the picture")
    (gradient,) = torch.autograd.grad(score.sum(), images)
    return gradient


def layer_gradients(model: Model, images: Tensor, target: Any, *layers: str) -> list[tuple[Tensor, Tensor]]:
    """Each layer's maps A and dS/dA, both (N, C, h, w) and off the graph; nothing below is differentiated.

    What the CAM family shares. Raises ModelError for a layer without places, for one that the target
    does not depend on, and where only its class token matters.
    """
    objective = parse_target(target, model)
    with model.tap(*layers, leaf=True) as tap:
        score = scores(model, images, objective)
    if not score.requires_grad:
        names = " or ".join(map(repr, layers))
        raise ModelError(f"{objective} does not depend on layer {names}: choose a layer below it")
    outputs = [tap[layer] for layer in layers]
    gradients = torch.autograd.grad(score.sum(), outputs, allow_unused=True)
    found = []
    for layer, output, gradient in zip(layers, outputs, gradients, strict=True):
        activations = model.maps(output.detach(), images)
        if gradient is None:
            raise ModelError(
                f"{objective} does not depend on the last output of layer {layer!r}: choose another"
            )
        placed = model.maps(gradient, images)
        if gradient.any() and not placed.any():
            raise ModelError(
                f"only the class token of layer {layer!r} matters to {objective}, and it has no place: "
                "choose an earlier layer"
            )
        found.append((activations, placed))
    return found


def scores(model: Model, images: Tensor, target: Any) -> Tensor:
    """The target's scalar for each image, (N,), on the graph; nothing above its layer runs.

    With a ``Tap`` open, its layers are read in the same pass, unless they lie above the target's.
    """
    objective = parse_target(target, model)
    if isinstance(objective, Layer):
        features = model.features(images, objective.name)
        return objective.score(model.maps(features, images) if features.ndim > 2 else features)
    if isinstance(objective, Custom) and objective.wants_tap():
        layers = [name for name, layer in model.structure.layers.items() if layer.shape is not None]
        with model.tap(*layers) as tap:
            return objective.score(model(images), tap)
    return objective.score(model(images))
