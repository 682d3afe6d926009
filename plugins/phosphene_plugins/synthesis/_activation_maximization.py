"""Activation maximization: gradient ascent on an image for any score, with the usual regularizers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Class, InputError, Model, Reference, optimize
from phosphene.images import gaussian_blur, noise_images
from phosphene.optimize import (
    CppnImage,
    FourierImage,
    Optimization,
    Parametrization,
    PixelImage,
    clip_smallest,
    l2_penalty,
    optimize_image,
)
from phosphene.spec import ParameterGroup, ceil, minimum, param
from phosphene.targets import Objective

from ._batch_norm_prior import BatchNormPrior
from ._image_priors import diversity_penalty, transparent_score, with_background

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

OLAH = Reference(
    key="olah2017",
    title="Feature Visualization",
    authors="Olah, Mordvintsev, Schubert",
    year=2017,
    url="https://distill.pub/2017/feature-visualization",
)

MORDVINTSEV = Reference(
    key="mordvintsev2018",
    title="Differentiable Image Parameterizations",
    authors="Mordvintsev, Pezzotti, Schubert, Olah",
    year=2018,
    url="https://distill.pub/2018/differentiable-parameterizations",
)

CARTER = Reference(
    key="carter2019",
    title="Activation Atlas",
    authors="Carter, Armstrong, Schubert, Johnson, Olah",
    year=2019,
    url="https://distill.pub/2019/activation-atlas",
)

UpdateRule: TypeAlias = Annotated[
    Literal["adam", "sgd", "normalized-sgd"], Field(description="optimizer of the ascent")
]

Steps: TypeAlias = Annotated[int, Field(ge=1, le=100_000, description="number of optimization steps")]

LearningRate: TypeAlias = Annotated[float, Field(gt=0, le=1000, description="learning rate")]

Jitter: TypeAlias = Annotated[
    int, Field(ge=0, le=1024, description="largest random shift per step, in pixels")
]

Rotate: TypeAlias = Annotated[
    float, Field(ge=0, le=180, description="largest random rotation per step, in degrees")
]

Rescale: TypeAlias = Annotated[
    float, Field(ge=1, le=4, description="largest random scale factor per step; 1: no scaling")
]

ImageSide: TypeAlias = Annotated[
    int | None,
    Field(ge=8, le=4096, description="side of the image in pixels; default: the model's input size"),
]

CosinePower: TypeAlias = Annotated[
    float, Field(ge=0, le=20, description="exponent of the cosine; 0: the dot product alone")
]

ImageParametrization: TypeAlias = Annotated[
    Literal["pixels", "fourier"],
    Field(description="optimized variables: pixels, or a Fourier spectrum with decorrelated colors"),
]

#: Passes per step of the penalties that read layers: diversity and batch norm, each in a pass of its own.
PENALTY_PASSES = ceil(minimum(1, param.diversity)) + ceil(minimum(1, param.batch_norm))

#: Largest number of times that an initial image without gradient is replaced by other noise.
RESTARTS = 8

#: Standard deviation of that noise.
_COARSE_DEVIATION = 0.2


class Penalties(ParameterGroup):
    """Penalties, blur and shifts of activation maximization."""

    l2: Annotated[
        float, Field(ge=0, description="weight lambda of the penalty ||I - m||^2, m the model's mean color")
    ] = 0.0
    total_variation: Annotated[float, Field(ge=0, description="weight of the total variation")] = 0.0
    blur_every: Annotated[
        int, Field(ge=0, description="number of steps between Gaussian blurs; 0: no blur")
    ] = 0
    blur_sigma: Annotated[
        float, Field(ge=0, le=50, description="standard deviation of the Gaussian blur, in pixels")
    ] = 0.8
    jitter: Jitter = 8


class Regularizers(Penalties):
    """Regularizers of activation maximization and the parametrization of an image that has a start."""

    parametrization: ImageParametrization = "fourier"


class ActivationMaximization(Penalties):
    """All parameters of ``maximize_activation``."""

    parametrization: Annotated[
        Literal["pixels", "fourier", "cppn"],
        Field(
            description="optimized variables: pixels, a Fourier spectrum with decorrelated colors, or the "
            "weights of a network of the pixels' coordinates"
        ),
    ] = "fourier"
    clip_norm: Annotated[
        float,
        Field(ge=0, le=100, description="percentage of pixels set to the mean color, smallest norm first"),
    ] = 0
    clip_contribution: Annotated[
        float,
        Field(
            ge=0,
            le=100,
            description="percentage of pixels set to the mean color, smallest contribution first",
        ),
    ] = 0
    clip_gradient: Annotated[
        float,
        Field(ge=0, le=100, description="percentage of pixels whose gradient is zero, smallest norm first"),
    ] = 0
    rotate: Rotate = 10.0
    rescale: Rescale = 1.2
    optimizer: UpdateRule = "adam"
    steps: Steps = 200
    lr: LearningRate = 0.05
    start_noise: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="standard deviation of the noise in the initial image: white of pixels, with "
            "amplitudes 1/f in a Fourier spectrum",
        ),
    ] = 0.02
    start_contrast: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="standard deviation of the smooth gray noise in the initial image: without it the "
            "ascent can end where the unit's ReLUs are closed",
        ),
    ] = 0.0
    deconvnet_steps: Annotated[
        int,
        Field(
            ge=0,
            le=100_000,
            description="number of first steps at which positive gradients alone pass ReLUs, closed ones "
            "too; not of a network of coordinates",
        ),
    ] = 0
    size: ImageSide = None
    render_size: Annotated[
        int | None,
        Field(
            ge=8,
            le=8192,
            description="side of the returned images of a network of coordinates, in pixels; default: size",
        ),
    ] = None
    minimize: Annotated[
        bool, Field(description="minimize the score instead: what the unit responds to least")
    ] = False
    variants: Annotated[int, Field(ge=1, le=64, description="number of different images of each unit")] = 1
    diversity: Annotated[
        float, Field(ge=0, description="weight of the similarity of a unit's variants, which is penalized")
    ] = 0.0
    batch_norm: Annotated[
        float,
        Field(ge=0, description="weight of the distance from the running statistics of batch normalization"),
    ] = 0.0
    transparent: Annotated[
        bool, Field(description="optimize an opacity as well, before random backgrounds")
    ] = False


def maximize_activation(
    model: Model,
    score: Callable[[Tensor], Tensor],
    count: int,
    start: Tensor | None,
    params: ActivationMaximization,
    *,
    layer: str | None = None,
    frames: int = 0,
    seed: int | None,
) -> Optimization:
    """Activation maximization: argmax_I S(I) - l2 ||I - m||^2 - total_variation TV(I), ``count`` images.

    Args:
        score: images (N, C, H, W) -> S (N,); consecutive images are the variants of a unit.
        start: initial images, one or ``count``; None: the mean color m of the model plus noise.
        layer: layer in which the variants' similarity is measured; default: the last one with a map.
    """
    center, channels = mean_color(model), model.input_size[0]
    _check_options(params, start)
    transform, objective = _transform(params), score
    if params.transparent:
        transform, objective = with_background(transform), transparent_score(score)
    image = _initial_parametrization(model, score, count, start, params, seed)
    similarity = deviation = None
    if params.diversity:
        similarity = diversity_penalty(model, layer or model.last_map, params.variants)
    if params.batch_norm:
        deviation = BatchNormPrior(model)

    def penalty(images: Tensor) -> Tensor:
        images = images[:, :channels]
        distance = l2_penalty(images, center)
        total = params.l2 * distance + params.total_variation * optimize.total_variation(images)
        if similarity is not None:
            total = total + params.diversity * similarity(images)
        if deviation is not None:
            total = total + params.batch_norm * deviation(images)
        return total

    def blur_and_clip(images: Tensor, gradient: Tensor, step: int) -> Tensor:
        if params.blur_every and (step + 1) % params.blur_every == 0:
            images = gaussian_blur(images, params.blur_sigma)
        if params.clip_norm:
            images = clip_smallest(images, params.clip_norm, center)
        if params.clip_contribution:
            images = clip_smallest(images, params.clip_contribution, center, gradient=gradient)
        return images

    has_penalty = params.l2 or params.total_variation or params.diversity or params.batch_norm
    optimization = optimize_image(
        objective,
        image,
        steps=params.steps,
        lr=params.lr,
        optimizer=params.optimizer,
        maximize=not params.minimize,
        regularizer=penalty if has_penalty else None,  # equivalent mutants: penalties of weight 0
        deconvnet_steps=0 if params.parametrization == "cppn" else params.deconvnet_steps,
        transform=transform,
        after_step=blur_and_clip
        if params.blur_every or params.clip_norm or params.clip_contribution
        else None,
        frames=frames,
        seed=seed,
    )
    images, recorded = optimization.images, optimization.frames
    if params.render_size is not None:
        assert isinstance(image, CppnImage)
        images = image.render(params.render_size, params.render_size).detach()
    return optimization._replace(
        images=images[:, :channels],
        alpha=images[:, channels] if params.transparent else None,
        frames=None if recorded is None else recorded[:, :, :channels],
    )


def _check_options(params: ActivationMaximization, start: Tensor | None) -> None:
    """Refuse, with InputError, options that exclude each other."""
    if params.transparent and params.parametrization == "pixels":
        raise InputError('transparent needs parametrization="fourier" or "cppn", not "pixels"')
    if params.parametrization == "cppn":
        if start is not None:
            raise InputError('parametrization="cppn" has no start: its weights cannot be set from pixels')
        if params.blur_every or params.clip_norm or params.clip_contribution:
            raise InputError(
                'parametrization="cppn" optimizes weights, not pixels: set blur_every, clip_norm and '
                "clip_contribution to 0"
            )
    elif params.render_size is not None:
        raise InputError(
            f'render_size needs parametrization="cppn", not "{params.parametrization}", whose images have '
            "the pixels of size alone"
        )
    if params.transparent and (params.clip_norm or params.clip_contribution or params.clip_gradient):
        raise InputError(
            "transparent images have no mean color to clip to: set clip_norm, clip_contribution and "
            "clip_gradient to 0"
        )
    if params.transparent and params.minimize:
        raise InputError("a transparent image loses score by its opacity, which minimize would reward")
    if params.variants == 1 and params.diversity:
        raise InputError("diversity is between the variants of a unit: set variants to 2 or more")
    if params.variants > 1 and (start is not None or not params.start_noise):
        raise InputError("variants differ by the noise of their start: use start_noise above 0 and no start")


def class_count(target: Objective) -> int:
    """Number of images for a target: one per class of a tuple of classes, else one."""
    return len(target.index) if isinstance(target, Class) and isinstance(target.index, tuple) else 1


def mean_color(model: Model) -> Tensor:
    """The color (C,) that normalization maps to zero; mid-gray for a model without a mean."""
    return model.mean if model.mean.any() else torch.full_like(model.mean, 0.5)


def _transform(params: ActivationMaximization) -> optimize.Transform | None:
    """Clipping of the gradient and the random transform, composed; None if all are off."""
    moved = random_transform(params.jitter, params.rotate, params.rescale)
    if not params.clip_gradient:
        return moved

    def clip(images: Tensor, generator: torch.Generator) -> Tensor:
        return optimize.clip_gradient(images, params.clip_gradient)

    # First, so that the gradient of the image itself is clipped.
    return clip if moved is None else optimize.compose([clip, moved])


def random_transform(jitter: int, rotate: float, rescale: float) -> optimize.Transform | None:
    """Random shift, rotation and scale, composed; None if all are off."""
    transforms: list[optimize.Transform] = []
    if jitter:
        transforms.append(partial(optimize.jitter, pixels=jitter))
    if rotate:
        transforms.append(partial(optimize.rotate, degrees=rotate))
    # equivalent mutants: a scale factor of 1 leaves the image as it is
    if rescale > 1:
        transforms.append(partial(optimize.rescale, factor=rescale))
    return optimize.compose(transforms) if transforms else None


def _initial_parametrization(
    model: Model,
    score: Callable[[Tensor], Tensor],
    count: int,
    start: Tensor | None,
    params: ActivationMaximization,
    seed: int | None,
) -> Parametrization:
    """What is optimized, at the start: the images ``start``, or the mean color plus noise."""
    if params.parametrization == "cppn":
        return _initial_network(model, score, count, params, seed)
    if start is None:
        start = _initial_images(model, score, count, params, seed)
    if len(start) not in (1, count):
        raise InputError(f"start needs one image, or {count}, not {len(start)}")
    start = start.expand(count, -1, -1, -1)
    if params.transparent:
        return FourierImage(torch.cat([start, torch.full_like(start[:, :1], 0.5)], 1), opacity=True)
    return (PixelImage if params.parametrization == "pixels" else FourierImage)(start)


def _initial_network(
    model: Model,
    score: Callable[[Tensor], Tensor],
    count: int,
    params: ActivationMaximization,
    seed: int | None,
) -> CppnImage:
    """Networks of coordinates that draw the mean color plus noise, of more contrast without gradient."""
    channels, height, width = model.input_size
    color = mean_color(model)
    if params.transparent:
        color = torch.cat([color, color.new_full((1,), 0.5)])

    size = (params.size or height, params.size or width)

    def draw(deviation: float, seed: int | None) -> Tensor:
        weights = CppnImage.initial_weights(color, deviation=deviation, opacity=params.transparent, seed=seed)
        return weights[None].to(model.device, model.dtype)

    def network(weights: Tensor) -> CppnImage:
        return CppnImage(weights, size, len(color), opacity=params.transparent)

    weights = _starts_with_gradient(
        score,
        count,
        params,
        seed,
        draw=lambda own_seed: draw(params.start_noise, own_seed),
        redraw=lambda rows, own_seed: draw(_COARSE_DEVIATION, own_seed),
        images=lambda weights: network(weights).image()[:, :channels],
    )
    return network(weights)


def _initial_images(
    model: Model,
    score: Callable[[Tensor], Tensor],
    count: int,
    params: ActivationMaximization,
    seed: int | None,
) -> Tensor:
    """Mean color plus noise, (count, C, H, W); without gradient coarse noise, which varies more."""
    channels, height, width = model.input_size
    shape = (1, channels, params.size or height, params.size or width)

    def draw(seed: int | None) -> Tensor:
        images = start_images(model, shape, params.parametrization, params.start_noise, seed)
        if params.start_contrast:
            noise = (coarse_noise(images, seed) - 0.5) / _COARSE_DEVIATION
            images = (images + params.start_contrast * noise).clamp(0, 1)
        return images

    return _starts_with_gradient(
        score,
        count,
        params,
        seed,
        draw=draw,
        redraw=coarse_noise,
        images=lambda images: images,
    )


def _starts_with_gradient(
    score: Callable[[Tensor], Tensor],
    count: int,
    params: ActivationMaximization,
    seed: int | None,
    *,
    draw: Callable[[int | None], Tensor],
    redraw: Callable[[Tensor, int], Tensor],
    images: Callable[[Tensor], Tensor],
) -> Tensor:
    """Starts (count, ...), the variants of each unit in a row: ``draw(seed)`` is (1, ...).

    A start at whose ``images`` the score has no gradient (closed ReLUs) is drawn anew by
    ``redraw(rows, seed)``, up to ``RESTARTS`` times.
    """
    variants = [draw(seed if seed is None else seed + n) for n in range(params.variants)]
    starts = torch.cat(variants * (count // params.variants))
    for attempt in range(1, RESTARTS + 1 if params.start_noise else 1):
        rows = without_gradient(score, images(starts))
        if not len(rows):
            break
        for n in range(params.variants):
            own = rows[rows % params.variants == n]
            starts[own] = redraw(starts[own], (seed or 0) + attempt + RESTARTS * n)
    return starts


def start_images(
    model: Model, shape: tuple[int, ...], parametrization: str, deviation: float, seed: int | None
) -> Tensor:
    """The model's mean color plus noise, (N, C, H, W): white in the pixels, 1/f in a Fourier spectrum."""
    if parametrization == "pixels" or not deviation:
        images = noise_images(shape, seed=seed, mean=mean_color(model), sd=deviation)
    else:
        images = _pink_noise_images(shape, seed, mean_color(model), deviation)
    return images.to(model.device, model.dtype)


def _pink_noise_images(shape: tuple[int, ...], seed: int | None, mean: Tensor, deviation: float) -> Tensor:
    """Noise images (N, C, H, W) as ``noise_images``, with amplitudes that fall with the frequency.

    White noise stays in the image as grain: the steps of a Fourier spectrum barely change high frequencies.
    """
    white = noise_images((1, *shape[1:]), seed=seed).double()
    # equivalent mutants: the noise is divided by its deviation
    decay = 1 / optimize.fourier_frequencies(*shape[2:])
    decay[0, 0] = 0  # the mean
    noise = torch.fft.irfft2(torch.fft.rfft2(white) * decay, s=shape[2:])
    noise = deviation * noise / noise.std().clamp(min=1e-12)
    images: Tensor = (mean.double().cpu()[None, :, None, None] + noise).clamp(0, 1)
    return images.repeat(shape[0], 1, 1, 1)


def without_gradient(score: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Indices of the images (N, C, H, W) at which the scores (N,) have no gradient: closed ReLUs."""
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        values = score(images).sum()  # equivalent mutants: only zeros of the gradient matter
        if not values.requires_grad:  # optimize_image raises the error for this
            return torch.arange(0)
        gradient = torch.autograd.grad(values, images)[0]
    return (gradient == 0).flatten(1).all(1).nonzero()[:, 0]


def coarse_noise(images: Tensor, seed: int | None) -> Tensor:
    """Gray noise (1, 1, H, W) for images (N, C, H, W), blurred by a tenth of their shorter side."""
    sides = images.shape[2:]
    noise = gaussian_blur(noise_images((1, 1, *sides), seed=seed) - 0.5, min(sides) / 10)
    return (0.5 + _COARSE_DEVIATION * noise / noise.std()).clamp(0, 1).to(images)
