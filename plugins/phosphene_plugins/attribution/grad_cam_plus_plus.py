"""Grad-CAM++: class activation map weighted by positive gradients, position by position."""

from typing import Any

import torch

from phosphene import Method, Reference, hookimpl, layer_gradients, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, InvariantTo, Nonnegative, ZeroWhen, size

from ._cam import CamLayer, rectified_result, weighted_sum
from ._oracle_networks import pooled_network
from ._relations import EQUIVARIANT


def closed_form_before_a_pooled_head() -> None:
    """Before global average pooling and a linear layer the weights are max(w_k, 0) / (2 + w_k mean A^k)."""
    model, head, images = pooled_network()
    maps = model.features(images, "1")
    for index in range(3):
        weight = head.weight[index]
        expected = weighted_sum(weight.relu() / (2 + weight * maps.mean((2, 3))), maps)
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
    invariants=[Nonnegative()],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=closed_form_before_a_pooled_head,
    relations=[*EQUIVARIANT, InvariantTo("logit_shift"), InvariantTo("batch_order"), ZeroWhen("constant")],
)
def grad_cam_plus_plus(
    model: Model, images: Images, target: Target = None, *, layer: CamLayer = None
) -> Attribution:
    """Grad-CAM++: class activation map that counts every occurrence of the object.

    M = ReLU( sum_k w_k A^k ),  w_k = sum_ij a^k_ij max(g^k_ij, 0),  g = dS / dA

    a^k_ij = g^2 / (2 g^2 + g^3 sum_ab A^k_ab) = 1 / (2 + g^k_ij sum_ab A^k_ab)

    The paper's score is exp(S), whose derivatives are exp(S) times powers of g; the factor exp(S), a constant
    of each map, is left out. Nothing is added to the divisor, so small gradients count in full
    (pytorch-grad-cam adds 1e-6 to the first form, which hides any g below 1e-3). Meant for a layer after a
    ReLU: where feature maps are negative the divisor may be near zero.

    Returns:
        ``maps`` (N, h, w), raw, at the layer's own size.

    Raises:
        ModelError for a layer without spatial positions and for one that the target does not depend on.

    Example::
        from phosphene import run

        result = run("grad_cam_plus_plus", images="builtin:scenes/2")
        result.maps.shape  # (2, 8, 8)

    Source:
        Chattopadhay et al. 2018, equations 5, 7 and 19.
    """
    layer = layer or model.last_map
    [(maps, gradients)] = layer_gradients(model, images, target, layer)
    divisor = 2 + gradients * maps.sum((2, 3), keepdim=True)
    weights = (gradients.relu() / torch.where(divisor != 0, divisor, 2)).sum((2, 3))
    return rectified_result(model, layer, images, target, weighted_sum(weights, maps))


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [grad_cam_plus_plus]
