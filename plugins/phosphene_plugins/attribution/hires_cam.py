"""HiResCAM: each place of each map weighted by its own gradient, so that the places share out the score."""

from typing import Any

import torch

from phosphene import Method, Reference, hookimpl, layer_gradients, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, size

from ._cam import SCALED, CamLayer, Normalize, by_convention, pooled_network


def map_and_bias_sum_to_the_logit() -> None:
    """Before a linear head the places of the map and the head's bias sum to the logit."""
    model, head, images = pooled_network()
    for index in range(3):
        explained = hires_cam(model, images, index, layer="1").maps.sum((1, 2)) + head.bias[index]
        torch.testing.assert_close(explained, model(images)[:, index])


@method(
    family="attribution",
    title="HiResCAM",
    references=[
        Reference(
            key="draelos2020",
            title="Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural "
            "networks",
            authors="Draelos, Carin",
            year=2020,
            url="https://arxiv.org/abs/2011.08891",
        )
    ],
    invariants=[SCALED],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=map_and_bias_sum_to_the_logit,
)
def hires_cam(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    layer: CamLayer = None,
    normalize: Normalize = None,
) -> Attribution:
    """Share out the score among a layer's places: every value times its own gradient.

    M_ij = sum_k A^k_ij dS / dA^k_ij

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, h, w) at the layer's own size, raw and signed
    unless ``normalize`` says otherwise. Gradients are not averaged over the map, as Grad-CAM does, so
    that no place is lit which the score does not use; where all above the layer is linear, the map sums
    to the score less its constant part, and behind global average pooling it is CAM's over h w. Raises
    ModelError for a layer without places and for one that the target does not depend on.

    Source: Draelos & Carin 2020, equation 7.
    """
    [(activations, gradients)] = layer_gradients(model, images, target, layer or model.last_map)
    maps = by_convention((activations * gradients).sum(1), images, normalize, signed=True)
    return Attribution(images=images, maps=maps, targets=target.names(model, len(images)))


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [hires_cam]
