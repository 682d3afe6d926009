"""Total variation denoising (Chambolle's dual projection) as a defense."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from phosphene import Reference, hookimpl, method
from phosphene.roles import Images, Model
from phosphene.spec import Cost, Equivariant, PixelRange, SameShape, size
from phosphene.testing import linear_model

from ._input_transform_result import INDEPENDENT, DefendedImages, Transform, compare_predictions

#: Step size s of the dual ascent, with which it converges in two dimensions.
_STEP_SIZE = 0.25


def denoise(weight: float, steps: int) -> Transform:
    """Denoising by ``steps`` iterations of Chambolle's algorithm, differentiable."""

    def transform(images: Tensor) -> Tensor:
        if not weight:
            return images
        dual = images.new_zeros(2, *images.shape)
        for _ in range(steps):
            gradient = _gradient(_divergence(dual) - images / weight)
            squared_length = gradient.square().sum(0)
            is_positive = squared_length > 0  # the root has an infinite derivative at 0: flat pixels skip it
            length = torch.where(is_positive, torch.where(is_positive, squared_length, 1).sqrt(), 0)
            dual = (dual + _STEP_SIZE * gradient) / (1 + _STEP_SIZE * length)
        # equivalent mutants: only rounding leaves [0, 1]: every step preserves the range
        return (images - weight * _divergence(dual)).clamp(0, 1)

    return transform


def _gradient(images: Tensor) -> Tensor:
    """Forward differences to the pixel below and to the right, (2, N, C, H, W); 0 at the last row, column."""
    vertical = F.pad(images[..., 1:, :] - images[..., :-1, :], (0, 0, 0, 1))
    horizontal = F.pad(images[..., :, 1:] - images[..., :, :-1], (0, 1))
    return torch.stack([vertical, horizontal])


def _divergence(field: Tensor) -> Tensor:
    """The divergence of a field (2, N, C, H, W): the negative adjoint of ``_gradient``."""
    vertical, horizontal = field[0][..., :-1, :], field[1][..., :, :-1]
    return (
        F.pad(vertical, (0, 0, 0, 1))
        - F.pad(vertical, (0, 0, 1, 0))
        + F.pad(horizontal, (0, 1))
        - F.pad(horizontal, (1, 0))
    )


def lowers_a_step_by_the_closed_form() -> None:
    """The edge between two flat halves shrinks by weight / width on each side; a flat image is unchanged."""
    halves = torch.zeros(1, 1, 6, 8, dtype=torch.float64)
    halves[..., 4:] = 1
    denoised = denoise(0.2, 2000)(halves)
    expected = halves + 0.2 / 4 - halves * 0.2 / 2
    torch.testing.assert_close(denoised, expected, atol=1e-3, rtol=0)
    model = linear_model(torch.linspace(-1, 1, 96, dtype=torch.float64).view(2, 1, 6, 8))
    result = total_variation(model, halves, weight=0.2, steps=1000)
    torch.testing.assert_close(result.transformed, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(result.confidence_after, model(result.transformed).softmax(1).amax(1))
    flat = torch.full((1, 2, 4, 4), 0.3, requires_grad=True)
    assert torch.equal(denoise(0.0, 10)(flat), flat)
    torch.testing.assert_close(denoise(0.2, 10)(flat), flat)
    assert torch.autograd.grad(denoise(0.2, 10)(flat)[0, 0, 1, 1], flat)[0].isfinite().all()
    # After one step: x + w grad' p, p = s u / (1 + s |u|), u = -grad x / w.
    noise = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradient = _differences(noise.requires_grad_())
    u = -gradient.detach() / 0.3
    (step,) = torch.autograd.grad(gradient, noise, 0.25 * u / (1 + 0.25 * u.norm(dim=0)))
    torch.testing.assert_close(denoise(0.3, 1)(noise), noise + 0.3 * step)


def _differences(images: Tensor) -> Tensor:
    below, right = images[..., -1:, :], images[..., -1:]
    return torch.stack([images.diff(dim=2, append=below), images.diff(dim=3, append=right)])


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
    relations=[Equivariant("transpose"), *INDEPENDENT],
    cost=Cost(forward=2 * size.images),
    tags=["input-transform"],
    oracle=lowers_a_step_by_the_closed_form,
    defense=denoise,
    quick={"steps": 3},
)
def total_variation(
    model: Model,
    images: Images,
    *,
    weight: Annotated[float, Field(ge=0, le=10, description="weight of the total variation")] = 0.1,
    steps: Annotated[int, Field(ge=1, le=1000, description="steps of the dual ascent")] = 20,
) -> DefendedImages:
    """Total variation denoising of each channel, as an input transform against adversarial perturbations.

    x' = argmin_z  |z - x|^2 / 2 + weight sum_p |grad z_p|,   x' = x - weight div p
    p <- (p + s u) / (1 + s |u|),   u = grad(div p - x / weight),   s = 1/4

    with forward differences as the gradient. The iteration is differentiable, so attacks on
    ``total_variation.defend(model)`` need no substitute for its gradient.

    Returns:
        ``transformed`` (N, C, H, W) in [0, 1]; ``before``, ``after`` (N,) the predicted classes.

    Raises:
        InputError: ``images`` do not fit the model.

    Example::
        from phosphene import run

        result = run("total_variation", images="builtin:scenes/2", weight=0.2)
        result.transformed.shape  # (2, 3, 64, 64)

    Source: Chambolle 2004, section 3; as a defense Guo et al. 2018, section 3.2.
    """
    return compare_predictions(model, images, denoise(weight, steps))


@hookimpl
def phosphene_methods():
    return [total_variation]
