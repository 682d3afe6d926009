"""XGrad-CAM: maps weighted by their gradients, averaged where the map is active."""

from typing import Any

import torch

from phosphene import Method, Reference, hookimpl, layer_gradients, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, size

from ._cam import PROMISES, CamLayer, Normalize, by_convention, pooled_network, weighted


def equal_gradients_give_grad_cam() -> None:
    """Before a GAP + linear head all gradients of a map are equal, and so any average: relu(CAM) / (h w)."""
    model, head, images = pooled_network()
    for index in range(3):
        weights = head.weight[index].expand(len(images), -1)
        expected = weighted(weights, model.features(images, "1")).relu() / 80
        torch.testing.assert_close(xgrad_cam(model, images, index, layer="1").maps, expected)


@method(
    family="attribution",
    title="XGrad-CAM",
    references=[
        Reference(
            key="fu2020",
            title="Axiom-based Grad-CAM: Towards Accurate Visualization and Explanation of CNNs",
            authors="Fu, Hu, Dong, Guo, Gao, Li",
            year=2020,
            url="https://arxiv.org/abs/2008.02312",
        )
    ],
    invariants=PROMISES,
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=equal_gradients_give_grad_cam,
)
def xgrad_cam(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    layer: CamLayer = None,
    normalize: Normalize = None,
) -> Attribution:
    """Show where a layer's maps speak for the target: each weighted by its gradient where it is active.

    M = ReLU( sum_k alpha_k A^k ),  alpha_k = sum_ij (A^k_ij / sum_ab A^k_ab) dS / dA^k_ij

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, h, w) at the layer's own size, raw unless
    ``normalize`` says otherwise. So weighted, the maps before the ReLU sum to sum A dS/dA, the share of
    the score that the layer explains. Meant for a layer behind a ReLU: where a map has both signs its
    sum may be near zero, and its weight large. A map that sums to zero gets no weight. Raises ModelError
    for a layer without places and for one that the target does not depend on.

    Source: Fu et al. 2020, equation 9.
    """
    [(activations, gradients)] = layer_gradients(model, images, target, layer or model.last_map)
    total = activations.sum((2, 3))
    share = (activations * gradients).sum((2, 3))
    alpha = torch.where(total != 0, share / torch.where(total != 0, total, 1), 0)
    maps = by_convention(weighted(alpha, activations), images, normalize)
    return Attribution(images=images, maps=maps, targets=target.names(model, len(images)))


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [xgrad_cam]
