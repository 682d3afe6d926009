"""Gradient x input: product of pixel value and gradient, summed over channels."""

from typing import Any

import torch

from phosphene import Method, Reference, hookimpl, input_gradient, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Complete, Cost, LinearIn, MapPerPixel, size
from phosphene.testing import linear_model

from ._relations import GRADIENT


def equals_the_contributions_to_a_linear_score() -> None:
    """On a linear model w x + b the map is sum_c w x, and sums to the score minus b."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator)
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=generator)
    model = linear_model(weight, bias=[0.5, -0.25])
    for index, bias in enumerate((0.5, -0.25)):
        result = gradient_x_input(model, images, index)
        maps = result.maps
        assert result.targets == (f"class {index}",) * 2
        torch.testing.assert_close(maps, (weight[index] * images).sum(1))
        torch.testing.assert_close(maps.sum((1, 2)), model(images)[:, index].detach() - bias)


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
    oracle=equals_the_contributions_to_a_linear_score,
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
