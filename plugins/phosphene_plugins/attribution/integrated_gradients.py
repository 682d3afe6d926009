"""Integrated gradients: gradients along the line from a baseline to the image, times their difference."""

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Method,
    Reference,
    batch_size,
    hookimpl,
    input_gradient,
    load_model,
    max_batch,
    method,
    progress_bar,
)
from phosphene.images import Baseline, baseline_images
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Seed, Target
from phosphene.spec import Agrees, Complete, Cost, LinearIn, MapPerPixel, param, size

from ._oracle_networks import quadratic_network
from ._relations import GRADIENT


def equals_gradient_times_input_without_biases() -> None:
    """A ReLU network without biases is linear along the line from black: IG = x dS/dx, summing to S(x).

    Of S = sum w z^2, z the normalized pixels, IG = w (z^2 - z_B^2) for any baseline B.
    """
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 2, bias=False)
    std = [0.25, 0.5, 0.75]  # without a mean, which would be a bias
    model = load_model(nn.Sequential(*layers).double(), input_size=(3, 8, 8), mean=[0.0] * 3, std=std)
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    for index in (0, 1):
        maps = integrated_gradients(model, images, index, steps=3, baseline="zero").maps
        torch.testing.assert_close(maps, (images * input_gradient(model, images, index)).sum(1))
        torch.testing.assert_close(maps.sum((1, 2)), model(images)[:, index].detach())
    model, weight, images = quadratic_network()
    baselines: tuple[tuple[Baseline, Tensor], ...] = (
        ("gray", torch.full_like(images, 0.5)),
        ("mean", images.mean((2, 3), keepdim=True).expand_as(images)),
        ("blur", baseline_images(images, "blur", sigma=6 / 8, seed=5)),
        ("noise", baseline_images(images, "noise", sigma=6 / 8, seed=5)),
    )
    for name, start in baselines:
        difference = model.normalize(images).square() - model.normalize(start).square()
        predicted = model(images).argmax(1)
        with max_batch(6):
            result = integrated_gradients(model, images, steps=3, baseline=name, seed=5)
        torch.testing.assert_close(result.maps, (weight[predicted] * difference).sum(1))
        assert result.targets == tuple(f"class {index}" for index in predicted.tolist())


@method(
    family="attribution",
    references=[
        Reference(
            key="sundararajan2017",
            title="Axiomatic Attribution for Deep Networks",
            authors="Sundararajan, Taly, Yan",
            year=2017,
            url="https://arxiv.org/abs/1703.01365",
        )
    ],
    invariants=[MapPerPixel()],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 1), backward=size.images * param.steps),
    oracle=equals_gradient_times_input_without_biases,
    relations=[
        *(
            Complete("baseline", where={"steps": 16, "baseline": b}, tolerance=1e-5)
            for b in ("zero", "gray", "mean")
        ),
        Agrees("attribution.gradient_x_input", networks=("homogeneous",), where={"steps": 3}),
        LinearIn("target"),
        *GRADIENT,
    ],
    quick={"steps": 4},
)
def integrated_gradients(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    steps: Annotated[
        int, Field(ge=1, le=1000, description="quadrature points between the baseline and the image")
    ] = 32,
    baseline: Annotated[Baseline, Field(description="image that the integral starts from")] = "zero",
    seed: Seed = None,
) -> Attribution:
    """Integrated gradients: the score's change from a baseline to the image, attributed to the pixels.

    M_ij = sum_c (I - B)_cij integral_0^1 dS/dI_cij (B + a (I - B)) da

    The integral is approximated by Gauss-Legendre quadrature with ``steps`` points. ``baseline`` B is
    "zero" (black), "gray" (0.5), "mean" (the image's mean color), "blur" (sigma: 1/8 of the shorter side) or
    "noise". A predicted target is the class predicted for the image.

    Returns:
        ``maps`` (N, H, W), raw and signed; they sum to S(I) - S(B), up to the quadrature's error.

    Raises:
        InputError or UnknownName for a target that the model does not have.

    Example::
        from phosphene import run

        result = run("integrated_gradients", images="builtin:scenes/2")
        result.maps.shape  # (2, 64, 64)

    Source:
        Sundararajan, Taly & Yan 2017, equation 1.
    """
    target = target.resolve(model, images)
    start = baseline_images(images, baseline, sigma=min(images.shape[2:]) / 8, seed=seed)
    total = torch.zeros_like(images)
    points, weights = np.polynomial.legendre.leggauss(steps)  # on [-1, 1]
    alphas, step_weights = torch.tensor(np.stack([(points + 1) / 2, weights / 2])).to(images)
    count, chunk_size = len(images), max(1, batch_size(model) // len(images))
    for chunk in progress_bar(torch.arange(steps).split(chunk_size), "integrating"):
        batch = start + alphas[chunk, None, None, None, None] * (images - start)
        batch_target = target.select([*range(count)] * len(chunk))
        gradients = input_gradient(model, batch.flatten(0, 1), batch_target).view_as(batch)
        total += torch.einsum("k,knchw->nchw", step_weights[chunk], gradients)
    return Attribution(
        images=images,
        maps=((images - start) * total).sum(1),
        targets=target.names(model, len(images)),
        layout="map",
    )


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [integrated_gradients]
