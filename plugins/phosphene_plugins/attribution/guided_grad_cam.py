"""Guided Grad-CAM: guided backpropagation's detail, where Grad-CAM says that it is about the target."""

from typing import Any

import torch
from torch import nn

from phosphene import (
    Method,
    Reference,
    guided,
    hookimpl,
    input_gradient,
    layer_gradients,
    load_model,
    method,
    rewrite_backward,
)
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, MapPerPixel, Nonnegative, size

from ._cam import CamLayer, enlarged, weighted


def pixels_of_one_layer_have_their_closed_form() -> None:
    """Where the maps are pixelwise, both factors are: relu(CAM) / (h w), and the positive weights' rays."""
    torch.manual_seed(0)
    conv, head = nn.Conv2d(3, 6, 1), nn.Linear(6, 2)
    network = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()
    model, images = load_model(network), torch.rand(2, 3, 5, 4, dtype=torch.float64)
    maps, rays = conv(images).relu(), conv.weight[:, :, 0, 0]
    for index in (0, 1):
        weight = head.weight[index]
        coarse = torch.einsum("k,nkhw->nhw", weight, maps).relu() / 20
        fine = torch.einsum("k,kc,nkhw->nchw", weight.relu() / 20, rays, (maps > 0).double())
        expected = (coarse * fine.abs().amax(1)).detach()
        torch.testing.assert_close(guided_grad_cam(model, images, index, layer="1").maps, expected)


@method(
    family="attribution",
    title="Guided Grad-CAM",
    references=[
        Reference(
            key="selvaraju2017",
            title="Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
            authors="Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra",
            year=2017,
            url="https://arxiv.org/abs/1610.02391",
        )
    ],
    invariants=[Nonnegative(), MapPerPixel()],
    needs=["gradients", "relu"],
    cost=Cost(forward=2 * size.images, backward=2 * size.images),
    oracle=pixels_of_one_layer_have_their_closed_form,
)
def guided_grad_cam(
    model: Model, images: Images, target: Target = None, *, layer: CamLayer = None
) -> Attribution:
    """Show the pixels that argue for the score, where Grad-CAM finds evidence for the target.

    M_ij = L_ij max_c | R_cij |,  L = Grad-CAM enlarged to the picture,  R = the guided gradient

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, H, W), raw. Guided backpropagation is sharp and
    nearly the same for every class; Grad-CAM is coarse and tells classes apart: the product is both.
    ``layer`` is Grad-CAM's. Raises ModelError for a network without a ReLU, for a layer without places
    and for one that the target does not depend on.

    Source: Selvaraju et al. 2017, section 3.1.
    """
    [(activations, gradients)] = layer_gradients(model, images, target, layer or model.last_map)
    coarse = weighted(gradients.mean((2, 3)), activations).relu()
    with rewrite_backward(guided):
        fine = input_gradient(model, images, target)
    return Attribution(
        images=images,
        maps=enlarged(coarse, images) * fine.abs().amax(1),
        targets=target.names(model, len(images)),
        layout="map",
    )


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [guided_grad_cam]
