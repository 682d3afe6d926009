"""Ablation-CAM: maps weighted by how far the score falls without each of them."""

from typing import Any

import torch
from torch import Tensor

from phosphene import Method, Reference, batch_size, hookimpl, method, progress_bar, scores
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, size

from ._cam import PROMISES, CamLayer, Normalize, by_convention, pooled_network, weighted


def pooling_takes_a_channels_own_part_away() -> None:
    """Before a GAP + linear head the score falls by w_k mean A^k without channel k."""
    model, head, images = pooled_network()
    maps, logits = model.features(images, "1"), model(images)
    for index in range(3):
        falls = head.weight[index] * maps.mean((2, 3)) / logits[:, index, None].abs()
        expected = weighted(falls, maps).relu()
        torch.testing.assert_close(ablation_cam(model, images, index, layer="1").maps, expected)


@method(
    family="attribution",
    title="Ablation-CAM",
    references=[
        Reference(
            key="desai2020",
            title="Ablation-CAM: Visual Explanations for Deep Convolutional Network via "
            "Gradient-free Localization",
            authors="Desai, Ramaswamy",
            year=2020,
            url="https://doi.org/10.1109/WACV45572.2020.9093360",
        )
    ],
    invariants=PROMISES,
    cost=Cost(forward=size.images * (1 + size.channels)),
    oracle=pooling_takes_a_channels_own_part_away,
)
def ablation_cam(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    layer: CamLayer = None,
    normalize: Normalize = None,
) -> Attribution:
    """Show where a layer's maps speak for the target: each weighted by the score's fall without it.

    M = ReLU( sum_k w_k A^k ),  w_k = (S - S_k) / |S|

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, h, w) at the layer's own size, raw unless
    ``normalize`` says otherwise. S_k is the score with channel k zero at every place of the layer; class
    tokens stay. The paper divides by S: by its size, what helps a score below zero is still shown as
    helping; a score of zero divides nothing. The target is decided on the whole picture. No gradients,
    but a pass for every channel. Raises ModelError for a layer without places.

    Source: Desai & Ramaswamy 2020, equations 3 and 4.
    """
    layer = layer or model.last_map
    with model.tap(layer) as tap:
        clean = scores(model, images, target)
        maps = model.maps(tap[layer], images)
    count, channels = maps.shape[:2]
    places = [(n, k) for n in range(count) for k in range(channels)]
    size, found = batch_size(model), []
    for start in progress_bar(range(0, len(places), size), "ablating"):
        numbers, kinds = map(list, zip(*places[start : start + size], strict=True))
        pictures = images[numbers]

        def without(output: Tensor, pictures: Tensor = pictures, kinds: list[int] = kinds) -> Tensor:
            model.maps(output, pictures)[range(len(kinds)), kinds] = 0  # a view of the output
            return output

        with model.tap(layer, replace=without):
            found.append(scores(model, pictures, target.select(numbers)))
    falls = clean[:, None] - torch.cat(found).view(count, channels)
    sizes = clean.abs()[:, None]
    weights = falls / torch.where(sizes > 0, sizes, 1)
    shown = by_convention(weighted(weights, maps), images, normalize)
    return Attribution(images=images, maps=shown, targets=target.names(model, count))


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [ablation_cam]
