"""Neuron visualisation: the pictures that neurons, channels, a layer or a direction in it answer to most."""

from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from phosphene import InputError, Reference, batch_size, hookimpl, load_model, method
from phosphene.results import Synthesis
from phosphene.roles import Frames, LayerName, Model, Seed, Start
from phosphene.spec import Cost, PixelRange, param, size

from ._activation_maximization import (
    L2,
    SIMONYAN,
    YOSINSKI,
    BlurEvery,
    BlurSigma,
    ClipContribution,
    ClipNorm,
    Jitter,
    LearningRate,
    Moved,
    Rescale,
    Rotate,
    Size,
    StartNoise,
    Step,
    Steps,
    Variation,
    preferred,
)


def a_linear_neuron_has_its_closed_form() -> None:
    """A neuron w.x of a convolution, less lambda ||I - m||^2, lies at m + w / (2 lambda) where it looks."""
    conv = torch.nn.Conv2d(3, 2, 3, bias=False).double()
    weight = torch.linspace(-1, 1, 54, dtype=torch.float64).view(2, 3, 3, 3)
    with torch.no_grad():
        conv.weight.copy_(weight)
    model = load_model(torch.nn.Sequential(conv, torch.nn.ReLU()), input_size=(3, 5, 5))
    plain: Any = {"blur_every": 0, "jitter": 0, "parametrization": "pixels", "optimizer": "sgd", "lr": 0.2}
    made = neuron_visualization(model, layer="0", unit="neuron", channels=(1, 0), place=(1, 2), l2=1.0,
                                start_noise=0.0, **plain)  # fmt: skip
    wanted = torch.full((2, 3, 5, 5), 0.5, dtype=torch.float64)
    wanted[:, :, 1:4, 2:5] += weight[[1, 0]] / 2
    assert (made.images - wanted.clamp(0, 1)).abs().max() < 1e-6, "not at m + w / (2 lambda)"


@method(
    family="synthesis",
    references=[
        YOSINSKI,
        SIMONYAN,
        Reference(
            key="olah2017",
            title="Feature Visualization",
            authors="Olah, Mordvintsev, Schubert",
            year=2017,
            url="https://distill.pub/2017/feature-visualization",
        ),
    ],
    invariants=[PixelRange()],
    needs=["gradients"],
    cost=Cost(forward=size.channels * (param.steps + 8), backward=size.channels * (param.steps + 8)),
    oracle=a_linear_neuron_has_its_closed_form,
    quick={"steps": 4, "size": None, "channels": (0, 1)},
    demo={"layer": "relu4_1", "steps": 150},
)
def neuron_visualization(
    model: Model,
    start: Start = None,
    *,
    layer: Annotated[LayerName | None, Field(description="l; the last with places")] = None,
    unit: Annotated[
        Literal["neuron", "channel", "layer", "direction"], Field(description="what of it answers")
    ] = "channel",
    channels: Annotated[
        tuple[NonNegativeInt, ...], Field(min_length=1, description="c, a picture for each")
    ] = (0, 1, 2, 3, 4),
    place: Annotated[
        tuple[NonNegativeInt, NonNegativeInt] | None, Field(description="a neuron's y, x; the middle")
    ] = None,
    direction: Annotated[list[float] | None, Field(description="v_c, of these channels; all alike")] = None,
    l2: L2 = 1e-3,
    total_variation: Variation = 0.0,
    blur_every: BlurEvery = 4,
    blur_sigma: BlurSigma = 0.8,
    clip_norm: ClipNorm = 0,
    clip_contribution: ClipContribution = 0,
    jitter: Jitter = 8,
    rotate: Rotate = 0.0,
    rescale: Rescale = 1.0,
    parametrization: Moved = "fourier",
    optimizer: Step = "adam",
    steps: Steps = 200,
    lr: LearningRate = 0.05,
    start_noise: StartNoise = 0.1,
    size: Size = None,
    frames: Frames = 0,
    seed: Seed = None,
) -> Synthesis:
    """Draw what units inside a network answer to most: gradient ascent on the pixels.

    I* = argmax_I S(I) - l2 ||I - m||^2 - total_variation TV(I)

    S = F_c(y, x) of a "neuron", mean F_c of a "channel", mean F^2 of a "layer", mean sum_c v_c F_c of a
    "direction",  F the maps at ``layer``

    with one image (C, size, size) in [0, 1] for each of the ``channels``, or one for them all. Nothing above
    the layer runs. The regularisers and the ways of climbing are those of ``class_visualization``; the start
    is noise, for in flat grey most of a layer's ReLUs are shut, and where it wakes no unit, stronger noise.

    ``scores`` (steps, N) are S at every step. Raises InputError for channels, a place or a direction that
    the layer does not have, DivergenceError where a unit has no gradient at the start: another seed or more
    ``start_noise`` may wake it. Source: Yosinski et al. 2015; Olah et al. 2017.
    """
    layer = layer or model.last_map
    shape = model.structure.layers[layer].shape if layer in model.structure.layers else None
    depth, height, width = (*shape, 1, 1) if shape and len(shape) == 1 else model.map_shape(layer)
    y, x = place or (height // 2, width // 2)
    if max(channels) >= depth or y >= height or x >= width:
        told = f"{depth} channels of {height}x{width}"
        raise InputError(f"layer {layer!r} has {told}, so not all of {channels} at {y}, {x}")
    if direction is not None and len(direction) != len(channels):
        raise InputError(f"a direction needs {len(channels)} numbers, one a channel, not {len(direction)}")
    vector = torch.zeros(depth, device=model.device, dtype=model.dtype)
    vector[list(channels)] = vector.new_tensor(direction or [1.0] * len(channels))

    def score(images: Tensor, of: Tensor) -> Tensor:
        features = model.features(images, layer)
        maps = model.maps(features, images) if features.ndim > 2 else features[..., None, None]
        match unit:
            case "neuron":
                return maps[torch.arange(len(images)), of, y, x]
            case "channel":
                return maps[torch.arange(len(images)), of].mean((1, 2))
            case "layer":
                return maps.square().mean((1, 2, 3))
        return torch.einsum("nchw,c->nhw", maps, vector).mean((1, 2))

    made, single = [], unit in ("layer", "direction")
    for of in torch.tensor(channels[:1] if single else channels).split(batch_size(model)):
        found = preferred(
            model,
            partial(score, of=of),
            len(of),
            start,
            l2=l2,
            total_variation=total_variation,
            blur_every=blur_every,
            blur_sigma=blur_sigma,
            clip_norm=clip_norm,
            clip_contribution=clip_contribution,
            jitter=jitter,
            rotate=rotate,
            rescale=rescale,
            parametrization=parametrization,
            start_noise=start_noise,
            size=size,
            seed=seed,
            optimizer=optimizer,
            steps=steps,
            lr=lr,
            frames=frames,
        )
        where = f",{y},{x}" if unit == "neuron" else ""
        names = [f"{layer}: the {unit}" if single else f"{layer}[{c}{where}]" for c in of.tolist()]
        made.append(Synthesis(**found._asdict(), targets=tuple(names)))
    return Synthesis.concatenate(made)


@hookimpl
def phosphene_methods():
    return [neuron_visualization]
