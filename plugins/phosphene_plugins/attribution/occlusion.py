"""Occlusion: hide one window of the picture at a time and see how far the score falls."""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Class,
    InputError,
    Method,
    Reference,
    batch_size,
    hookimpl,
    load_model,
    method,
    progress,
    scores,
)
from phosphene.pixels import gaussian_blur, noise
from phosphene.results import Attribution
from phosphene.spec import Cost, MapPerPixel
from phosphene.targets import Objective, Predicted
from phosphene.types import Images, Model, Seed, Target

Baseline = Literal["grey", "zero", "mean", "blur", "noise"]

_WINDOW = "(window or ceil(min(height, width) / 8))"
_STRIDE = f"(stride or ceil({_WINDOW} / 2))"
_PLACES = [f"(1 + ceil(max(0, {side} - {_WINDOW}) / {_STRIDE}))" for side in ("height", "width")]


def linear_model_loses_what_is_hidden() -> None:
    """On a linear model a window's drop is the sum of w (x - baseline) over it."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 3, 6, 6, generator=draw, dtype=torch.float64)
    images = torch.rand(2, 3, 6, 6, generator=draw, dtype=torch.float64)
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, 1, dtype=torch.float64))
    network[1].weight.data = weight.flatten(1)
    maps = occlusion(load_model(network), images, 0, window=2, stride=2, baseline="zero").maps
    blocks = (weight * images).sum(1).unfold(1, 2, 2).unfold(2, 2, 2).sum((3, 4))
    torch.testing.assert_close(maps, blocks.repeat_interleave(2, 1).repeat_interleave(2, 2))


@method(
    family="attribution",
    references=[
        Reference(
            key="zeiler2014",
            title="Visualizing and Understanding Convolutional Networks",
            authors="Zeiler, Fergus",
            year=2014,
            url="https://arxiv.org/abs/1311.2901",
        )
    ],
    invariants=[MapPerPixel()],
    cost=Cost(forward=f"images * (1 + {_PLACES[0]} * {_PLACES[1]})"),
    oracle=linear_model_loses_what_is_hidden,
    quick={"window": 16, "stride": 16},
    demo={"window": 12, "stride": 4, "smooth": 2.0},
)
def occlusion(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    window: Annotated[int | None, Field(ge=1, description="side in pixels; 1/8 of the picture")] = None,
    stride: Annotated[int | None, Field(ge=1, description="pixels between windows; half a window")] = None,
    baseline: Annotated[Baseline, Field(description="what hides")] = "grey",
    score: Annotated[Literal["logit", "probability"], Field(description="what falls")] = "logit",
    aggregate: Annotated[Literal["mean", "sum"], Field(description="of a pixel's windows")] = "mean",
    smooth: Annotated[float, Field(ge=0, le=100, description="sigma of a final blur, in pixels")] = 0,
    seed: Seed = None,
) -> Attribution:
    """Hide one window at a time and show how far the score falls: what the model cannot do without.

    M_ij = mean over the windows p that hide (i, j) of  S(x) - S(x with p replaced by the baseline)

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, H, W), raw and signed: positive where hiding
    hurts. Windows start every ``stride`` pixels and the last are cut at the border, so that every
    pixel is hidden at least once. ``baseline``: mid-grey, black, the picture's mean colour, its blur
    by half a window, or noise. ``score`` is the target's value or its softmax; the target is decided
    on the whole picture. No gradients are needed. Raises InputError where the stride is longer than
    the window, or where a probability is wanted of a target that is not a class.

    Source: Zeiler & Fergus 2014, section 4.2.
    """
    if score == "probability" and not isinstance(target, (Class, Predicted)):
        raise InputError(f"only a class has a probability, {target} has none: use score='logit'")
    count, _, height, width = images.shape
    window = window or math.ceil(min(height, width) / 8)
    stride = stride or math.ceil(window / 2)
    if stride > window:
        raise InputError(f"stride={stride} would skip pixels: it can be at most the window, {window}")

    def score_of(pictures: Tensor, wanted: Objective) -> Tensor:
        if score == "logit":
            return scores(model, pictures, wanted)
        return wanted.read(model(pictures).softmax(1))

    hidden = _baseline(images, baseline, window, seed)
    tops = range(0, max(0, height - window) + stride, stride)
    lefts = range(0, max(0, width - window) + stride, stride)
    windows = [(slice(t, t + window), slice(s, s + window)) for s in lefts for t in tops]
    clean = score_of(images, target)
    places = [(n, rows, columns) for n in range(count) for rows, columns in windows]
    size = batch_size(model)
    falls = []
    for start in progress(range(0, len(places), size), "occluding"):
        part = places[start : start + size]
        numbers = [n for n, _, _ in part]
        occluded = images[numbers]
        for picture, (n, rows, columns) in zip(occluded, part, strict=True):
            picture[:, rows, columns] = hidden[n, :, rows, columns]
        falls.append(clean[numbers] - score_of(occluded, target.select(numbers)))
    fall = torch.cat(falls).view(count, len(windows))

    maps, times = images.new_zeros(count, height, width), images.new_zeros(height, width)
    for place, (rows, columns) in enumerate(windows):
        maps[:, rows, columns] += fall[:, place, None, None]
        times[rows, columns] += 1
    if aggregate == "mean":
        maps /= times
    return Attribution(
        images=images, maps=gaussian_blur(maps[:, None], smooth)[:, 0], targets=target.names(model, count)
    )


def _baseline(images: Tensor, kind: Baseline, window: int, seed: int | None) -> Tensor:
    """What stands in for the hidden pixels, (N, C, H, W)."""
    match kind:
        case "grey":
            return torch.full_like(images, 0.5)
        case "zero":
            return torch.zeros_like(images)
        case "mean":
            return images.mean((2, 3), keepdim=True).expand_as(images)
        case "blur":  # wide enough that nothing of a window's size is left
            return gaussian_blur(images, window / 2)
        case "noise":
            return noise(images.shape, seed=seed, sd=0.3).to(images)


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [occlusion]
