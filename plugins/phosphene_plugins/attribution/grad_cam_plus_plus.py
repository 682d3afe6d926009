"""Grad-CAM++: maps weighted by their positive gradients, so that several objects all count."""

from typing import Any

import torch

from phosphene import Method, Reference, hookimpl, layer_gradients, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, size

from ._cam import PROMISES, CamLayer, Normalize, by_convention, pooled_network, weighted


def pooling_has_its_closed_form() -> None:
    """Before a GAP + linear head the weight of a map is max(w_k, 0) / (2 + w_k mean A^k)."""
    model, head, images = pooled_network()
    maps = model.features(images, "1")
    for index in range(3):
        weight = head.weight[index]
        expected = weighted(weight.relu() / (2 + weight * maps.mean((2, 3))), maps)
        torch.testing.assert_close(grad_cam_plus_plus(model, images, index, layer="1").maps, expected)


@method(
    family="attribution",
    title="Grad-CAM++",
    references=[
        Reference(
            key="chattopadhay2018",
            title="Grad-CAM++: Improved Visual Explanations for Deep Convolutional Networks",
            authors="Chattopadhay, Sarkar, Howlader, Balasubramanian",
            year=2018,
            url="https://arxiv.org/abs/1710.11063",
        )
    ],
    invariants=PROMISES,
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=pooling_has_its_closed_form,
)
def grad_cam_plus_plus(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    layer: CamLayer = None,
    normalize: Normalize = None,
) -> Attribution:
    """Show where a layer's maps speak for the target, every occurrence of the object counting alike.

    M = ReLU( sum_k w_k A^k ),  w_k = sum_ij a^k_ij max(g^k_ij, 0),  g = dS / dA

    a^k_ij = g^2 / (2 g^2 + g^3 sum_ab A^k_ab) = 1 / (2 + g^k_ij sum_ab A^k_ab)

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, h, w) at the layer's own size, raw unless
    ``normalize`` says otherwise. The paper explains exp(S), whose derivatives are powers of g; the factor
    exp(S), the same for a whole map, is left out. Nothing is added to the divisor, so that small gradients
    weigh as they should (pytorch-grad-cam adds 1e-6 to the first form, which hides any g below 1e-3).
    Meant for a layer behind a ReLU: where maps are negative the divisor may be near zero. Raises
    ModelError for a layer without places and for one that the target does not depend on.

    Source: Chattopadhay et al. 2018, equations 5, 7 and 19.
    """
    [(activations, gradients)] = layer_gradients(model, images, target, layer or model.last_map)
    divisor = 2 + gradients * activations.sum((2, 3), keepdim=True)
    shares = gradients.relu() / torch.where(divisor != 0, divisor, 2)
    maps = by_convention(weighted(shares.sum((2, 3)), activations), images, normalize)
    return Attribution(images=images, maps=maps, targets=target.names(model, len(images)))


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [grad_cam_plus_plus]
