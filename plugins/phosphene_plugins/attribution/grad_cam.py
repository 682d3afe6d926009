"""Grad-CAM: a layer's maps weighted by how much the score would gain from each."""

from typing import Annotated, Any

import torch
from pydantic import Field

from phosphene import Method, Reference, hookimpl, layer_gradients, method
from phosphene.results import Attribution
from phosphene.roles import Images, LayerName, Model, Target
from phosphene.spec import Cost, size

from ._cam import PROMISES, Normalize, by_convention, enlarged, pooled_network, scaled, stretched, weighted


def average_pooling_gives_cam() -> None:
    """Before a GAP + linear head alpha_k = w_k / (h w), so the map is relu(CAM) / (h w)."""
    model, head, images = pooled_network()
    for index in range(3):
        weights = head.weight[index].expand(len(images), -1)
        cam = weighted(weights, model.features(images, "1"))
        torch.testing.assert_close(grad_cam(model, images, index, layer="1").maps, cam.relu() / 80)


@method(
    family="attribution",
    title="Grad-CAM",
    references=[
        Reference(
            key="selvaraju2017",
            title="Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
            authors="Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra",
            year=2017,
            url="https://arxiv.org/abs/1610.02391",
        )
    ],
    invariants=PROMISES,
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=average_pooling_gives_cam,
)
def grad_cam(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    layer: Annotated[
        LayerName | Annotated[list[LayerName], Field(min_length=1)] | None,
        Field(description="whose maps are weighted, or several; the last with places when absent"),
    ] = None,
    normalize: Normalize = None,
) -> Attribution:
    """Show where a layer's maps speak for the target: each weighted by its mean gradient.

    M = ReLU( sum_k alpha_k A^k ),  alpha_k = mean_ij dS / dA^k_ij

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, h, w) at the layer's own size, raw unless
    ``normalize`` says otherwise: "minmax" scales each map to [0, 1]; "captum" leaves the ReLU out;
    "torchcam" scales as minmax, with 1e-8 in the divisor; "pgc" too, with 1e-7, enlarges the map
    bilinearly to (N, H, W) and scales it again, as pytorch-grad-cam does; "pair" divides each map by
    its largest value. Of a list of layers each has its map, by the same convention ("minmax" when
    absent) and enlarged to the picture, in ``more`` (N, layers, H, W); ``maps`` is their mean, which pgc
    scales once more. Works on any layer with places, convolutional, channels-last or tokens, and
    differentiates nothing below the lowest. Raises ModelError for a layer without places and for one
    that the target does not depend on.

    Source: Selvaraju et al. 2017, equations 1 and 2.
    """
    layers = layer if isinstance(layer, list) else [layer or model.last_map]
    found = [
        weighted(gradients.mean((2, 3)), activations)
        for activations, gradients in layer_gradients(model, images, target, *layers)
    ]
    targets = target.names(model, len(images))
    if not isinstance(layer, list):
        maps = by_convention(found[0], images, normalize)
        return Attribution(images=images, maps=maps, targets=targets)
    more = torch.stack([enlarged(scaled(maps, normalize or "minmax"), images) for maps in found], 1)
    maps = stretched(more.mean(1)) if normalize == "pgc" else more.mean(1)
    return Attribution(images=images, maps=maps, targets=targets, more=more, more_names=tuple(layers))


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [grad_cam]
