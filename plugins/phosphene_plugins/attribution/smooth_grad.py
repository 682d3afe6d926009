"""SmoothGrad: the gradient, averaged over noisy copies of the picture."""

from typing import Annotated, Any, Literal

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
    method,
    progress_bar,
)
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Seed, Target
from phosphene.spec import Cost, MapPerPixel, Nonnegative, param, size

Average = Literal["mean", "square", "variance"]


def linear_model_gives_its_weights() -> None:
    """On a linear model every gradient is w: their mean is w, their mean square w^2, their variance 0."""
    linear = nn.Linear(60, 2)
    model = load_model(nn.Sequential(nn.Flatten(), linear).double())
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    weight = linear.weight[1].view(3, 4, 5).detach()
    expectations: dict[Average, Tensor] = {
        "mean": weight.abs(), "square": weight.square(), "variance": 0 * weight,
    }  # fmt: skip
    for average, expected in expectations.items():
        maps = smooth_grad(model, images, 1, samples=5, average=average, seed=0).maps
        torch.testing.assert_close(maps, expected.amax(0).expand(2, 4, 5))


@method(
    family="attribution",
    title="SmoothGrad",
    references=[
        Reference(
            key="smilkov2017",
            title="SmoothGrad: removing noise by adding noise",
            authors="Smilkov, Thorat, Kim, Viegas, Wattenberg",
            year=2017,
            url="https://arxiv.org/abs/1706.03825",
        )
    ],
    invariants=[Nonnegative(), MapPerPixel()],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.samples + 1), backward=size.images * param.samples),
    oracle=linear_model_gives_its_weights,
    quick={"samples": 3},
)
def smooth_grad(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    samples: Annotated[int, Field(ge=1, le=10_000, description="how many noisy copies")] = 25,
    noise_level: Annotated[float, Field(ge=0, le=1, description="sigma, as a share of the range")] = 0.15,
    average: Annotated[Average, Field(description="what is told of the gradients")] = "mean",
    seed: Seed = None,
) -> Attribution:
    """Show how strongly the score depends on each pixel, on average around the picture.

    M_ij = max_c | mean_k g^k_cij |,  g^k = dS/dI at I + n^k,  n^k ~ Normal(0, sigma^2)

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, H, W), raw. sigma is ``noise_level`` times the
    picture's own range, max - min; noisy pixels are not clipped, as in the paper. ``average``
    "square" is SmoothGrad-Squared (the mean of g^2), "variance" VarGrad. All images get the same noise,
    and the target is decided on the clean picture.

    Source: Smilkov et al. 2017, section 2; Hooker et al. 2019; Adebayo et al. 2018.
    """
    target = target.resolve(model, images)
    generator = torch.Generator().manual_seed(seed or 0)
    sigma = noise_level * (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True))
    mean, spread = torch.zeros_like(images), torch.zeros_like(images)
    several = max(1, batch_size(model) // len(images))
    for done in progress_bar(range(0, samples, several), "noisy copies"):
        draws = [
            torch.randn(1, *images.shape[1:], generator=generator)
            for _ in range(done, min(done + several, samples))
        ]
        noisy = torch.cat([images + sigma * draw.to(images) for draw in draws])
        wanted = target.select([*range(len(images))] * len(draws))
        for count, gradient in enumerate(input_gradient(model, noisy, wanted).split(len(images)), done + 1):
            away = gradient - mean
            mean = mean + away / count
            spread = spread + away * (gradient - mean)  # Welford's sum of squares about the mean
    variance = (spread / samples).clamp(min=0)
    values = {"mean": mean.abs(), "square": mean.square() + variance, "variance": variance}[average]
    return Attribution(
        images=images, maps=values.amax(1), targets=target.names(model, len(images)), layout="map"
    )


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [smooth_grad]
