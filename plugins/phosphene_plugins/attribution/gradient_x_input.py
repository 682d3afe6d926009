"""Gradient x input: each pixel's share of the score, as if the model were linear."""

from typing import Any

import torch
from torch import nn

from phosphene import Method, Reference, hookimpl, input_gradient, load_model, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, MapPerPixel, size


def linear_model_shares_out_its_score() -> None:
    """On a linear model the shares of all pixels sum to the score less its bias."""
    linear = nn.Linear(60, 2)
    model = load_model(nn.Sequential(nn.Flatten(), linear).double())
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    for index in (0, 1):
        shares = gradient_x_input(model, images, index).maps.sum((1, 2))
        torch.testing.assert_close(shares, model(images)[:, index] - linear.bias[index])


@method(
    family="attribution",
    title="Gradient x input",
    references=[
        Reference(
            key="shrikumar2016",
            title="Not Just a Black Box: Learning Important Features Through "
            "Propagating Activation Differences",
            authors="Shrikumar, Greenside, Shcherbina, Kundaje",
            year=2016,
            url="https://arxiv.org/abs/1605.01713",
        )
    ],
    invariants=[MapPerPixel()],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=linear_model_shares_out_its_score,
)
def gradient_x_input(model: Model, images: Images, target: Target = None) -> Attribution:
    """Share the score out among the pixels, as if the model were linear around the picture.

    M_ij = sum_c I_cij dS / dI_cij

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, H, W), raw and signed. Pixels are those in [0, 1],
    before any normalisation, so black pixels get nothing whatever the model makes of them.

    Source: Shrikumar et al. 2016, section 2.1.
    """
    maps = (images * input_gradient(model, images, target)).sum(1)
    return Attribution(images=images, maps=maps, targets=target.names(model, len(images)), layout="map")


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [gradient_x_input]
