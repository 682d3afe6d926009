"""LayerCAM: class activation map weighted by each position's positive gradient."""

from typing import Any

import torch

from phosphene import Method, Reference, hookimpl, layer_gradients, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, Nonnegative, size

from ._cam import CamLayer, rectified_result, weighted_sum
from ._oracle_networks import pooled_network
from ._relations import GRADIENT


def positive_weights_remain_before_a_pooled_head() -> None:
    """Before global average pooling and a linear layer M = sum_k max(w_k, 0) A^k / (h w)."""
    model, head, images = pooled_network()
    for index in range(3):
        weights = head.weight[index].relu().expand(len(images), -1)
        expected = weighted_sum(weights, model.features(images, "1")) / 80
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
    invariants=[Nonnegative()],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=positive_weights_remain_before_a_pooled_head,
    relations=GRADIENT,
)
def layer_cam(model: Model, images: Images, target: Target = None, *, layer: CamLayer = None) -> Attribution:
    """LayerCAM: class activation map weighted by each position's positive gradient.

    M_ij = ReLU( sum_k max(dS / dA^k_ij, 0) A^k_ij )

    Precise at early layers too, where one weight per feature map would mix the object with similar parts
    elsewhere in the image.

    Returns:
        ``maps`` (N, h, w), raw, at the layer's own size.

    Raises:
        ModelError for a layer without spatial positions and for one that the target does not depend on.

    Example::
        from phosphene import run

        result = run("layer_cam", images="builtin:scenes/2", layer="features.11")
        result.maps.shape  # (2, 16, 16)

    Source:
        Jiang et al. 2021, equations 5 to 7.
    """
    layer = layer or model.last_map
    [(maps, gradients)] = layer_gradients(model, images, target, layer)
    return rectified_result(model, layer, images, target, (gradients.relu() * maps).sum(1))


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [layer_cam]
