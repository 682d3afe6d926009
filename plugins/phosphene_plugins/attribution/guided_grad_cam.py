"""Guided Grad-CAM: guided backpropagation multiplied by the enlarged Grad-CAM map."""

from typing import Any

import torch
from torch import Tensor, nn

from phosphene import (
    Method,
    guided,
    hookimpl,
    input_gradient,
    layer_gradients,
    load_model,
    method,
    rewrite_backward,
    unit_centers,
)
from phosphene.images import enlarge_maps
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import (
    Agrees,
    Calls,
    Cost,
    InvariantTo,
    MapPerPixel,
    Nonnegative,
    ScalesWith,
    ZeroWhen,
    size,
)

from ._cam import SELVARAJU_2017, CamLayer, weighted_sum
from ._oracle_networks import NORMALIZATION
from ._relations import FLIPS


def pixelwise_network_has_a_closed_form() -> None:
    """With a 1x1 convolution: ReLU(CAM) / (h w) times the gradient through the positive weights."""
    torch.manual_seed(0)
    conv, head = nn.Conv2d(3, 6, 1), nn.Linear(6, 2)
    network = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()
    model, images = load_model(network, **NORMALIZATION), torch.rand(2, 3, 5, 4, dtype=torch.float64)
    maps = conv(model.normalize(images)).relu()
    filters = conv.weight[:, :, 0, 0] / torch.tensor(NORMALIZATION["std"])
    for index in (0, 1):
        weight = head.weight[index]
        coarse = torch.einsum("k,nkhw->nhw", weight, maps).relu() / 20
        fine = torch.einsum("k,kc,nkhw->nchw", weight.relu() / 20, filters, (maps > 0).double())
        expected = (coarse * fine.abs().amax(1)).detach()
        result = guided_grad_cam(model, images, index, layer="1")
        torch.testing.assert_close(result.maps, expected)
        assert result.targets == (f"class {index}",) * 2


def product_of_two_maps(calls: Calls) -> Tensor:
    """Guided backpropagation's map times Grad-CAM's, enlarged."""
    coarse, fine = (calls.other(f"attribution.{name}") for name in ("grad_cam", "guided_backprop"))
    product: Tensor = enlarge_maps(coarse.maps, fine.maps.shape[1:], coarse.centers) * fine.maps
    return product


@method(
    family="attribution",
    title="Guided Grad-CAM",
    references=[SELVARAJU_2017],
    invariants=[Nonnegative(), MapPerPixel()],
    needs=["gradients", "relu"],
    cost=Cost(forward=2 * size.images, backward=2 * size.images),
    oracle=pixelwise_network_has_a_closed_form,
    relations=[
        Agrees(product_of_two_maps),
        *FLIPS,
        ScalesWith("logits", power=2),
        InvariantTo("logit_shift"),
        ZeroWhen("constant"),
        ZeroWhen("ignored"),
        InvariantTo("normalization"),
    ],
)
def guided_grad_cam(
    model: Model, images: Images, target: Target = None, *, layer: CamLayer = None
) -> Attribution:
    """Guided Grad-CAM: guided backpropagation multiplied by the enlarged Grad-CAM map.

    M_ij = L_ij max_c | R_cij |,  L = Grad-CAM enlarged to the image,  R = the guided-backpropagation gradient

    Guided backpropagation is sharp and nearly the same for every class; Grad-CAM is coarse and
    class-specific; the product is sharp and class-specific. ``layer`` is the layer of Grad-CAM, whose cells
    are enlarged from the pixels at which its units are centered.

    Returns:
        ``maps`` (N, H, W), raw, one value per pixel.

    Raises:
        ModelError for a network without a ReLU, for a layer without spatial positions and for one that the
        target does not depend on.

    Example::
        from phosphene import run

        result = run("guided_grad_cam", images="builtin:scenes/2")
        result.maps.shape  # (2, 64, 64)

    Source:
        Selvaraju et al. 2017, section 3.1.
    """
    layer = layer or model.last_map
    [(maps, gradients)] = layer_gradients(model, images, target, layer)
    coarse = weighted_sum(gradients.mean((2, 3)), maps).relu()
    with rewrite_backward(guided):
        fine = input_gradient(model, images, target)
    centers = unit_centers(model, layer, images.shape[2:])
    return Attribution(
        images=images,
        maps=enlarge_maps(coarse, images.shape[2:], centers) * fine.abs().amax(1),
        targets=target.names(model, len(images)),
        layout="map",
    )


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [guided_grad_cam]
