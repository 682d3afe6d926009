"""Fewer grey levels before the model: a small change of a pixel is rounded away."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Reference, hookimpl, method
from phosphene.optimize import straight_through
from phosphene.roles import Images, Model
from phosphene.spec import Cost, PixelRange, SameShape, size

from ._input_transform_result import Change, DefendedImages, compared

#: The paper that brought both this and median smoothing.
FEATURE_SQUEEZING = Reference(
    key="xu2018",
    title="Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks",
    authors="Xu, Evans, Qi",
    year=2018,
    url="https://arxiv.org/abs/1704.01155",
)


def rounded(bits: int) -> Change:
    """Pixels at the nearest of 2^bits levels; the gradient passes as if they stayed where they were."""
    steps = 2**bits - 1
    return lambda images: straight_through(images, lambda pictures: (pictures * steps).round() / steps)


def one_bit_is_black_and_white() -> None:
    """With one bit pixels are 0 or 1, with two they are thirds; and the gradient is the identity's."""
    pixels = torch.tensor([[[[0.1, 0.4, 0.6, 0.9]]]], dtype=torch.float64, requires_grad=True)
    for bits, want in ((1, [0, 0, 1, 1]), (2, [0, 1 / 3, 2 / 3, 1])):
        got = rounded(bits)(pixels)
        torch.testing.assert_close(got, torch.tensor([[[want]]], dtype=torch.float64))
        weights: Tensor = torch.arange(4.0, dtype=torch.float64).view_as(pixels)
        (gradient,) = torch.autograd.grad((got * weights).sum(), pixels)
        assert torch.equal(gradient, weights)


@method(
    family="defenses",
    title="Bit depth",
    references=[FEATURE_SQUEEZING],
    invariants=[PixelRange(field="transformed"), SameShape(field="transformed")],
    cost=Cost(forward=2 * size.images),
    tags=["input-transform"],
    oracle=one_bit_is_black_and_white,
    defense=rounded,
    demo={"bits": 2},
)
def bit_depth(
    model: Model,
    images: Images,
    *,
    bits: Annotated[int, Field(ge=1, le=16, description="bits a channel has left")] = 4,
) -> DefendedImages:
    """Show the model every picture with fewer levels in each channel.

    x' = round(x (2^bits - 1)) / (2^bits - 1),   dx'/dx = 1 on the way back

    A change smaller than half a step is gone, except where a pixel lies near the middle between two levels.
    Rounding has the gradient 0 everywhere, which would hide the model from attacks without making it any
    safer; ``bit_depth.defend(model)`` gives the identity's instead. ``images`` (N, C, H, W) in [0, 1].

    Source: Xu et al. 2018, section 3.1; the gradient (BPDA) Athalye et al. 2018, section 4.1.
    """
    return compared(model, images, rounded(bits))


@hookimpl
def phosphene_methods():
    return [bit_depth]
