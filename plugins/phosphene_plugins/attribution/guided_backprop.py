"""Guided backpropagation: only what argues for the score, through units that were active, on the way back."""

from typing import Any

import torch
from torch import nn

from phosphene import (
    Method,
    Reference,
    guided,
    hookimpl,
    input_gradient,
    load_model,
    method,
    rewrite_backward,
)
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, MapPerPixel, Nonnegative, size


def two_layers_have_their_closed_form() -> None:
    """On two layers: W1^T (max(w2, 0) where the unit was active)."""
    torch.manual_seed(0)
    first, last = nn.Linear(12, 6), nn.Linear(6, 2)
    model = load_model(nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).double(), input_size=(3, 2, 2))
    images = torch.rand(2, 3, 2, 2, dtype=torch.float64)
    for index in (0, 1):
        passed = last.weight[index].clamp(min=0) * (first(images.flatten(1)) > 0)
        expected = (passed @ first.weight).view(-1, 3, 2, 2).abs().amax(1)
        torch.testing.assert_close(guided_backprop(model, images, index).maps, expected.expand(2, 2, 2))


@method(
    family="attribution",
    title="Guided backprop",
    references=[
        Reference(
            key="springenberg2015",
            title="Striving for Simplicity: The All Convolutional Net",
            authors="Springenberg, Dosovitskiy, Brox, Riedmiller",
            year=2015,
            url="https://arxiv.org/abs/1412.6806",
        )
    ],
    invariants=[Nonnegative(), MapPerPixel()],
    needs=["gradients", "relu"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=two_layers_have_their_closed_form,
)
def guided_backprop(model: Model, images: Images, target: Target = None) -> Attribution:
    """Show the pixels that argue for the score through active units alone.

    R^l_i = 1[f^l_i > 0] 1[R^(l+1)_i > 0] R^(l+1)_i  at every ReLU,  M_ij = max_c | R^0_cij |

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, H, W), raw. Sharp, but nearly the same for every
    class: a picture of what the network detected, more than of why.
    Every ReLU and ReLU6 obeys: module, functional, in place, used twice. Raises ModelError where
    the network has none, for its result would be the plain gradient.

    Source: Springenberg et al. 2015, section 3.4.
    """
    with rewrite_backward(guided):
        gradient = input_gradient(model, images, target)
    return Attribution(
        images=images,
        maps=gradient.abs().amax(1),
        targets=target.names(model, len(images)),
        layout="map",
    )


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [guided_backprop]
