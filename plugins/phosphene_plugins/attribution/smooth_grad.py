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
    max_batch,
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

from ._oracle_networks import quadratic_network
from ._relations import PROPORTIONAL_TO_THE_SCORE

Average = Literal["mean", "square", "variance"]


def equals_the_gradients_of_a_quadratic_score() -> None:
    """Of S = sum w z^2, z the normalized pixels, the gradient at I + n is 2 w z(I + n) / std.

    The noise n has the standard deviation 0.25 (max I - min I), a separate one for each image. Without noise
    every gradient is the same, and the variance 0.
    """
    model, weight, images = quadratic_network()
    images[1] = 0.5 + images[1] / 4
    predicted = model(images).argmax(1)
    values = images.flatten(1)
    sigma = 0.25 * (values.max(1).values - values.min(1).values)
    for seed in (0, 3):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.stack([torch.randn(1, 3, 8, 6, generator=generator) for _ in range(5)])
        noisy = images + sigma[:, None, None, None] * noise.double()
        z = model.normalize(noisy.flatten(0, 1)).view_as(noisy)
        gradients = 2 * weight[predicted] * z / model.std[:, None, None].double()
        expectations: dict[Average, Tensor] = {
            "mean": gradients.mean(0).abs(),
            "square": gradients.square().mean(0),
            "variance": gradients.var(0, correction=0),
        }
        for average, expected in expectations.items():
            with max_batch(6):
                result = smooth_grad(model, images, samples=5, noise_level=0.25, average=average, seed=seed)
            torch.testing.assert_close(result.maps, expected.amax(1))
            assert result.targets == tuple(f"class {index}" for index in predicted.tolist())
    maps = smooth_grad(model, images, 1, samples=3, noise_level=0, average="variance", seed=0).maps
    torch.testing.assert_close(maps, torch.zeros_like(maps))


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
    oracle=equals_the_gradients_of_a_quadratic_score,
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
