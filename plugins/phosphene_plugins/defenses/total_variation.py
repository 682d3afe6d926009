"""Total variation denoising before the model: flat where it was nearly flat, edges kept."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from phosphene import Reference, hookimpl, method
from phosphene.roles import Images, Model
from phosphene.spec import Cost, PixelRange, SameShape, size

from ._input_transform_result import Change, DefendedImages, compared

#: The step of the dual ascent, at which it converges in the plane.
_STEP = 0.25


def denoised(weight: float, steps: int) -> Change:
    """So many steps towards the minimum, every one of them differentiable."""

    def change(images: Tensor) -> Tensor:
        if not weight:
            return images
        dual = images.new_zeros(2, *images.shape)
        for _ in range(steps):
            slope = _slopes(_divergence(dual) - images / weight)
            square = slope.square().sum(0)
            steep = square > 0  # the root's slope at 0 is infinite: flat places stay out of it
            length = torch.where(steep, torch.where(steep, square, 1).sqrt(), 0)
            dual = (dual + _STEP * slope) / (1 + _STEP * length)
        return (images - weight * _divergence(dual)).clamp(0, 1)

    return change


def _slopes(images: Tensor) -> Tensor:
    """(2, N, C, H, W) differences to the next pixel below and to the right, 0 at the last."""
    below = F.pad(images[..., 1:, :] - images[..., :-1, :], (0, 0, 0, 1))
    right = F.pad(images[..., :, 1:] - images[..., :, :-1], (0, 1))
    return torch.stack([below, right])


def _divergence(field: Tensor) -> Tensor:
    """The divergence of (2, N, C, H, W), minus the adjoint of the slopes."""
    down, across = field[0][..., :-1, :], field[1][..., :, :-1]
    return (
        F.pad(down, (0, 0, 0, 1)) - F.pad(down, (0, 0, 1, 0)) + F.pad(across, (0, 1)) - F.pad(across, (1, 0))
    )


def shrinks_a_step_by_the_closed_form() -> None:
    """Of two flat halves the minimum lowers the step at each side by weight / width, and flat stays flat."""
    halves = torch.zeros(1, 1, 6, 8, dtype=torch.float64)
    halves[..., 4:] = 1
    got = denoised(0.2, 2000)(halves)
    want = halves + 0.2 / 4 - halves * 0.2 / 2
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)
    flat = torch.full((1, 2, 4, 4), 0.3)
    torch.testing.assert_close(denoised(0.2, 10)(flat), flat)


@method(
    family="defenses",
    title="Total variation",
    references=[
        Reference(
            key="chambolle2004",
            title="An Algorithm for Total Variation Minimization and Applications",
            authors="Chambolle",
            year=2004,
            url="https://doi.org/10.1023/B:JMIV.0000011325.36760.1e",
        ),
        Reference(
            key="guo2018",
            title="Countering Adversarial Images using Input Transformations",
            authors="Guo, Rana, Cissé, van der Maaten",
            year=2018,
            url="https://arxiv.org/abs/1711.00117",
        ),
    ],
    invariants=[PixelRange(field="transformed"), SameShape(field="transformed")],
    cost=Cost(forward=2 * size.images),
    tags=["input-transform"],
    oracle=shrinks_a_step_by_the_closed_form,
    defense=denoised,
    quick={"steps": 3},
)
def total_variation(
    model: Model,
    images: Images,
    *,
    weight: Annotated[float, Field(ge=0, le=10, description="how much a steep pixel costs")] = 0.1,
    steps: Annotated[int, Field(ge=1, le=1000, description="steps of the dual ascent")] = 20,
) -> DefendedImages:
    """Show the model every picture with its total variation made small, each channel for itself.

    x' = argmin_z  |z - x|^2 / 2 + weight sum_p |grad z_p|,   x' = x - weight div p
    p <- (p + s u) / (1 + s |u|),   u = grad(div p - x / weight),   s = 1/4

    with differences to the next pixel as the gradient, none at the last. The gradient passes through all the
    steps, so that attacks on ``total_variation.defend(model)`` need no substitute for it. ``images``
    (N, C, H, W) in [0, 1].

    Source: Chambolle 2004, section 3; as a defence Guo et al. 2018, section 3.2.
    """
    return compared(model, images, denoised(weight, steps))


@hookimpl
def phosphene_methods():
    return [total_variation]
