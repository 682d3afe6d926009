"""Gradient x input: product of pixel value and gradient, summed over channels."""

from typing import Any

import torch
from torch import nn

from phosphene import Method, Reference, hookimpl, input_gradient, load_model, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Complete, Cost, LinearIn, MapPerPixel, size

from ._relations import GRADIENT


def sums_to_the_score_of_a_linear_model() -> None:
    """On a linear model the map sums to the score minus its bias."""
    linear = nn.Linear(60, 2)
    model = load_model(nn.Sequential(nn.Flatten(), linear).double())
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    for index in (0, 1):
        total = gradient_x_input(model, images, index).maps.sum((1, 2))
        torch.testing.assert_close(total, model(images)[:, index] - linear.bias[index])


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
    oracle=sums_to_the_score_of_a_linear_model,
    relations=[*GRADIENT, LinearIn("target"), Complete(0.0, networks=("homogeneous",), tolerance=1e-7)],
)
def gradient_x_input(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient x input: product of pixel value and gradient, summed over channels.

    M_ij = sum_c I_cij dS / dI_cij

    For a model that is linear around the image these are the pixels' contributions to the score. I are pixel
    values in [0, 1], before the model's normalization, so a black pixel contributes zero.

    Returns:
        ``maps`` (N, H, W), raw and signed.

    Raises:
        InputError or UnknownName for a target that the model does not have.

    Example::
        from phosphene import run

        result = run("gradient_x_input", images="builtin:scenes/2")
        result.maps.shape  # (2, 64, 64)

    Source:
        Shrikumar et al. 2016, section 2.1.
    """
    maps = (images * input_gradient(model, images, target)).sum(1)
    return Attribution(images=images, maps=maps, targets=target.names(model, len(images)), layout="map")


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [gradient_x_input]
