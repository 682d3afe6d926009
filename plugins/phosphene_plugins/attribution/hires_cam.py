"""HiResCAM: class activation map of activation times gradient, position by position."""

from typing import Any

import torch

from phosphene import Method, Reference, hookimpl, layer_gradients, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Agrees, Cost, LinearIn, ZeroWhen, size

from ._cam import CamLayer, signed_result
from ._oracle_networks import pooled_network
from ._relations import EQUIVARIANT, PROPORTIONAL_TO_THE_SCORE


def map_and_bias_sum_to_the_logit() -> None:
    """Before a pooled linear head it is CAM / (h w), and sums to the logit minus the head's bias."""
    model, head, images = pooled_network()
    features = model.features(images, "1")
    for index in range(3):
        maps = hires_cam(model, images, index, layer="1").maps
        torch.testing.assert_close(maps, torch.einsum("k,nkhw->nhw", head.weight[index], features) / 80)
        torch.testing.assert_close(maps.sum((1, 2)) + head.bias[index], model(images)[:, index])


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
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=map_and_bias_sum_to_the_logit,
    relations=[
        Agrees("attribution.cam", proportional=True, networks=("gap", "hflip-gap")),
        *EQUIVARIANT,
        *PROPORTIONAL_TO_THE_SCORE,
        LinearIn("target"),
        ZeroWhen("ignored"),
    ],
)
def hires_cam(model: Model, images: Images, target: Target = None, *, layer: CamLayer = None) -> Attribution:
    """HiResCAM: class activation map of activation times gradient, position by position.

    M_ij = sum_k A^k_ij dS / dA^k_ij

    Gradients are not averaged over the map as in Grad-CAM, so no position is highlighted that the score
    does not use. Where everything above the layer is linear, the map sums to the score minus its constant
    part; before global average pooling it is CAM's map divided by h w.

    Returns:
        ``maps`` (N, h, w), raw and signed, at the layer's own size.

    Raises:
        ModelError for a layer without spatial positions and for one that the target does not depend on.

    Example::
        from phosphene import run

        result = run("hires_cam", images="builtin:scenes/2")
        result.maps.shape  # (2, 8, 8)

    Source:
        Draelos & Carin 2020, equation 7.
    """
    layer = layer or model.last_map
    [(maps, gradients)] = layer_gradients(model, images, target, layer)
    return signed_result(model, layer, images, target, (maps * gradients).sum(1))


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [hires_cam]
