"""Occlusion sensitivity: drop of the score when a window of the image is replaced."""

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from phosphene import (
    Class,
    InputError,
    Method,
    batch_size,
    hookimpl,
    method,
    progress_bar,
    scores,
)
from phosphene.images import Baseline, baseline_images, gaussian_blur
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Seed, Target
from phosphene.spec import (
    Agrees,
    Calls,
    Cost,
    Equivariant,
    InvariantTo,
    LinearIn,
    MapPerPixel,
    ZeroWhen,
    ceil,
    either,
    maximum,
    minimum,
    param,
    size,
)
from phosphene.targets import Custom, Objective, Predicted, class_values
from phosphene.testing import linear_model

from ._references import ZEILER_2014
from ._relations import PROPORTIONAL_TO_THE_SCORE
from ._windowed_forward import WindowedImages
from ._windowed_oracle import windows_equal_full_forward_passes

Aggregate = Literal["mean", "sum", "interpolate"]

_WINDOW = either(param.window, ceil(minimum(size.height, size.width) / 8))
_STRIDE = either(param.stride, ceil(_WINDOW / 2))
#: Number of window positions along each side.
_ROWS, _COLUMNS = (1 + ceil(maximum(0, side - _WINDOW) / _STRIDE) for side in (size.height, size.width))


def drop_of_a_linear_model_is_a_sum_over_the_window() -> None:
    """On a linear model a window's drop is the sum of w (x - baseline) over it.

    Nine windows of side 3 and stride 2 cover 7 x 6 pixels, those at the right border cut to two columns.
    """
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 3, 7, 6, generator=draw, dtype=torch.float64)
    images = torch.rand(2, 3, 7, 6, generator=draw, dtype=torch.float64)
    model = linear_model(weight)
    windows = torch.zeros(9, 7, 6, dtype=torch.float64)
    for index, window in enumerate(windows):
        top, left = 2 * (index // 3), 2 * (index % 3)
        window[top : top + 3, left : left + 3] = 1
    vertical, horizontal = (
        torch.tensor([[6, 0, 0], [6, 0, 0], [3, 3, 0], [0, 6, 0], *last, [0, 0, 6]]).double() / 6
        for last in ([[0, 3, 3], [0, 0, 6]], [[0, 2, 4]])  # the last center is 5 of 7, 4.5 of 6
    )
    baselines: tuple[tuple[Baseline, Tensor], ...] = (
        ("zero", torch.zeros_like(images)),
        ("mean", images.mean((2, 3), keepdim=True)),
        ("blur", baseline_images(images, "blur", sigma=1.5)),
        ("noise", baseline_images(images, "noise", sigma=1.5, seed=5)),
    )
    for name, start in baselines:
        settings: dict[str, Any] = {"window": 3, "stride": 2, "baseline": name, "seed": 5}
        drops = torch.einsum("kchw,nchw,phw->nkp", weight, images - start, windows)
        sums = torch.einsum("nkp,phw->nkhw", drops, windows)
        result = occlusion(model, images, 0, **settings, classes=[2, 1])
        means = sums / windows.sum(0)
        torch.testing.assert_close((result.maps, result.more), (means[:, 0], means[:, [2, 1]]))
        assert (result.targets, result.more_names) == (("class 0",) * 2, ("class 2", "class 1"))
        result = occlusion(model, images, 1, **settings, aggregate="sum")
        torch.testing.assert_close(result.maps, sums[:, 1])
        assert result.more is None
        maps = occlusion(model, images, 2, **settings, aggregate="interpolate", smooth=2).maps
        interpolated = vertical @ drops[:, 2].view(2, 3, 3) @ horizontal.T
        torch.testing.assert_close(maps, gaussian_blur(interpolated[:, None], 2)[:, 0])
    # One window, on gray by default, and the predicted class.
    change = model(images).softmax(1) - model(torch.full_like(images, 0.5)).softmax(1)
    drops = change.gather(1, model(images).argmax(1, keepdim=True))
    result = occlusion(model, images, window=9, score="probability", classes=[1])
    torch.testing.assert_close(result.maps, drops[..., None].expand(-1, 7, 6))
    assert result.more is not None
    torch.testing.assert_close(result.more[:, 0], change[:, 1, None, None].expand(-1, 7, 6))
    # By default 1/8 of the shorter side and half a window, rounded up.
    for shape in ((1, 1, 17, 25), (1, 1, 25, 17)):
        image = torch.rand(shape, generator=draw, dtype=torch.float64)
        model = linear_model(torch.randn(shape, generator=draw, dtype=torch.float64))
        maps = occlusion(model, image, 0, window=3, stride=2).maps
        torch.testing.assert_close(occlusion(model, image, 0).maps, maps)
    windows_equal_full_forward_passes()


def drops_by_full_forward_passes(calls: Calls) -> Tensor:
    """The mean drop of windows of side 5 and stride 3, each by a forward pass of the full image."""
    images, class_index = calls.inputs["images"], calls.inputs["target"]
    height, width = images.shape[2:]
    drops, covers = torch.zeros_like(images[:, 0]), torch.zeros_like(images[:, 0])
    for top, left in itertools.product(range(0, height - 2, 3), range(0, width - 2, 3)):
        window = (..., slice(top, top + 5), slice(left, left + 5))
        occluded = images.clone()
        occluded[window] = 0.5
        drop = calls.logits(images) - calls.logits(occluded)
        drops[window] += drop[:, class_index, None, None]
        covers[window] += 1
    return drops / covers


@method(
    family="attribution",
    references=[ZEILER_2014],
    invariants=[MapPerPixel()],
    cost=Cost(forward=size.images * (1 + _ROWS * _COLUMNS)),
    oracle=drop_of_a_linear_model_is_a_sum_over_the_window,
    relations=[
        Agrees(drops_by_full_forward_passes, where={"window": 5, "stride": 3}),
        Equivariant("hflip", where={"window": 8, "stride": 8}),
        Equivariant("transpose", where={"window": 12, "stride": 6}, networks=("transpose-gap",)),
        LinearIn("target"),
        ZeroWhen("ignored", where={"window": 4, "stride": 4}),
        InvariantTo("normalization"),
        *PROPORTIONAL_TO_THE_SCORE,
    ],
    quick={"window": 16, "stride": 16},
    demo={"window": 12, "stride": 4, "smooth": 2.0},
)
def occlusion(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    window: Annotated[
        int | None,
        Field(ge=1, description="side of the window in pixels; default: 1/8 of the image's shorter side"),
    ] = None,
    stride: Annotated[
        int | None, Field(ge=1, description="pixels between windows; default: half a window")
    ] = None,
    baseline: Annotated[Baseline, Field(description="content of the occluded window")] = "gray",
    score: Annotated[
        Literal["logit", "probability"], Field(description="value of a class whose drop is measured")
    ] = "logit",
    aggregate: Annotated[
        Aggregate,
        Field(description="combination of a pixel's windows; interpolate: linear between window centers"),
    ] = "mean",
    smooth: Annotated[
        float, Field(ge=0, le=100, description="standard deviation of a final Gaussian blur, in pixels")
    ] = 0,
    classes: Annotated[
        list[int | str] | None,
        Field(min_length=1, description="further classes that get maps, from the same forward passes"),
    ] = None,
    seed: Seed = None,
) -> Attribution:
    """Occlusion sensitivity: drop of the score when a window of the image is replaced.

    M_ij = mean over the windows p that cover (i, j) of  S(x) - S(x with p replaced by the baseline)

    Windows start every ``stride`` pixels and the last ones are cut at the border, so every pixel is
    occluded at least once. ``aggregate`` "sum" adds instead; "interpolate" puts each window's drop at its
    center and interpolates linearly between centers. ``baseline`` is "gray" (0.5), "zero" (black), "mean"
    (the image's mean color), "blur" (sigma: half a window) or "noise". A predicted target is the class
    predicted for the unoccluded image. No gradients are needed.

    As long as the network's operations are local, only the positions that a window affects are computed
    again, with the numbers of full forward passes up to rounding. From the first operation that is not
    local (attention, normalization over positions, squeeze and excitation), and throughout for a callable
    target, everything is computed.

    Returns:
        ``maps`` (N, H, W), raw and signed: positive where occlusion lowers the score. With ``classes``,
        ``more`` (N, M, H, W) are the maps of these classes.

    Raises:
        InputError for a stride longer than the window, and for a probability or further classes of a target
        that is not a class.

    Example::
        from phosphene import run

        result = run("occlusion", images="builtin:scenes/1", window=16, stride=16)
        result.maps.shape  # (1, 64, 64)

    Source:
        Zeiler & Fergus 2014, section 4.2.
    """
    if not isinstance(target, (Class, Predicted)) and (score == "probability" or classes):
        raise InputError(f"only a class target has a probability or further classes, {target} has neither")
    count, _, height, width = images.shape
    window = window or math.ceil(min(height, width) / 8)
    stride = stride or math.ceil(window / 2)
    if stride > window:
        raise InputError(f"stride={stride} would skip pixels: it can be at most the window, {window}")
    further = [model.class_index(name) for name in classes or ()]

    def all_scores(batch: Tensor, batch_target: Objective) -> Tensor:
        """Scores of the target and of the further classes, (B, 1 + M)."""
        if not isinstance(batch_target, (Class, Predicted)):
            return scores(model, batch, batch_target)[:, None]
        values = model.probabilities(batch) if score == "probability" else class_values(model, batch)
        return torch.cat([batch_target.score(values)[:, None], values[:, further]], 1)

    baselines = baseline_images(images, baseline, sigma=window / 2, seed=seed)
    rows, columns = (
        [
            slice(start, min(start + window, side))
            for start in range(0, max(0, side - window) + stride, stride)
        ]
        for side in (height, width)
    )
    windows = [(vertical, horizontal) for vertical in rows for horizontal in columns]
    clean = all_scores(images, target)
    size = batch_size(model)
    batches = [
        (n, range(start, min(start + size, len(windows))))
        for n in range(count)
        for start in range(0, len(windows), size)
    ]
    drops = []
    for n, indices in progress_bar(batches, "occluding"):
        if indices.start == 0:
            occluded = WindowedImages(images[n], baselines[n], windows, dense=isinstance(target, Custom))
        with torch.inference_mode():
            values = all_scores(occluded.batch(indices), target.select([n] * len(indices)))
        drops.append(clean[n] - values)
    drop = torch.cat(drops).view(count, len(rows), len(columns), -1).permute(0, 3, 1, 2)

    vertical, horizontal = (
        _window_weights(axis, side, aggregate).to(drop) for axis, side in ((rows, height), (columns, width))
    )
    maps = gaussian_blur(vertical @ drop @ horizontal.T, smooth)
    return Attribution(
        images=images,
        maps=maps[:, 0],
        targets=target.names(model, count),
        more=maps[:, 1:] if further else None,
        more_names=tuple(map(model.class_name, further)),
    )


def _window_weights(windows: Sequence[slice], side: int, aggregate: Aggregate) -> Tensor:
    """Weight of each window's drop at each pixel of a row or a column: (side, windows)."""
    if aggregate == "interpolate":
        centers = [(window.start + window.stop - 1) / 2 for window in windows]
        peaks = np.eye(len(windows))
        return torch.from_numpy(np.stack([np.interp(range(side), centers, peak) for peak in peaks], 1))
    covers = torch.zeros(side, len(windows), dtype=torch.float64)
    for index, window in enumerate(windows):
        covers[window, index] = 1
    return covers if aggregate == "sum" else covers / covers.sum(1, keepdim=True)


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [occlusion]
