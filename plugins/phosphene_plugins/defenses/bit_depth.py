"""Bit-depth reduction (feature squeezing): fewer intensity levels per channel, as a defense."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Reference, hookimpl, method
from phosphene.optimize import straight_through
from phosphene.roles import Images, Model
from phosphene.spec import Cost, Equivariant, PixelRange, SameShape, size
from phosphene.testing import linear_model

from ._input_transform_result import FLIPS, INDEPENDENT, DefendedImages, Transform, compare_predictions

#: The paper of bit-depth reduction and median smoothing.
FEATURE_SQUEEZING = Reference(
    key="xu2018",
    title="Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks",
    authors="Xu, Evans, Qi",
    year=2018,
    url="https://arxiv.org/abs/1704.01155",
)


def quantize(bits: int) -> Transform:
    """Rounding to the nearest of 2^bits levels, with the gradient of the identity."""
    steps = 2**bits - 1
    return lambda images: straight_through(images, lambda x: (x * steps).round() / steps)


def one_bit_is_black_and_white() -> None:
    """Pixels are multiples of 1, of 1/3 and of 1/7 with one to three bits; the gradient is the identity's."""
    pixels = torch.tensor([[[[0.1, 0.4, 0.6, 0.9]]]], dtype=torch.float64, requires_grad=True)
    for bits, levels in ((1, [0, 0, 1, 1]), (2, [0, 1 / 3, 2 / 3, 1]), (3, [1 / 7, 3 / 7, 4 / 7, 6 / 7])):
        quantized = quantize(bits)(pixels)
        torch.testing.assert_close(quantized, torch.tensor([[[levels]]], dtype=torch.float64))
        weights: Tensor = torch.arange(4.0, dtype=torch.float64).view_as(pixels)
        (gradient,) = torch.autograd.grad((quantized * weights).sum(), pixels)
        assert torch.equal(gradient, weights)
    model, images = linear_model(), pixels.detach().view(1, 1, 2, 2)
    result = bit_depth(model, images, bits=2)
    torch.testing.assert_close(result.transformed, (images * 3).round() / 3)
    torch.testing.assert_close(result.confidence_after, model(result.transformed).softmax(1).amax(1))


@method(
    family="defenses",
    title="Bit depth",
    references=[FEATURE_SQUEEZING],
    invariants=[PixelRange(field="transformed"), SameShape(field="transformed")],
    relations=[*FLIPS, Equivariant("shift"), *INDEPENDENT],
    cost=Cost(forward=2 * size.images),
    tags=["input-transform"],
    oracle=one_bit_is_black_and_white,
    defense=quantize,
    demo={"bits": 2},
)
def bit_depth(
    model: Model,
    images: Images,
    *,
    bits: Annotated[int, Field(ge=1, le=16, description="bits per channel that remain")] = 4,
) -> DefendedImages:
    """Bit-depth reduction (feature squeezing): fewer intensity levels per channel, as an input transform.

    x' = round(x (2^bits - 1)) / (2^bits - 1),   dx'/dx = 1 in the backward pass

    A perturbation smaller than half a level is removed, except near the midpoint between two levels. Rounding
    has gradient 0 almost everywhere, which would hide the gradient without making the model more robust;
    ``bit_depth.defend(model)`` therefore uses the gradient of the identity (BPDA).

    Returns:
        ``transformed`` (N, C, H, W) in [0, 1]; ``before``, ``after`` (N,) the predicted classes.

    Raises:
        InputError: ``images`` do not fit the model.

    Example::
        from phosphene import run

        result = run("bit_depth", images="builtin:scenes/2", bits=3)
        result.transformed.shape  # (2, 3, 64, 64)

    Source: Xu et al. 2018, section 3.1; BPDA Athalye et al. 2018, section 4.1.
    """
    return compare_predictions(model, images, quantize(bits))


@hookimpl
def phosphene_methods():
    return [bit_depth]
