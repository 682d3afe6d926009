"""The picture that some score is highest for: what visualisations of classes and of units share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from phosphene import InputError, Model, Reference, optimize
from phosphene.images import gaussian_blur, noise_images
from phosphene.optimize import (
    FourierImage,
    Optimization,
    PixelImage,
    clip_smallest,
    l2_penalty,
    optimize_image,
)

SIMONYAN = Reference(
    key="simonyan2014",
    title="Deep Inside Convolutional Networks: Visualising Image Classification Models and Saliency Maps",
    authors="Simonyan, Vedaldi, Zisserman",
    year=2014,
    url="https://arxiv.org/abs/1312.6034",
)


YOSINSKI = Reference(
    key="yosinski2015",
    title="Understanding Neural Networks Through Deep Visualization",
    authors="Yosinski, Clune, Nguyen, Fuchs, Lipson",
    year=2015,
    url="https://arxiv.org/abs/1506.06579",
)


#: The regularisers, each alone or with others, and how to climb, as parameters.
L2: TypeAlias = Annotated[float, Field(ge=0, description="lambda: weight of ||I - mean colour||^2")]


Variation: TypeAlias = Annotated[float, Field(ge=0, description="weight of the total variation")]


BlurEvery: TypeAlias = Annotated[int, Field(ge=0, description="blur after every so many steps; 0: never")]


BlurSigma: TypeAlias = Annotated[float, Field(ge=0, le=50, description="width of that blur, in pixels")]


ClipNorm: TypeAlias = Annotated[float, Field(ge=0, le=100, description="% of pixels greyed, palest first")]


ClipContribution: TypeAlias = Annotated[
    float, Field(ge=0, le=100, description="likewise, least useful first")
]


Jitter: TypeAlias = Annotated[int, Field(ge=0, le=1024, description="roll by up to so many pixels each step")]


Rotate: TypeAlias = Annotated[float, Field(ge=0, le=180, description="turn by up to so many degrees")]


Rescale: TypeAlias = Annotated[float, Field(ge=1, le=4, description="enlarge or shrink by up to so much")]


Moved: TypeAlias = Annotated[Literal["pixels", "fourier"], Field(description="what is moved")]


Step: TypeAlias = Annotated[Literal["adam", "sgd", "normalized-sgd"], Field(description="kind of step")]


Steps: TypeAlias = Annotated[int, Field(ge=1, le=100_000, description="steps of ascent")]


LearningRate: TypeAlias = Annotated[float, Field(gt=0, le=1000, description="length of a step")]


StartNoise: TypeAlias = Annotated[float, Field(ge=0, le=1, description="standard deviation of the start")]


Size: TypeAlias = Annotated[int | None, Field(ge=8, le=4096, description="side in pixels; the model's own")]


#: How often a start that wakes no unit is drawn anew.
RESTARTS = 8


def preferred(
    model: Model,
    score: Callable[[Tensor], Tensor],
    count: int,
    start: Tensor | None,
    *,
    l2: float = 1e-3,
    total_variation: float = 0.0,
    blur_every: int = 4,
    blur_sigma: float = 0.8,
    clip_norm: float = 0,
    clip_contribution: float = 0,
    jitter: int = 8,
    rotate: float = 0.0,
    rescale: float = 1.0,
    parametrization: str = "fourier",
    start_noise: float = 0.0,
    size: int | None = None,
    seed: int | None,
    **climb: Any,
) -> Optimization:
    """argmax_I S(I) - l2 ||I - m||^2 - total_variation TV(I), from m, the model's mean colour, for S (N,).

    m is zero to the network; where it has none, it is mid-grey. Where a noisy start has no gradient at all
    (shut ReLUs), that image begins again in coarser noise, which differs more from draw to draw, up to
    ``RESTARTS`` times. What is left out is as in ``class_visualization``; ``climb`` goes on to
    ``optimize_image``.
    """
    grey = model.mean if model.mean.any() else 0.5
    if start is None:
        channels, height, width = model.input_size
        shape = (count, channels, size or height, size or width)
        start = noise_images(shape, seed=seed, mean=grey, sd=start_noise).to(model.device, model.dtype)
        for attempt in range(1, RESTARTS + 1 if start_noise else 1):
            asleep = (_gradient(score, start) == 0).flatten(1).all(1)
            if not asleep.any():
                break
            start[asleep] = _blobs(start[asleep], (seed or 0) + attempt)
    if len(start) not in (1, count):
        raise InputError(f"needs one picture to start from, or {count}, not {len(start)}")
    start = start.expand(count, -1, -1, -1)

    def penalty(images: Tensor) -> Tensor:
        return l2 * l2_penalty(images, grey) + total_variation * optimize.total_variation(images)

    def edit(images: Tensor, gradient: Tensor, step: int) -> Tensor:
        if blur_every and (step + 1) % blur_every == 0:
            images = gaussian_blur(images, blur_sigma)
        images = clip_smallest(images, clip_norm, grey) if clip_norm else images
        if clip_contribution:
            images = clip_smallest(images, clip_contribution, grey, gradient=gradient)
        return images

    changes: list[optimize.Transform] = [partial(optimize.jitter, pixels=jitter)] if jitter else []
    changes += [partial(optimize.rotate, degrees=rotate)] if rotate else []
    changes += [partial(optimize.rescale, factor=rescale)] if rescale > 1 else []
    return optimize_image(
        score,
        (PixelImage if parametrization == "pixels" else FourierImage)(start),
        regularizer=penalty if l2 or total_variation else None,
        transform=optimize.compose(changes) if changes else None,
        after_step=edit if blur_every or clip_norm or clip_contribution else None,
        seed=seed,
        **climb,
    )


def _gradient(score: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        values = score(images).sum()
        if not values.requires_grad:  # for ``optimize_image`` to say
            return torch.ones_like(images)
        return torch.autograd.grad(values, images)[0]


def _blobs(images: Tensor, seed: int) -> Tensor:
    """Grey noise as coarse as a tenth of the images' side: (N, C, H, W)."""
    count, channels, *sides = images.shape
    drawn = gaussian_blur(noise_images((count, 1, *sides), seed=seed) - 0.5, min(sides) / 10)
    return (0.5 + 0.2 * drawn / drawn.std()).clamp(0, 1).expand(-1, channels, -1, -1).to(images)
