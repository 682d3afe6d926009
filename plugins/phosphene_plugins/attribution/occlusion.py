"""Occlusion: hide one window of the picture at a time and see how far the score falls."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
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
    progress_bar,
    scores,
)
from phosphene.images import Baseline, baseline_images, gaussian_blur
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Seed, Target
from phosphene.spec import Cost, MapPerPixel, ceil, either, maximum, minimum, param, size
from phosphene.targets import Custom, Objective, Predicted

from ._windowed_forward import Sweep

Aggregate = Literal["mean", "sum", "interpolate"]

_WINDOW = either(param.window, ceil(minimum(size.height, size.width) / 8))
_STRIDE = either(param.stride, ceil(_WINDOW / 2))
#: How many positions the window takes along each side.
_ROWS, _COLUMNS = (1 + ceil(maximum(0, side - _WINDOW) / _STRIDE) for side in (size.height, size.width))


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
    cost=Cost(forward=size.images * (1 + _ROWS * _COLUMNS)),
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
    aggregate: Annotated[
        Aggregate, Field(description="of a pixel's windows, or linear between their centres")
    ] = "mean",
    smooth: Annotated[float, Field(ge=0, le=100, description="sigma of a final blur, in pixels")] = 0,
    classes: Annotated[
        list[int | str] | None, Field(min_length=1, description="more classes, from the same passes")
    ] = None,
    seed: Seed = None,
) -> Attribution:
    """Hide one window at a time and show how far the score falls: what the model cannot do without.

    M_ij = mean over the windows p that hide (i, j) of  S(x) - S(x with p replaced by the baseline)

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, H, W), raw and signed: positive where hiding
    hurts. Windows start every ``stride`` pixels and the last are cut at the border, so that every
    pixel is hidden at least once. ``aggregate`` "sum" adds instead; "interpolate" puts each window's fall
    at its centre and draws a smooth map through them. ``baseline``: mid-grey, zero (black), the picture's
    mean colour, its blur by half a window, or noise. ``score`` is the target's value or its softmax; the
    target is decided on the whole picture. ``classes`` (by name or number) get maps of their own, ``more``
    (N, M, H, W). No gradients are needed.

    As long as the network's operations are local, only what a window reaches is computed again: the
    numbers are those of whole pictures up to rounding. From its first operation with no such rule on
    (attention, normalisation over places, squeeze and excitation), and for a callable target throughout,
    whole maps are computed.

    Raises InputError where the stride is longer than the window, or where a probability or more classes
    are wanted of a target that is not a class.

    Source: Zeiler & Fergus 2014, section 4.2.
    """
    if not isinstance(target, (Class, Predicted)) and (score == "probability" or classes):
        raise InputError(f"only a class has a probability and others beside it, {target} has neither")
    count, _, height, width = images.shape
    window = window or math.ceil(min(height, width) / 8)
    stride = stride or math.ceil(window / 2)
    if stride > window:
        raise InputError(f"stride={stride} would skip pixels: it can be at most the window, {window}")
    others = [model.class_index(name) for name in classes or ()]

    def scores_of(pictures: Tensor, wanted: Objective) -> Tensor:
        """The target's score and the other classes', (B, 1 + M)."""
        if not isinstance(wanted, (Class, Predicted)):
            return scores(model, pictures, wanted)[:, None]
        values = model(pictures)
        values = values.softmax(1) if score == "probability" else values
        return torch.cat([wanted.score(values)[:, None], values[:, others]], 1)

    hidden = baseline_images(images, baseline, sigma=window / 2, seed=seed)
    rows, columns = (
        [
            slice(start, min(start + window, side))
            for start in range(0, max(0, side - window) + stride, stride)
        ]
        for side in (height, width)
    )
    windows = [(down, across) for down in rows for across in columns]
    clean = scores_of(images, target)
    size = batch_size(model)
    batches = [
        (n, range(start, min(start + size, len(windows))))
        for n in range(count)
        for start in range(0, len(windows), size)
    ]
    falls = []
    for n, chosen in progress_bar(batches, "occluding"):
        if chosen.start == 0:
            sweep = Sweep(images[n], hidden[n], windows, whole=isinstance(target, Custom))
        with torch.inference_mode():
            values = scores_of(sweep.pictures(chosen), target.select([n] * len(chosen)))
        falls.append(clean[n] - values)
    fall = torch.cat(falls).view(count, len(rows), len(columns), -1).permute(0, 3, 1, 2)

    down, across = (
        _shares(axis, side, aggregate).to(fall) for axis, side in ((rows, height), (columns, width))
    )
    maps = gaussian_blur(down @ fall @ across.T, smooth)
    return Attribution(
        images=images,
        maps=maps[:, 0],
        targets=target.names(model, count),
        more=maps[:, 1:] if others else None,
        more_names=tuple(map(model.class_name, others)),
    )


def _shares(windows: Sequence[slice], side: int, aggregate: Aggregate) -> Tensor:
    """What each pixel of a row or a column takes of each window's fall: (side, windows)."""
    if aggregate == "interpolate":
        centers = [(window.start + window.stop - 1) / 2 for window in windows]
        peaks = np.eye(len(windows))
        return torch.from_numpy(np.stack([np.interp(range(side), centers, peak) for peak in peaks], 1))
    hides = torch.zeros(side, len(windows), dtype=torch.float64)
    for place, window in enumerate(windows):
        hides[window, place] = 1
    return hides if aggregate == "sum" else hides / hides.sum(1, keepdim=True)


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [occlusion]
