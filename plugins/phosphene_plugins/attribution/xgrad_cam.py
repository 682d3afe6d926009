"""XGrad-CAM: class activation map weighted by activation-weighted mean gradients."""

from typing import Any

import torch
from torch import nn

from phosphene import Method, Reference, hookimpl, layer_gradients, load_model, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Agrees, Cost, Nonnegative, size

from ._cam import CamLayer, rectified_result, weighted_sum
from ._oracle_networks import pooled_network
from ._relations import LINEAR_CAM


def equals_grad_cam_before_a_pooled_head() -> None:
    """Before global average pooling all gradients of a map are equal: M = ReLU(CAM) / (h w)."""
    model, head, images = pooled_network()
    for index in range(3):
        weights = head.weight[index].expand(len(images), -1)
        expected = weighted_sum(weights, model.features(images, "1")).relu() / 80
        torch.testing.assert_close(xgrad_cam(model, images, index, layer="1").maps, expected)
    # Maps (-1/4, 1/4) and (1/4, 3/4): the first sums to 0, the second to 1 with the gradients (1, 2).
    conv, head = nn.Conv2d(1, 2, 1), nn.Linear(4, 1, bias=False)
    conv.weight.data, conv.bias.data = torch.ones(2, 1, 1, 1), torch.tensor([0.0, 0.5])  # type: ignore[union-attr]
    head.weight.data = torch.tensor([[5.0, -3.0, 1.0, 2.0]])
    network = nn.Sequential(conv, nn.Flatten(), head)
    model = load_model(network, input_size=(1, 1, 2), mean=[0.5], std=[1.0], task="regression")
    maps = xgrad_cam(model, torch.tensor([[[[0.25, 0.75]]]]), 0, layer="0").maps
    torch.testing.assert_close(maps, 1.75 * torch.tensor([[[0.25, 0.75]]]))


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
    invariants=[Nonnegative()],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=equals_grad_cam_before_a_pooled_head,
    relations=[Agrees("attribution.grad_cam", networks=("gap", "hflip-gap")), *LINEAR_CAM],
)
def xgrad_cam(model: Model, images: Images, target: Target = None, *, layer: CamLayer = None) -> Attribution:
    """XGrad-CAM: class activation map weighted by activation-weighted mean gradients.

    M = ReLU( sum_k alpha_k A^k ),  alpha_k = sum_ij (A^k_ij / sum_ab A^k_ab) dS / dA^k_ij

    With these weights the map before the ReLU sums to sum A dS/dA, the part of the score that the layer
    explains. Meant for a layer after a ReLU: where a feature map has both signs its sum may be near zero and
    its weight large. A feature map that sums to zero has weight zero.

    Returns:
        ``maps`` (N, h, w), raw, at the layer's own size.

    Raises:
        ModelError for a layer without spatial positions and for one that the target does not depend on.

    Example::
        from phosphene import run

        result = run("xgrad_cam", images="builtin:scenes/2")
        result.maps.shape  # (2, 8, 8)

    Source:
        Fu et al. 2020, equation 9.
    """
    layer = layer or model.last_map
    [(maps, gradients)] = layer_gradients(model, images, target, layer)
    total = maps.sum((2, 3))
    share = (maps * gradients).sum((2, 3))
    alpha = torch.where(total != 0, share / torch.where(total != 0, total, 1), 0)
    return rectified_result(model, layer, images, target, weighted_sum(alpha, maps))


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [xgrad_cam]
