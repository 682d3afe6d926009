"""Deconvnet: what argues for the score, on the way back, whether units were active or not."""

from typing import Any

import torch
from torch import nn

from phosphene import Method, Reference, hookimpl, input_gradient, load_model, method, rewrite_backward
from phosphene.hooks import deconvnet as rectified
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, MapPerPixel, Nonnegative, size


def two_layers_have_their_closed_form() -> None:
    """On two layers: W1^T max(w2, 0), whatever the picture."""
    torch.manual_seed(0)
    first, last = nn.Linear(12, 6), nn.Linear(6, 2)
    model = load_model(nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).double(), input_size=(3, 2, 2))
    images = torch.rand(2, 3, 2, 2, dtype=torch.float64)
    for index in (0, 1):
        passed = last.weight[index].clamp(min=0).expand(2, -1)
        expected = (passed @ first.weight).view(-1, 3, 2, 2).abs().amax(1)
        torch.testing.assert_close(deconvnet(model, images, index).maps, expected.expand(2, 2, 2))


@method(
    family="attribution",
    title="Deconvnet",
    references=[
        Reference(
            key="zeiler2014",
            title="Visualizing and Understanding Convolutional Networks",
            authors="Zeiler, Fergus",
            year=2014,
            url="https://arxiv.org/abs/1311.2901",
        )
    ],
    invariants=[Nonnegative(), MapPerPixel()],
    needs=["gradients", "relu"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=two_layers_have_their_closed_form,
)
def deconvnet(model: Model, images: Images, target: Target = None) -> Attribution:
    """Show the pixels that argue for the score, going back through rectified signals alone.

    R^l_i = 1[R^(l+1)_i > 0] R^(l+1)_i  at every ReLU,  M_ij = max_c | R^0_cij |

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, H, W), raw. Max-pooling's switches are the only
    thing that it takes from the picture: without max-pooling every picture gets the same map. Every
    ReLU and ReLU6 obeys: module, functional, in place, used twice. Raises ModelError where the network
    has none, for its result would be the plain gradient.

    Source: Zeiler & Fergus 2014, section 2.1.
    """
    with rewrite_backward(rectified):
        gradient = input_gradient(model, images, target)
    return Attribution(
        images=images,
        maps=gradient.abs().amax(1),
        targets=target.names(model, len(images)),
        layout="map",
    )


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [deconvnet]
