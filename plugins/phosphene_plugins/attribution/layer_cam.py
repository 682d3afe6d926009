"""LayerCAM: each place weighted by its own gradient where that speaks for the score, for any depth."""

from typing import Any

import torch

from phosphene import Method, Reference, hookimpl, layer_gradients, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, size

from ._cam import PROMISES, CamLayer, Normalize, by_convention, pooled_network, weighted


def pooling_leaves_the_positive_weights() -> None:
    """Before a GAP + linear head every gradient is w_k / (h w): M = sum_k max(w_k, 0) A^k / (h w)."""
    model, head, images = pooled_network()
    for index in range(3):
        weights = head.weight[index].relu().expand(len(images), -1)
        expected = weighted(weights, model.features(images, "1")) / 80
        torch.testing.assert_close(layer_cam(model, images, index, layer="1").maps, expected)


@method(
    family="attribution",
    title="LayerCAM",
    references=[
        Reference(
            key="jiang2021",
            title="LayerCAM: Exploring Hierarchical Class Activation Maps for Localization",
            authors="Jiang, Zhang, Hou, Cheng, Wei",
            year=2021,
            url="https://doi.org/10.1109/TIP.2021.3089943",
        )
    ],
    invariants=PROMISES,
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=pooling_leaves_the_positive_weights,
)
def layer_cam(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    layer: CamLayer = None,
    normalize: Normalize = None,
) -> Attribution:
    """Show which places of a layer speak for the target: each weighted by its own positive gradient.

    M_ij = ReLU( sum_k max(dS / dA^k_ij, 0) A^k_ij )

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, h, w) at the layer's own size, raw unless
    ``normalize`` says otherwise. Sharp at early layers too, where one weight for a whole map would mix
    the object with what looks like its parts elsewhere. Raises ModelError for a layer without places
    and for one that the target does not depend on.

    Source: Jiang et al. 2021, equations 5 to 7.
    """
    [(activations, gradients)] = layer_gradients(model, images, target, layer or model.last_map)
    maps = by_convention((gradients.relu() * activations).sum(1), images, normalize)
    return Attribution(images=images, maps=maps, targets=target.names(model, len(images)))


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [layer_cam]
