"""Class visualisation: the picture a model would like best to see."""

from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Class, Reference, hookimpl, load_model, method, pixels, scores
from phosphene.results import Synthesis
from phosphene.spec import Cost, PixelRange
from phosphene.types import Frames, Model, Seed, Start, Target


def linear_unit_with_l2_has_its_closed_form() -> None:
    """max w.I - lambda ||I - m||^2 lies at I = m + w / (2 lambda), clipped into the box."""
    linear = torch.nn.Linear(48, 2).double()
    weight = torch.linspace(-1, 1, 96, dtype=torch.float64).view(2, 48)
    with torch.no_grad():
        linear.weight.copy_(weight)
    network = torch.nn.Sequential(torch.nn.Flatten(), linear)
    model = load_model(network, mean=[0.4, 0.5, 0.6], std=[1.0, 1.0, 1.0], input_size=(3, 4, 4))
    plain: Any = {"blur_every": 0, "jitter": 0, "parametrization": "pixels", "optimizer": "sgd", "lr": 0.2}
    made = class_visualization(model, Class((0, 1)), l2=0.8, **plain)
    wanted = (model.mean.double().view(3, 1, 1) + weight.view(2, 3, 4, 4) / (2 * 0.8)).clamp(0, 1)
    assert (made.images - wanted).abs().max() < 1e-6, "not at m + w / (2 lambda)"


@method(
    family="synthesis",
    references=[
        Reference(
            key="simonyan2014",
            title="Deep Inside Convolutional Networks: Visualising Image Classification Models "
            "and Saliency Maps",
            authors="Simonyan, Vedaldi, Zisserman",
            year=2014,
            url="https://arxiv.org/abs/1312.6034",
        ),
        Reference(
            key="yosinski2015",
            title="Understanding Neural Networks Through Deep Visualization",
            authors="Yosinski, Clune, Nguyen, Fuchs, Lipson",
            year=2015,
            url="https://arxiv.org/abs/1506.06579",
        ),
    ],
    invariants=[PixelRange()],
    needs=["gradients"],
    cost=Cost(forward="images * steps", backward="images * steps"),
    oracle=linear_unit_with_l2_has_its_closed_form,
    quick={"steps": 4, "size": None},
    demo={"l2": 3e-3, "lr": 0.04},
)
def class_visualization(
    model: Model,
    target: Target,
    start: Start = None,
    *,
    l2: Annotated[float, Field(ge=0, description="lambda: weight of ||I - mean colour||^2")] = 1e-3,
    total_variation: Annotated[float, Field(ge=0, description="weight of the total variation")] = 0.0,
    blur_every: Annotated[int, Field(ge=0, description="blur after every so many steps; 0: never")] = 4,
    blur_sigma: Annotated[float, Field(ge=0, le=50, description="width of that blur, in pixels")] = 0.8,
    clip_norm: Annotated[float, Field(ge=0, le=100, description="% of pixels greyed, palest first")] = 0,
    clip_contribution: Annotated[float, Field(ge=0, le=100, description="likewise, least useful first")] = 0,
    jitter: Annotated[int, Field(ge=0, le=1024, description="roll by up to so many pixels each step")] = 8,
    parametrization: Annotated[Literal["pixels", "fourier"], Field(description="what is moved")] = "fourier",
    optimizer: Annotated[
        Literal["adam", "sgd", "normalized-sgd"], Field(description="kind of step")
    ] = "adam",
    steps: Annotated[int, Field(ge=1, le=100_000, description="steps of ascent")] = 200,
    lr: Annotated[float, Field(gt=0, le=1000, description="length of a step")] = 0.05,
    start_noise: Annotated[float, Field(ge=0, le=1, description="standard deviation of the start")] = 0.0,
    size: Annotated[int | None, Field(ge=8, le=4096, description="side in pixels; the model's own")] = None,
    frames: Frames = 0,
    seed: Seed = None,
) -> Synthesis:
    """Draw the image that a class, or any unit, answers to most: gradient ascent on the pixels.

    I* = argmax_I S(I) - l2 ||I - m||^2 - total_variation TV(I)

    found by I <- I + lr grad from I = m, the model's mean colour, which is zero to the network
    (mid-grey where it has none).

    Regularisers, each alone or with others (0 leaves it out): the two penalties above; a Gaussian
    blur of ``blur_sigma`` after every ``blur_every`` steps; after every step, back to m with the
    ``clip_norm`` per cent of pixels nearest to it, and with the ``clip_contribution`` per cent whose
    loss costs the score least; ``jitter`` shows the model the image rolled. ``parametrization``
    "fourier" climbs in a spectrum weighed like a natural image's, "pixels" in the pixels themselves;
    the ``optimizer`` "sgd" takes the plain gradient step.

    One image (C, size, size) in [0, 1] per class of the target, else one; ``scores`` (steps, N) are
    S at every step. Raises DivergenceError where nothing can be climbed: a unit with zero gradient
    at the start wants ``start_noise`` or another seed.
    Source: Simonyan et al. 2014; clipping and blur: Yosinski et al. 2015.
    """
    grey = model.mean if model.mean.any() else 0.5
    channels, height, width = model.input_size
    count = len(target.index) if isinstance(target, Class) and isinstance(target.index, tuple) else 1

    def penalty(images: Tensor) -> Tensor:
        return l2 * pixels.l2_penalty(images, grey) + total_variation * pixels.total_variation(images)

    def edit(images: Tensor, gradient: Tensor, step: int) -> Tensor:
        if blur_every and (step + 1) % blur_every == 0:
            images = pixels.gaussian_blur(images, blur_sigma)
        images = pixels.clip_smallest(images, clip_norm, grey) if clip_norm else images
        if clip_contribution:
            images = pixels.clip_smallest(images, clip_contribution, grey, gradient=gradient)
        return images

    if start is None:
        shape = (count, channels, size or height, size or width)
        start = pixels.noise(shape, seed=seed, mean=grey, sd=start_noise).to(model.device, model.dtype)
    made = pixels.ascend(
        partial(scores, model, target=target),
        pixels.PixelImage(start) if parametrization == "pixels" else pixels.FourierImage(start),
        steps=steps,
        lr=lr,
        optimizer=optimizer,
        regularizer=penalty if l2 or total_variation else None,
        transform=partial(pixels.jitter, pixels=jitter) if jitter else None,
        after_step=edit if blur_every or clip_norm or clip_contribution else None,
        frames=frames,
        seed=seed,
    )
    return Synthesis(**made._asdict(), targets=target.names(model, count))


@hookimpl
def phosphene_methods():
    return [class_visualization]
