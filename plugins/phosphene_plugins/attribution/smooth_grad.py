"""SmoothGrad: mean, mean square or variance of the gradient over noisy copies of the image."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from phosphene import (
    Method,
    Reference,
    batch_size,
    hookimpl,
    input_gradient,
    method,
    progress_bar,
)
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Seed, Target
from phosphene.spec import (
    Agrees,
    Calls,
    Cost,
    InvariantTo,
    MapPerPixel,
    Nonnegative,
    ScalesWith,
    ZeroWhen,
    param,
    size,
)
from phosphene.testing import linear_model

from ._relations import PROPORTIONAL_TO_THE_SCORE

Average = Literal["mean", "square", "variance"]


def equals_the_weights_of_a_linear_model() -> None:
    """On a linear model every gradient is w: their mean is w, their mean square w^2, their variance 0."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator)
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=generator)
    model, weight = linear_model(weights), weights[1]
    expectations: dict[Average, Tensor] = {
        "mean": weight.abs(), "square": weight.square(), "variance": 0 * weight,
    }  # fmt: skip
    for average, expected in expectations.items():
        maps = smooth_grad(model, images, 1, samples=5, average=average, seed=0).maps
        torch.testing.assert_close(maps, expected.amax(0).expand(2, 4, 5))


def squared_saliency(calls: Calls) -> Tensor:
    """Square of the saliency map, which SmoothGrad-Squared is without noise."""
    maps: Tensor = calls.other("attribution.saliency").maps
    return maps.square()


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
    oracle=equals_the_weights_of_a_linear_model,
    relations=[
        Agrees("attribution.saliency", where={"noise_level": 0}),
        Agrees(squared_saliency, where={"noise_level": 0, "average": "square"}),
        *(ScalesWith("logits", power=2, where={"average": average}) for average in ("square", "variance")),
        *PROPORTIONAL_TO_THE_SCORE,
        ZeroWhen("ignored"),
        InvariantTo("normalization"),
    ],
    quick={"samples": 3},
)
def smooth_grad(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    samples: Annotated[int, Field(ge=1, le=10_000, description="number of noisy copies of each image")] = 25,
    noise_level: Annotated[
        float,
        Field(ge=0, le=1, description="standard deviation of the noise, as a fraction of the image's range"),
    ] = 0.15,
    average: Annotated[
        Average, Field(description="statistic of the gradients; square: their mean square")
    ] = "mean",
    seed: Seed = None,
) -> Attribution:
    """SmoothGrad: gradient of the score averaged over noisy copies of the image.

    M_ij = max_c | mean_k g^k_cij |,  g^k = dS/dI at I + n^k,  n^k ~ Normal(0, sigma^2)

    sigma is ``noise_level`` times the image's range, max - min; noisy pixels are not clipped, as in the
    paper. ``average`` "square" is SmoothGrad-Squared (the mean of g^2), "variance" is VarGrad. All images
    get the same noise; a predicted target is the class predicted for the clean image.

    Returns:
        ``maps`` (N, H, W), raw.

    Raises:
        InputError or UnknownName for a target that the model does not have.

    Example::
        from phosphene import run

        result = run("smooth_grad", images="builtin:scenes/2")
        result.maps.shape  # (2, 64, 64)

    Source:
        Smilkov et al. 2017, section 2; Hooker et al. 2019; Adebayo et al. 2018.
    """
    target = target.resolve(model, images)
    generator = torch.Generator().manual_seed(seed or 0)
    sigma = noise_level * (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True))
    mean, sum_of_squares = torch.zeros_like(images), torch.zeros_like(images)
    chunk_size = max(1, batch_size(model) // len(images))
    for start in progress_bar(range(0, samples, chunk_size), "noisy copies"):
        noise = [
            torch.randn(1, *images.shape[1:], generator=generator)
            for _ in range(start, min(start + chunk_size, samples))
        ]
        noisy = torch.cat([images + sigma * sample.to(images) for sample in noise])
        batch_target = target.select([*range(len(images))] * len(noise))
        gradients = input_gradient(model, noisy, batch_target).split(len(images))
        for count, gradient in enumerate(gradients, start + 1):
            deviation = gradient - mean
            mean = mean + deviation / count
            # Welford's update of the sum of squared deviations from the mean.
            sum_of_squares = sum_of_squares + deviation * (gradient - mean)
    variance = (sum_of_squares / samples).clamp(min=0)
    values = {"mean": mean.abs(), "square": mean.square() + variance, "variance": variance}[average]
    return Attribution(
        images=images, maps=values.amax(1), targets=target.names(model, len(images)), layout="map"
    )


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [smooth_grad]
