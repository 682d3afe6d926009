"""Integrated gradients: the change of the score from a baseline, shared out among the pixels."""

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from phosphene import (
    Method,
    Reference,
    batch_size,
    hookimpl,
    input_gradient,
    load_model,
    method,
    progress_bar,
)
from phosphene.images import Baseline, baseline_images
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Seed, Target
from phosphene.spec import Cost, MapPerPixel, param, size


def without_biases_it_is_gradient_times_input() -> None:
    """A ReLU network without biases is linear along the ray from black: IG = x dS/dx, summing to S(x)."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 2, bias=False)
    model = load_model(nn.Sequential(*layers).double(), input_size=(3, 8, 8))
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    for index in (0, 1):
        maps = integrated_gradients(model, images, index, steps=3, baseline="zero").maps
        torch.testing.assert_close(maps, (images * input_gradient(model, images, index)).sum(1))
        torch.testing.assert_close(maps.sum((1, 2)), model(images)[:, index].detach())


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
    oracle=without_biases_it_is_gradient_times_input,
    quick={"steps": 4},
)
def integrated_gradients(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    steps: Annotated[int, Field(ge=1, le=1000, description="points on the way from the baseline")] = 32,
    baseline: Annotated[Baseline, Field(description="where the way begins")] = "zero",
    seed: Seed = None,
) -> Attribution:
    """Share out the change of the score between a baseline and the picture among the pixels.

    M_ij = sum_c (I - B)_cij integral_0^1 dS/dI_cij (B + a (I - B)) da

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, H, W), raw and signed; they sum to S(I) - S(B), the
    more exactly the more ``steps``. The integral is taken by Gauss and Legendre's rule. ``baseline`` B:
    black, mid-grey, the picture's mean colour, its blur by an eighth of its shorter side, or noise. The
    target is decided on the whole picture.

    Source: Sundararajan, Taly & Yan 2017, equation 1.
    """
    target = target.resolve(model, images)
    start = baseline_images(images, baseline, sigma=min(images.shape[2:]) / 8, seed=seed)
    total = torch.zeros_like(images)
    points, weights = np.polynomial.legendre.leggauss(steps)  # on [-1, 1]
    alphas, shares = torch.tensor(np.stack([(points + 1) / 2, weights / 2])).to(images)
    count, several = len(images), max(1, batch_size(model) // len(images))
    for some in progress_bar(torch.arange(steps).split(several), "integrating"):
        places = start + alphas[some, None, None, None, None] * (images - start)
        wanted = target.select([*range(count)] * len(some))
        gradients = input_gradient(model, places.flatten(0, 1), wanted).view_as(places)
        total += torch.einsum("k,knchw->nchw", shares[some], gradients)
    return Attribution(
        images=images,
        maps=((images - start) * total).sum(1),
        targets=target.names(model, len(images)),
        layout="map",
    )


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [integrated_gradients]
