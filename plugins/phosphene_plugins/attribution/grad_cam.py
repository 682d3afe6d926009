"""Grad-CAM: class activation map weighted by the layer's mean gradients."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Method, hookimpl, layer_gradients, method, unit_centers
from phosphene.images import enlarge_maps, min_max
from phosphene.results import Attribution
from phosphene.roles import Images, LayerName, Model, Target
from phosphene.spec import Agrees, Calls, Cost, Nonnegative, size

from ._cam import SELVARAJU_2017, rectified_result, weighted_sum
from ._oracle_networks import pooled_network
from ._relations import LINEAR_CAM


def equals_cam_before_a_pooled_head() -> None:
    """Before global average pooling and a linear layer alpha_k = w_k / (h w): M = ReLU(CAM) / (h w).

    One layer below, before the ReLU, alpha_k = w_k / (h w) times the fraction of positive positions.
    """
    model, head, images = pooled_network()
    after, before = (model.features(images, layer) for layer in ("1", "0"))
    for index in range(3):
        weights = head.weight[index].detach() / 80
        cam = weighted_sum(weights.expand(3, -1), after)
        torch.testing.assert_close(grad_cam(model, images, index, layer="1").maps, cam.relu())
        below = weighted_sum(weights * (before > 0).double().mean((2, 3)), before)
        result = grad_cam(model, images, index, layer=["1", "0"])
        more = torch.stack([cam, below], 1).relu()
        low, high = more.amin((2, 3), keepdim=True), more.amax((2, 3), keepdim=True)
        torch.testing.assert_close(result.more, (more - low) / (high - low))
        torch.testing.assert_close(result.maps, ((more - low) / (high - low)).mean(1))
        torch.testing.assert_close(result.signed_maps, (cam, below))
        assert (result.targets, result.more_names) == ((f"class {index}",) * 3, ("1", "0"))


def class_activation_map(calls: Calls) -> Tensor:
    """ReLU(CAM) / (h w), which Grad-CAM is before global average pooling and a linear layer."""
    maps: Tensor = calls.other("attribution.cam").maps
    return maps.relu() / maps[0].numel()


@method(
    family="attribution",
    title="Grad-CAM",
    references=[SELVARAJU_2017],
    invariants=[Nonnegative()],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=equals_cam_before_a_pooled_head,
    relations=[
        Agrees(class_activation_map, networks=("gap", "hflip-gap")),
        *LINEAR_CAM,
    ],
)
def grad_cam(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    layer: Annotated[
        LayerName | Annotated[list[LayerName], Field(min_length=1)] | None,
        Field(
            description="layer whose feature maps are weighted, or several layers; default: the last layer "
            "with spatial positions"
        ),
    ] = None,
) -> Attribution:
    """Grad-CAM: class activation map weighted by the layer's mean gradients.

    M = ReLU( sum_k alpha_k A^k ),  alpha_k = mean_ij dS / dA^k_ij

    A^k are the layer's feature maps, S is the target's score. Any layer with spatial positions works:
    convolutional, channels-last or tokens. The backward pass ends at the lowest of the layers. With several
    layers, each layer's map is scaled to [0, 1] and enlarged to the image, and ``maps`` is their mean.

    Returns:
        ``maps`` (N, h, w), raw, at the layer's own size. For several layers ``maps`` (N, H, W) are the mean
        and ``more`` (N, layers, H, W) each layer's map.

    Raises:
        ModelError for a layer without spatial positions and for one that the target does not depend on.

    Example::
        from phosphene import run

        result = run("grad_cam", images="builtin:scenes/2")
        result.maps.shape  # (2, 8, 8)

    Source:
        Selvaraju et al. 2017, equations 1 and 2.
    """
    layers = layer if isinstance(layer, list) else [layer or model.last_map]
    signed = [
        weighted_sum(gradients.mean((2, 3)), maps)
        for maps, gradients in layer_gradients(model, images, target, *layers)
    ]
    if not isinstance(layer, list):
        return rectified_result(model, layers[0], images, target, signed[0])
    size = images.shape[2:]
    enlarged = [
        enlarge_maps(min_max(maps.relu()), size, unit_centers(model, name, size))
        for name, maps in zip(layers, signed, strict=True)
    ]
    more = torch.stack(enlarged, 1)
    return Attribution(
        images=images,
        maps=more.mean(1),
        targets=target.names(model, len(images)),
        more=more,
        more_names=tuple(layers),
        signed_maps=tuple(signed),
    )


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [grad_cam]
