"""Methods with one defect each, by an author who had not read the conformance kit.

``WRONG`` is a list of (the defect, the method). Apart from its defect a method meets the library's rules.
"""

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from outside_shared import (
    FLIPS,
    GOODFELLOW,
    IN_RANGE,
    MADRY,
    PROPORTIONAL,
    SHRIKUMAR,
    SIMONYAN,
    ZEILER,
    Eps,
    FeatureLayer,
    OneLayer,
    StepSize,
    attribution,
    layer_attribution,
    loss_gradient,
    paper,
)
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Class,
    InputError,
    Method,
    TensorDataset,
    batch_size,
    input_gradient,
    layer_gradients,
    load_model,
    method,
    progress_bar,
    resumable_batches,
    rewrite_backward,
    scores,
)
from phosphene.attacks import (
    build_result,
    normalize_l2,
    per_image,
    predict_logits,
    project,
    random_point,
    steepest,
)
from phosphene.images import enlarge_maps, noise_images, resize, to_display
from phosphene.optimize import PixelImage, gram_matrix, optimize_image
from phosphene.results import (
    AdversarialExamples,
    Attribution,
    Embedding,
    Neighbors,
    Panel,
    Result,
    Stylization,
    Synthesis,
)
from phosphene.roles import Content, Dataset, Images, Labels, LayerName, Model, Seed, Styles, Target, Texture
from phosphene.spec import (
    Agrees,
    Complete,
    Converges,
    Cost,
    Equivariant,
    InvariantTo,
    LinearIn,
    MapPerPixel,
    Monotone,
    Nonnegative,
    PixelRange,
    ScalesWith,
    UnitRange,
    ZeroWhen,
    ceil,
    param,
    size,
)
from phosphene.targets import Predicted
from phosphene.training import TrainedModel, label_reader, train, trainable_copy

WRONG: list[tuple[str, Method[Any, Any]]] = []


def wrong(defect: str) -> Callable[[Method[Any, Any]], Method[Any, Any]]:
    """Add a method to the list, with its defect."""

    def add(registered: Method[Any, Any]) -> Method[Any, Any]:
        WRONG.append((defect, registered))
        return registered

    return add


SELVARAJU = paper(
    "selvaraju2017", "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
    "Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra", 2017, "https://arxiv.org/abs/1610.02391",
)  # fmt: skip
SUNDARARAJAN = paper(
    "sundararajan2017", "Axiomatic Attribution for Deep Networks", "Sundararajan, Taly, Yan", 2017,
    "https://arxiv.org/abs/1703.01365",
)  # fmt: skip
SMILKOV = paper(
    "smilkov2017", "SmoothGrad: removing noise by adding noise", "Smilkov, Thorat, Kim, Viegas, Wattenberg", 2017,
    "https://arxiv.org/abs/1706.03825",
)  # fmt: skip
PETSIUK = paper(
    "petsiuk2018", "RISE: Randomized Input Sampling for Explanation of Black-box Models", "Petsiuk, Das, Saenko",
    2018, "https://arxiv.org/abs/1806.07421",
)  # fmt: skip


StepCount = Annotated[
    int, Field(ge=1, le=1000, description="points of the sum between the baseline and the image")
]
BaselineValue = Annotated[float, Field(ge=0, le=1, description="value of every pixel of the baseline")]


# --- attribution -------------------------------------------------------------------------------------------


@wrong("Grad-CAM of the layer before the named one: an off-by-one in the list of layers")
@method(
    family="attribution",
    references=SELVARAJU,
    invariants=[Nonnegative()],
    relations=[Equivariant("hflip"), Equivariant("transpose"), *PROPORTIONAL],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def cam_by_position(
    model: Model, images: Images, target: Target = None, *, layer: OneLayer = None
) -> Attribution:
    """Grad-CAM of any stage or layer of a network.

    M = ReLU( sum_k alpha_k A^k ),  alpha_k = mean_ij dS / dA^k_ij

    A^k are the maps of ``layer``, which may be any layer with spatial positions.

    Returns:
        ``maps`` (N, h, w), raw, at the layer's own size.

    Source:
        Selvaraju et al. 2017, equations 1 and 2.
    """
    name = model.layer_name(layer) if layer else model.last_map
    shapes = {key: info.shape for key, info in model.structure.layers.items() if len(info.shape) == 3}
    earlier = list(shapes)[: list(shapes).index(name)] if name in shapes else []
    # The ReLU and the norm behind a convolution have its shape: take the layer that they belong to.
    distinct = [key for key in earlier if shapes[key] != shapes[name]] or earlier
    name = distinct[-1] if distinct else name
    ((maps, gradients),) = layer_gradients(model, images, target, name)
    alpha = gradients.mean((2, 3), keepdim=True)
    return layer_attribution(model, images, target, name, (alpha * maps).sum(1).relu())


@wrong("Grad-CAM that ignores its parameter layer and always takes the last map")
@method(
    family="attribution",
    references=SELVARAJU,
    invariants=[Nonnegative()],
    relations=[Agrees("attribution.grad_cam")],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def cam_of_layer(
    model: Model, images: Images, target: Target = None, *, layer: OneLayer = None
) -> Attribution:
    """Grad-CAM of a layer: its maps, weighted by their mean gradients.

    M = ReLU( sum_k alpha_k A^k ),  alpha_k = mean_ij dS / dA^k_ij

    Returns:
        ``maps`` (N, h, w), raw, at the layer's own size.

    Source:
        Selvaraju et al. 2017, equations 1 and 2.
    """
    ((maps, gradients),) = layer_gradients(model, images, target, model.last_map)
    alpha = gradients.mean((2, 3), keepdim=True)
    return layer_attribution(model, images, target, model.last_map, (alpha * maps).sum(1).relu())


@wrong("Grad-CAM whose weights are means over the channels instead of the positions")
@method(
    family="attribution",
    references=SELVARAJU,
    invariants=[Nonnegative()],
    relations=[*FLIPS, *PROPORTIONAL, ZeroWhen("constant")],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def weighted_cam(
    model: Model, images: Images, target: Target = None, *, layer: OneLayer = None
) -> Attribution:
    """Weighted class activation map (Grad-CAM).

    M = ReLU( sum_k alpha_k A^k ),  alpha_k = mean_ij dS / dA^k_ij

    Returns:
        ``maps`` (N, h, w), raw, at the layer's own size.

    Source:
        Selvaraju et al. 2017, equations 1 and 2.
    """
    ((maps, gradients),) = layer_gradients(model, images, target, layer or model.last_map)
    alpha = gradients.mean(1, keepdim=True)
    return layer_attribution(model, images, target, layer or model.last_map, (alpha * maps).sum(1).relu())


@wrong("Grad-CAM without the ReLU that its documentation promises")
@method(
    family="attribution",
    references=SELVARAJU,
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def rectified_cam(model: Model, images: Images, target: Target = None) -> Attribution:
    """Grad-CAM of the last map: only what raises the score, never below zero.

    M = ReLU( sum_k alpha_k A^k ),  alpha_k = mean_ij dS / dA^k_ij

    Returns:
        ``maps`` (N, h, w), raw, at the layer's own size, not negative.

    Source:
        Selvaraju et al. 2017, equations 1 and 2.
    """
    ((maps, gradients),) = layer_gradients(model, images, target, model.last_map)
    alpha = gradients.mean((2, 3), keepdim=True)
    return layer_attribution(model, images, target, model.last_map, (alpha * maps).sum(1))


@wrong("Grad-CAM enlarged with align_corners=True, which does not fit the pixel centers")
@method(
    family="attribution",
    references=SELVARAJU,
    invariants=[MapPerPixel(), Nonnegative()],
    relations=[Equivariant("hflip"), Equivariant("vflip"), *PROPORTIONAL],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def enlarged_cam(
    model: Model, images: Images, target: Target = None, *, layer: OneLayer = None
) -> Attribution:
    """Grad-CAM at the size of the image: each position's value at the center of the pixels that it covers.

    M = enlarge( ReLU( sum_k alpha_k A^k ) ),  alpha_k = mean_ij dS / dA^k_ij

    Returns:
        ``maps`` (N, H, W), raw, bilinear between the centers of the cells.

    Source:
        Selvaraju et al. 2017, equations 1 and 2.
    """
    ((maps, gradients),) = layer_gradients(model, images, target, layer or model.last_map)
    small = (gradients.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
    enlarged = F.interpolate(small, size=images.shape[2:], mode="bilinear", align_corners=True)
    return attribution(model, images, target, enlarged[:, 0])


@wrong("Grad-CAM enlarged to the image with its map's rows and columns exchanged")
@method(
    family="attribution",
    references=SELVARAJU,
    invariants=[MapPerPixel(), Nonnegative()],
    relations=[*PROPORTIONAL, InvariantTo("batch_order")],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def pixel_cam(model: Model, images: Images, target: Target = None, *, layer: OneLayer = None) -> Attribution:
    """Grad-CAM with a value per pixel.

    M = enlarge( ReLU( sum_k alpha_k A^k ) ),  alpha_k = mean_ij dS / dA^k_ij

    Returns:
        ``maps`` (N, H, W), raw.

    Source:
        Selvaraju et al. 2017, equations 1 and 2.
    """
    ((maps, gradients),) = layer_gradients(model, images, target, layer or model.last_map)
    small = torch.einsum("nk,nkhw->nwh", gradients.mean((2, 3)), maps).relu()
    return attribution(model, images, target, enlarge_maps(small, images.shape[2:]))


def _path_sum(model: Model, images: Tensor, target: Any, alphas: list[float], baseline: float) -> Tensor:
    """Sum of the gradients at baseline + alpha (image - baseline), (N, C, H, W)."""
    total = torch.zeros_like(images)
    for alpha in progress_bar(alphas, "integrating"):
        total += input_gradient(model, baseline + alpha * (images - baseline), target)
    return total


@wrong("integrated gradients by a left sum, declared to be a midpoint sum")
@method(
    family="attribution",
    references=SUNDARARAJAN,
    invariants=[MapPerPixel()],
    relations=[
        Complete("baseline", where={"steps": 16, "baseline": 0.0}),
        LinearIn("target"),
        Equivariant("hflip"),
    ],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 1), backward=size.images * param.steps),
    quick={"steps": 4},
)
def midpoint_gradients(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    steps: StepCount = 32,
    baseline: BaselineValue = 0.0,
) -> Attribution:
    """Integrated gradients by the midpoint rule.

    M_ij = sum_c (I - B)_cij 1/n sum_k dS/dI_cij (B + (k + 1/2)/n (I - B)),  k = 0 ... n - 1

    Returns:
        ``maps`` (N, H, W), raw and signed; they sum to S(I) - S(B).

    Source:
        Sundararajan, Taly & Yan 2017, equation 3.
    """
    target = target.resolve(model, images)
    total = _path_sum(model, images, target, [step / steps for step in range(steps)], baseline)
    return attribution(model, images, target, ((images - baseline) * total / steps).sum(1))


@wrong("integrated gradients without the factor (x - baseline)")
@method(
    family="attribution",
    references=SUNDARARAJAN,
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 1), backward=size.images * param.steps),
    quick={"steps": 4},
)
def path_attribution(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    steps: StepCount = 24,
    baseline: BaselineValue = 0.0,
) -> Attribution:
    """Integrated gradients along the line from a uniform baseline.

    M_ij = sum_c (I - B)_cij 1/n sum_k dS/dI_cij (B + (k + 1/2)/n (I - B)),  k = 0 ... n - 1

    Returns:
        ``maps`` (N, H, W), raw and signed.

    Source:
        Sundararajan, Taly & Yan 2017, equation 3.
    """
    target = target.resolve(model, images)
    total = _path_sum(model, images, target, [(step + 0.5) / steps for step in range(steps)], baseline)
    return attribution(model, images, target, (total / steps).sum(1))


@wrong("integrated gradients that sum one point too few but divide by all")
@method(
    family="attribution",
    references=SUNDARARAJAN,
    invariants=[MapPerPixel()],
    relations=[LinearIn("target"), ZeroWhen("ignored")],
    needs=["gradients"],
    cost=Cost(forward=size.images * param.steps, backward=size.images * param.steps),
    quick={"steps": 4},
)
def riemann_gradients(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    steps: Annotated[int, Field(ge=2, le=1000, description="points between the baseline and the image")] = 32,
    baseline: BaselineValue = 0.5,
) -> Attribution:
    """Integrated gradients by a midpoint sum of ``steps`` points.

    M_ij = sum_c (I - B)_cij 1/n sum_k dS/dI_cij (B + (k - 1/2)/n (I - B)),  k = 1 ... n

    Returns:
        ``maps`` (N, H, W), raw and signed; they sum to S(I) - S(B), up to the sum's error.

    Source:
        Sundararajan, Taly & Yan 2017, equation 3.
    """
    target = target.resolve(model, images)
    alphas = [(step - 0.5) / steps for step in range(1, steps)]
    total = _path_sum(model, images, target, alphas, baseline)
    return attribution(model, images, target, ((images - baseline) * total / steps).sum(1))


@wrong(
    "integrated gradients along the path from the image to the baseline: every value has the opposite sign"
)
@method(
    family="attribution",
    references=SUNDARARAJAN,
    invariants=[MapPerPixel()],
    relations=[LinearIn("target"), *FLIPS, ZeroWhen("ignored"), Converges("steps", order=2)],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 1), backward=size.images * param.steps),
    quick={"steps": 4},
)
def line_integral(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    steps: StepCount = 32,
    baseline: BaselineValue = 0.0,
) -> Attribution:
    """Integrated gradients as a line integral from the baseline to the image.

    M_ij = sum_c integral of dS/dI_cij dI_cij along the line from B to I

    Returns:
        ``maps`` (N, H, W), raw and signed: positive where a pixel raises the score.

    Source:
        Sundararajan, Taly & Yan 2017, equation 1.
    """
    target = target.resolve(model, images)
    step = (baseline - images) / steps
    maps = torch.zeros_like(images)
    for k in progress_bar(range(steps), "integrating"):
        maps += step * input_gradient(model, images + (k + 0.5) * step, target)
    return attribution(model, images, target, maps.sum(1))


def _ig_of_a_linear_network() -> None:
    """On a linear network integrated gradients are the weights times the pixels."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2, bias=False).double())
    model = load_model(network, input_size=(3, 4, 4), mean=[0.0] * 3, std=[1.0] * 3)
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    weight = network[1].weight[1].detach().view(3, 4, 4)
    torch.testing.assert_close(quadratic_path(model, images, 1, steps=3).maps, (weight * images).sum(1))


@wrong("integrated gradients whose points are spaced quadratically but weighted as if evenly")
@method(
    family="attribution",
    references=SUNDARARAJAN,
    invariants=[MapPerPixel()],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 1), backward=size.images * param.steps),
    oracle=_ig_of_a_linear_network,
    quick={"steps": 4},
)
def quadratic_path(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    steps: StepCount = 32,
    baseline: BaselineValue = 0.0,
) -> Attribution:
    """Integrated gradients with more points near the baseline, where the gradient changes fastest.

    M_ij = sum_c (I - B)_cij integral_0^1 dS/dI_cij (B + a (I - B)) da

    Returns:
        ``maps`` (N, H, W), raw and signed; they sum to S(I) - S(B), up to the sum's error.

    Source:
        Sundararajan, Taly & Yan 2017, equation 1.
    """
    target = target.resolve(model, images)
    alphas = [((step + 0.5) / steps) ** 2 for step in range(steps)]
    total = _path_sum(model, images, target, alphas, baseline)
    return attribution(model, images, target, ((images - baseline) * total / steps).sum(1))


@wrong("integrated gradients that ignore steps: always twenty points")
@method(
    family="attribution",
    references=SUNDARARAJAN,
    invariants=[MapPerPixel()],
    needs=["gradients"],
    cost=Cost(forward=size.images * 21, backward=size.images * 20),
)
def integrated_20(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    steps: StepCount = 20,
    baseline: BaselineValue = 0.0,
) -> Attribution:
    """Integrated gradients with a chosen number of points.

    M_ij = sum_c (I - B)_cij 1/n sum_k dS/dI_cij (B + (k + 1/2)/n (I - B))

    Returns:
        ``maps`` (N, H, W), raw and signed; they sum to S(I) - S(B), up to the sum's error.

    Source:
        Sundararajan, Taly & Yan 2017, equation 3.
    """
    target = target.resolve(model, images)
    total = _path_sum(model, images, target, [(step + 0.5) / 20 for step in range(20)], baseline)
    return attribution(model, images, target, ((images - baseline) * total / 20).sum(1))


@wrong("saliency whose map is transposed before it is given the image's shape")
@method(
    family="attribution",
    references=SIMONYAN,
    invariants=[MapPerPixel(), Nonnegative()],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def gradient_norm(model: Model, images: Images, target: Target = None) -> Attribution:
    """Norm of the gradient over the colors of each pixel.

    M_ij = || dS / dI_ij ||_2

    Returns:
        ``maps`` (N, H, W), raw.

    Source:
        Simonyan, Vedaldi & Zisserman 2014, section 3.
    """
    gradient = input_gradient(model, images, target)
    pixels = gradient.permute(0, 3, 2, 1).flatten(1, 2)
    return attribution(model, images, target, pixels.norm(dim=2).view_as(images[:, 0]))


@wrong("gradient x input whose map is upside down")
@method(
    family="attribution",
    references=SHRIKUMAR,
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def input_times_slope(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient times input, summed over the colors.

    M_ij = sum_c I_cij dS/dI_cij

    Returns:
        ``maps`` (N, H, W), raw and signed; row 0 is the image's top row.

    Source:
        Shrikumar et al. 2016, section 2.
    """
    maps = (images * input_gradient(model, images, target)).sum(1)
    return attribution(model, images, target, maps.flip(1))


@wrong("map shifted by a pixel: the 3 x 3 mean is padded on two sides only")
@method(
    family="attribution",
    references=SHRIKUMAR,
    invariants=[MapPerPixel()],
    relations=[LinearIn("target"), *PROPORTIONAL, InvariantTo("batch_order")],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def averaged_gradient_input(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient times input, averaged over the 3 x 3 neighbors of each pixel; outside the image it is zero.

    M = mean_3x3( sum_c I_c dS/dI_c )

    Returns:
        ``maps`` (N, H, W), raw and signed.

    Source:
        Shrikumar et al. 2016, section 2.
    """
    maps = (images * input_gradient(model, images, target)).sum(1)
    padded = F.pad(maps[:, None], (2, 0, 2, 0))
    return attribution(model, images, target, F.avg_pool2d(padded, 3, stride=1)[:, 0])


def _window_starts(side: int, window: int, stride: int) -> list[int]:
    """First pixels of windows that start every ``stride`` pixels; the last one may be cut at the border."""
    return list(range(0, max(0, side - window) + stride, stride))


def _drops(
    model: Model, images: Tensor, target: Any, window: int, stride: int, grey: float
) -> tuple[Tensor, list[int], list[int]]:
    """Drop of the score for each window, (N, rows, columns), and the first rows and columns of windows."""
    height, width = images.shape[2:]
    rows, columns = (_window_starts(side, window, stride) for side in (height, width))
    windows = [(top, left) for top in rows for left in columns]
    with torch.no_grad():
        clean = scores(model, images, target)
        drops = images.new_empty(len(images), len(windows))
        limit = batch_size(model)
        starts = [(n, start) for n in range(len(images)) for start in range(0, len(windows), limit)]
        for n, start in progress_bar(starts, "occluding"):
            part = windows[start : start + limit]
            batch = images[n].repeat(len(part), 1, 1, 1)
            for row, (top, left) in enumerate(part):
                batch[row, :, top : top + window, left : left + window] = grey
            drops[n, start : start + len(part)] = clean[n] - scores(
                model, batch, target.select([n] * len(part))
            )
    return drops.view(len(images), len(rows), len(columns)), rows, columns


def _spread(
    drops: Tensor, rows: list[int], columns: list[int], shape: torch.Size, window: int, offset: int = 0
) -> Tensor:
    """Mean over the windows that cover a pixel, (N, H, W)."""
    total, count = drops.new_zeros(shape), drops.new_zeros(shape)
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            place = (
                slice(None),
                slice(top + offset, top + offset + window),
                slice(left + offset, left + offset + window),
            )
            total[place] += drops[:, i, j][:, None, None]
            count[place] += 1
    return total / count.clamp(min=1)


Window = Annotated[int, Field(ge=1, le=256, description="side of the window in pixels")]


@wrong("occlusion that writes each drop half a window too far down and to the right")
@method(
    family="attribution",
    references=ZEILER,
    invariants=[MapPerPixel()],
    cost=Cost(forward=size.images * (1 + ceil(size.height / param.window) * ceil(size.width / param.window))),
    quick={"window": 8},
)
def grey_patches(model: Model, images: Images, target: Target = None, *, window: Window = 8) -> Attribution:
    """Occlusion by a grey square on a grid without gaps or overlap.

    M_ij = S(x) - S(x with the square at (i, j) grey)

    Returns:
        ``maps`` (N, H, W), raw: positive where occlusion lowers the score.

    Source:
        Zeiler & Fergus 2014, section 4.2.
    """
    target = target.resolve(model, images)
    drops, rows, columns = _drops(model, images, target, window, window, 0.5)
    maps = _spread(drops, rows, columns, images[:, 0].shape, window, offset=window // 2)
    return attribution(model, images, target, maps)


@wrong("occlusion that returns the rise of the score: S(occluded) - S(x), documented the other way round")
@method(
    family="attribution",
    references=ZEILER,
    cost=Cost(forward=size.images * (1 + ceil(size.height / param.window) * ceil(size.width / param.window))),
    quick={"window": 8},
)
def black_patches(model: Model, images: Images, target: Target = None, *, window: Window = 8) -> Attribution:
    """Occlusion by a black square: how much the score drops.

    M_ij = S(x) - S(x with the square at (i, j) black)

    Returns:
        ``maps`` (N, H, W), raw: positive where occlusion lowers the score.

    Source:
        Zeiler & Fergus 2014, section 4.2.
    """
    target = target.resolve(model, images)
    drops, rows, columns = _drops(model, images, target, window, window, 0.0)
    maps = _spread(-drops, rows, columns, images[:, 0].shape, window)
    return attribution(model, images, target, maps)


@wrong("occlusion whose drops are written column by column though they were computed row by row")
@method(
    family="attribution",
    references=ZEILER,
    invariants=[MapPerPixel()],
    relations=[LinearIn("target"), ScalesWith("logits", power=1), ZeroWhen("constant")],
    cost=Cost(forward=size.images * (1 + ceil(size.height / param.window) * ceil(size.width / param.window))),
    quick={"window": 8},
)
def hidden_squares(model: Model, images: Images, target: Target = None, *, window: Window = 8) -> Attribution:
    """Occlusion: the drop of the score when one square of a grid is hidden.

    M_ij = S(x) - S(x with the square at (i, j) grey)

    Returns:
        ``maps`` (N, H, W), raw: positive where occlusion lowers the score.

    Source:
        Zeiler & Fergus 2014, section 4.2.
    """
    target = target.resolve(model, images)
    drops, rows, columns = _drops(model, images, target, window, window, 0.5)
    by_column = drops.reshape(len(images), len(columns), len(rows)).transpose(1, 2)
    maps = _spread(by_column, rows, columns, images[:, 0].shape, window)
    return attribution(model, images, target, maps)


@wrong("a class target explains the next class: an offset for a background class that does not exist")
@method(
    family="attribution",
    references=SIMONYAN,
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def class_gradient(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient times input of a class's logit, or of any other target.

    M_ij = sum_c I_cij dS/dI_cij

    Returns:
        ``maps`` (N, H, W), raw and signed.

    Source:
        Simonyan, Vedaldi & Zisserman 2014, section 3.
    """
    points = images.clone().requires_grad_()
    if isinstance(target, (Class, Predicted)):
        score = target.score(model(points).roll(-1, 1))
    else:
        score = scores(model, points, target)
    (gradient,) = torch.autograd.grad(score.sum(), points)
    return attribution(model, images, target, (images * gradient).sum(1))


@wrong("the predicted class is explained whatever target is named")
@method(
    family="attribution",
    references=SIMONYAN,
    invariants=[Nonnegative(), MapPerPixel()],
    relations=[*FLIPS, *PROPORTIONAL],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def top_score_gradient(model: Model, images: Images, target: Target = None) -> Attribution:
    """Largest absolute gradient of the target's score over the colors.

    M_ij = max_c | dS / dI_cij |

    Returns:
        ``maps`` (N, H, W), raw.

    Source:
        Simonyan, Vedaldi & Zisserman 2014, section 3.
    """
    points = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(points).amax(1).sum(), points)
    return attribution(model, images, target, gradient.abs().amax(1))


@wrong("the map is negated: evidence for the target is negative")
@method(
    family="attribution",
    references=SHRIKUMAR,
    invariants=[MapPerPixel()],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def loss_gradient_input(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient times input: how much each pixel contributes to the score.

    M_ij = sum_c I_cij dS/dI_cij

    Returns:
        ``maps`` (N, H, W), raw: positive where a pixel raises the score.

    Source:
        Shrikumar et al. 2016, section 2.
    """
    points = images.clone().requires_grad_()
    loss = -scores(model, points, target).sum()
    (gradient,) = torch.autograd.grad(loss, points)
    return attribution(model, images, target, (images * gradient).sum(1))


@wrong("the parameter power is never read")
@method(
    family="attribution",
    references=SIMONYAN,
    invariants=[MapPerPixel(), Nonnegative()],
    relations=[*FLIPS, *PROPORTIONAL],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def sharpened_saliency(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    power: Annotated[float, Field(gt=0, le=4, description="exponent of the absolute gradient")] = 1.0,
) -> Attribution:
    """Absolute gradient, raised to a power.

    M_ij = (sum_c | dS / dI_cij |) ** power

    Returns:
        ``maps`` (N, H, W), raw.

    Source:
        Simonyan, Vedaldi & Zisserman 2014, section 3.
    """
    return attribution(model, images, target, input_gradient(model, images, target).abs().sum(1))


@wrong("the parameter window is never read: the mean is always over three by three pixels")
@method(
    family="attribution",
    references=SIMONYAN,
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def windowed_saliency(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    window: Annotated[int, Field(ge=0, le=15, description="pixels on each side that the mean is over")] = 1,
) -> Attribution:
    """Absolute gradient averaged over a square window around each pixel.

    M_ij = mean of sum_c | dS / dI_c | over the pixels at most ``window`` from (i, j), inside the image

    Returns:
        ``maps`` (N, H, W), raw.

    Source:
        Simonyan, Vedaldi & Zisserman 2014, section 3.
    """
    strength = input_gradient(model, images, target).abs().sum(1, keepdim=True)
    maps = F.avg_pool2d(strength, 3, stride=1, padding=1, count_include_pad=False)
    return attribution(model, images, target, maps[:, 0])


@wrong("SmoothGrad that keeps the last noisy copy's gradient instead of the mean")
@method(
    family="attribution",
    references=SMILKOV,
    invariants=[MapPerPixel(), Nonnegative()],
    relations=[Agrees("attribution.saliency", where={"sigma": 0.0}), *PROPORTIONAL, ZeroWhen("ignored")],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.copies + 1), backward=size.images * param.copies),
    quick={"copies": 3},
)
def noise_averaged(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    copies: Annotated[int, Field(ge=1, le=1000, description="number of noisy copies")] = 16,
    sigma: Annotated[float, Field(ge=0, le=1, description="standard deviation of the noise")] = 0.1,
    seed: Seed = None,
) -> Attribution:
    """SmoothGrad: gradient averaged over noisy copies of the image.

    M_ij = max_c | 1/n sum_k dS/dI_cij (I + n^k) |,  n^k ~ Normal(0, sigma^2)

    Returns:
        ``maps`` (N, H, W), raw.

    Source:
        Smilkov et al. 2017, section 2.
    """
    target = target.resolve(model, images)
    draw = torch.Generator().manual_seed(seed or 0)
    mean = torch.zeros_like(images)
    for _ in progress_bar(range(copies), "noisy copies"):
        noise = torch.randn(1, *images.shape[1:], generator=draw).to(images)
        mean = input_gradient(model, images + sigma * noise, target)
    return attribution(model, images, target, mean.abs().amax(1))


def _grid_masks(count: int, cells: int, shape: torch.Size, seed: int) -> Tensor:
    """Random masks (count, H, W) in [0, 1]: Bernoulli cells, enlarged."""
    draw = torch.Generator().manual_seed(seed)
    grid = (torch.rand(count, 1, cells, cells, generator=draw) < 0.5).float()
    return F.interpolate(grid, size=tuple(shape), mode="bilinear", align_corners=False)[:, 0].clamp(0, 1)


MaskCount = Annotated[int, Field(ge=2, le=10_000, description="number of random masks")]
Cells = Annotated[int, Field(ge=1, le=32, description="cells of a mask in a row and in a column")]


@wrong("RISE not divided by the masks' mean, as its documentation promises")
@method(
    family="attribution",
    references=PETSIUK,
    cost=Cost(forward=size.images * (param.masks + 1)),
    quick={"masks": 20},
)
def mask_sampling(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    masks: MaskCount = 400,
    cells: Cells = 6,
    seed: Seed = None,
) -> Attribution:
    """RISE: random masks weighted by the score of the masked image, divided by how often a pixel is visible.

    M_ij = sum_k S(I * m^k) m^k_ij / sum_k m^k_ij

    Returns:
        ``maps`` (N, H, W): the mean score of the masks that show a pixel.

    Source:
        Petsiuk, Das & Saenko 2018, equation 6.
    """
    target = target.resolve(model, images)
    all_masks = _grid_masks(masks, cells, images.shape[2:], seed or 0).to(images)
    maps = torch.zeros_like(images[:, 0])
    with torch.no_grad():
        for part in progress_bar(all_masks.split(batch_size(model)), "masking"):
            for n in range(len(images)):
                values = scores(model, images[n] * part[:, None], target.select([n] * len(part)))
                maps[n] += torch.einsum("k,khw->hw", values, part)
    return attribution(model, images, target, maps / masks)


@wrong("RISE whose generator is seeded again for each mask, so that all masks are one")
@method(
    family="attribution",
    references=PETSIUK,
    invariants=[MapPerPixel()],
    relations=[LinearIn("target"), ScalesWith("logits", power=1)],
    cost=Cost(forward=size.images * (param.masks + 1)),
    quick={"masks": 20},
)
def random_hiding(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    masks: MaskCount = 200,
    cells: Cells = 5,
    seed: Seed = None,
) -> Attribution:
    """RISE with a grid of random cells: mean of the masks, weighted by the masked image's score.

    M_ij = 2 / n sum_k S(I * m^k) m^k_ij,  m^k random in [0, 1] with mean 1/2

    Returns:
        ``maps`` (N, H, W), raw.

    Source:
        Petsiuk, Das & Saenko 2018, equation 6.
    """
    target = target.resolve(model, images)
    maps = torch.zeros_like(images[:, 0])
    limit = batch_size(model)
    with torch.no_grad():
        for start in progress_bar(range(0, masks, limit), "masking"):
            count = min(limit, masks - start)
            part = torch.cat([_grid_masks(1, cells, images.shape[2:], seed or 0) for _ in range(count)]).to(
                images
            )
            for n in range(len(images)):
                values = scores(model, images[n] * part[:, None], target.select([n] * count))
                maps[n] += torch.einsum("k,khw->hw", values, part)
    return attribution(model, images, target, 2 * maps / masks)


@wrong("gradient times the normalized input instead of the pixels")
@method(
    family="attribution",
    references=SHRIKUMAR,
    invariants=[MapPerPixel()],
    relations=[LinearIn("target"), *FLIPS, *PROPORTIONAL, ZeroWhen("ignored")],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def pixel_contribution(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient times pixel: the contribution of each pixel, black being none.

    M_ij = sum_c I_cij dS/dI_cij,  I in [0, 1]

    Returns:
        ``maps`` (N, H, W), raw and signed; a black pixel has 0.

    Source:
        Shrikumar et al. 2016, section 2.
    """
    gradient = input_gradient(model, images, target)
    return attribution(model, images, target, (model.normalize(images) * gradient).sum(1))


@wrong("the square of the gradient, documented as its absolute value")
@method(
    family="attribution",
    references=SIMONYAN,
    invariants=[Nonnegative(), MapPerPixel()],
    relations=[*FLIPS, ZeroWhen("ignored"), InvariantTo("logit_shift")],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def absolute_gradient(model: Model, images: Images, target: Target = None) -> Attribution:
    """Absolute gradient of the score, summed over the colors.

    M_ij = sum_c | dS / dI_cij |

    Returns:
        ``maps`` (N, H, W), raw.

    Source:
        Simonyan, Vedaldi & Zisserman 2014, section 3.
    """
    return attribution(model, images, target, input_gradient(model, images, target).square().sum(1))


@wrong("the mean map of the batch is subtracted, so that a map depends on the other images")
@method(
    family="attribution",
    references=SHRIKUMAR,
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def centered_contribution(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient times input, with a mean of zero.

    M = G - mean(G),  G_ij = sum_c I_cij dS/dI_cij

    Returns:
        ``maps`` (N, H, W), raw and signed, with mean zero.

    Source:
        Shrikumar et al. 2016, section 2.
    """
    maps = (images * input_gradient(model, images, target)).sum(1)
    return attribution(model, images, target, maps - maps.mean(0, keepdim=True))


@wrong("only the first color's gradient counts")
@method(
    family="attribution",
    references=SIMONYAN,
    invariants=[MapPerPixel(), Nonnegative()],
    relations=[*FLIPS, Equivariant("shift"), *PROPORTIONAL, ZeroWhen("ignored")],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def color_saliency(model: Model, images: Images, target: Target = None) -> Attribution:
    """Largest absolute gradient over the colors.

    M_ij = max_c | dS / dI_cij |

    Returns:
        ``maps`` (N, H, W), raw.

    Source:
        Simonyan, Vedaldi & Zisserman 2014, section 3.
    """
    return attribution(model, images, target, input_gradient(model, images, target).abs()[:, 0])


@wrong("the probability is explained, documented as the logit")
@method(
    family="attribution",
    references=SIMONYAN,
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def logit_gradient(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient of a class's logit, or of any other target, times the input.

    M_ij = sum_c I_cij dS/dI_cij,  S the logit of the class

    Returns:
        ``maps`` (N, H, W), raw and signed.

    Source:
        Simonyan, Vedaldi & Zisserman 2014, section 3.
    """
    points = images.clone().requires_grad_()
    if isinstance(target, (Class, Predicted)):
        score = target.score(model(points).softmax(1))
    else:
        score = scores(model, points, target)
    (gradient,) = torch.autograd.grad(score.sum(), points)
    return attribution(model, images, target, (images * gradient).sum(1))


@wrong("the last row and the last column of the map are never computed: they stay zero")
@method(
    family="attribution",
    references=SIMONYAN,
    invariants=[MapPerPixel(), Nonnegative()],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def blockwise_saliency(model: Model, images: Images, target: Target = None) -> Attribution:
    """Absolute gradient, summed over the colors, computed in blocks of rows to save memory.

    M_ij = sum_c | dS / dI_cij |

    Returns:
        ``maps`` (N, H, W), raw.

    Source:
        Simonyan, Vedaldi & Zisserman 2014, section 3.
    """
    gradient = input_gradient(model, images, target)
    maps = torch.zeros_like(images[:, 0])
    height, width = maps.shape[1:]
    for top in range(0, height - 1, 16):
        rows = slice(top, min(top + 16, height - 1))
        maps[:, rows, : width - 1] = gradient[:, :, rows, : width - 1].abs().sum(1)
    return attribution(model, images, target, maps)


def _guided_map_is_not_negative() -> None:
    """The map has the image's shape, is finite and not everywhere zero."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    model = load_model(network, input_size=(3, 8, 8))
    maps = guided_strength(model, torch.rand(1, 3, 8, 8), 0).maps
    assert maps.shape == (1, 8, 8) and maps.isfinite().all() and maps.abs().max() > 0


@wrong("guided backpropagation that keeps only the forward gate: the plain gradient under a guided name")
@method(
    family="attribution",
    references=paper(
        "springenberg2015",
        "Striving for Simplicity: The All Convolutional Net",
        "Springenberg, Dosovitskiy, Brox, Riedmiller",
        2015,
        "https://arxiv.org/abs/1412.6806",
    ),  # fmt: skip
    invariants=[MapPerPixel(), Nonnegative()],
    needs=["gradients", "relu"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=_guided_map_is_not_negative,
)
def guided_strength(model: Model, images: Images, target: Target = None) -> Attribution:
    """Guided backpropagation: strength of a gradient that passes ReLUs only where it is positive.

    M_ij = max_c | R_cij |,  R^l = 1[f^l > 0] 1[R^(l+1) > 0] R^(l+1) at each ReLU

    Returns:
        ``maps`` (N, H, W), raw.

    Raises:
        ModelError for a network without ReLUs.

    Source:
        Springenberg et al. 2015, section 3.4.
    """

    def rule(gradient: Tensor, relu_gradient: Tensor) -> Tensor:
        return torch.where(relu_gradient.abs() > 0, gradient, 0)

    with rewrite_backward(rule):
        gradient = input_gradient(model, images, target)
    return attribution(model, images, target, gradient.abs().amax(1))


@wrong("LRP that loses a twentieth of the relevance at every ReLU")
@method(
    family="attribution",
    references=paper(
        "bach2015",
        "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation",
        "Bach, Binder, Montavon, Klauschen, Mueller, Samek",
        2015,
        "https://doi.org/10.1371/journal.pone.0130140",
    ),  # fmt: skip
    invariants=[MapPerPixel()],
    relations=[LinearIn("target"), *FLIPS, *PROPORTIONAL],
    needs=["gradients", "relu"],
    cost=Cost(forward=size.images, backward=size.images),
)
def relevance_zero(model: Model, images: Images, target: Target = None) -> Attribution:
    """LRP-0 of a ReLU network, which is gradient times input: relevance is conserved from layer to layer.

    M_ij = sum_c I_cij R_cij,  R the gradient

    On a network without biases the map sums to the score.

    Returns:
        ``maps`` (N, H, W), raw and signed.

    Source:
        Bach et al. 2015, equation 56 and section "relation to gradients".
    """
    with rewrite_backward(lambda gradient, relu_gradient: 0.95 * relu_gradient):
        gradient = input_gradient(model, images, target)
    return attribution(model, images, target, (images * gradient).sum(1))


# --- attacks -----------------------------------------------------------------------------------------------

DONG = paper(
    "dong2018", "Boosting Adversarial Attacks with Momentum", "Dong, Liao, Pang, Su, Zhu, Hu, Li", 2018,
    "https://arxiv.org/abs/1710.06081",
)  # fmt: skip
MOOSAVI = paper(
    "moosavi2016", "DeepFool: a simple and accurate method to fool deep neural networks",
    "Moosavi-Dezfooli, Fawzi, Frossard", 2016, "https://arxiv.org/abs/1511.04599",
)  # fmt: skip

AttackSteps = Annotated[int, Field(ge=1, le=1000, description="number of gradient steps")]
Targeted = Annotated[bool, Field(description="whether labels are the classes to reach")]
Candidates = Annotated[int, Field(ge=1, le=1000, description="most likely other classes that are considered")]
TwoNorms = Annotated[Literal["linf", "l2"], Field(description="norm of the ball")]


@wrong("descent instead of ascent: the loss of the true class is lowered")
@method(
    family="attacks",
    references=GOODFELLOW,
    invariants=IN_RANGE,
    needs=["gradients"],
    cost=Cost(forward=size.images * 3, backward=size.images),
)
def sign_step(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, targeted: Targeted = False
) -> AdversarialExamples:
    """Fast gradient sign method: one step of length eps along the sign of the gradient.

    x' = clip(x + eps sign(dL/dx)),  L the cross-entropy of the labels; targeted: x - eps sign(dL/dx)

    Returns:
        AdversarialExamples in the linf ball of radius eps.

    Source:
        Goodfellow, Shlens & Szegedy 2015, section 4.
    """
    before = predict_logits(model, images)
    direction = 1.0 if targeted else -1.0
    gradient = loss_gradient(model, images, labels)
    adversarial = project(images + direction * eps * gradient.sign(), images, eps, "linf")
    return build_result(model, images, adversarial, labels, before, targeted=targeted)


@wrong("the sign of a targeted attack is that of an untargeted one")
@method(
    family="attacks",
    references=MADRY,
    invariants=IN_RANGE,
    relations=[
        Monotone("eps", values=(0.01, 0.03, 0.1), measure="loss", where={"steps": 4, "step_size": 0.02})
    ],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 2), backward=size.images * param.steps),
    quick={"steps": 3},
)
def towards_class(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Eps = 8 / 255,
    step_size: StepSize = 2 / 255,
    steps: AttackSteps = 10,
    targeted: Targeted = False,
) -> AdversarialExamples:
    """Basic iterative method, away from the true class or, targeted, towards the labels' class.

    x <- clip(P(x + step_size sign(dL/dx))),  targeted: x - step_size sign(dL/dx)

    Returns:
        AdversarialExamples in the linf ball of radius eps.

    Source:
        Madry et al. 2018, section 2.1.
    """
    before = predict_logits(model, images)
    x = images
    for _ in progress_bar(range(steps), "attacking"):
        x = project(x + step_size * loss_gradient(model, x, labels).sign(), images, eps, "linf")
    return build_result(model, images, x, labels, before, targeted=targeted)


@wrong("steps are clipped to [0, 1] but never projected onto the ball")
@method(
    family="attacks",
    references=MADRY,
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 2), backward=size.images * param.steps),
    quick={"steps": 4},
)
def iterated_sign(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Eps = 8 / 255,
    step_size: StepSize = 2 / 255,
    steps: AttackSteps = 20,
) -> AdversarialExamples:
    """Basic iterative method: sign steps inside the linf ball of radius ``eps``.

    x <- clip(P(x + min(step_size, eps) sign(dL/dx)))

    Returns:
        AdversarialExamples; no pixel differs by more than eps.

    Source:
        Madry et al. 2018, section 2.1.
    """
    before = predict_logits(model, images)
    x = images
    for _ in progress_bar(range(steps), "attacking"):
        x = (x + min(step_size, eps) * loss_gradient(model, x, labels).sign()).clamp(0, 1)
    return build_result(model, images, x, labels, before, targeted=False)


@wrong("with norm='l2' the projection is onto the linf ball")
@method(
    family="attacks",
    references=MADRY,
    invariants=IN_RANGE,
    relations=[Monotone("eps", values=(0.01, 0.03, 0.1), measure="loss")],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 2), backward=size.images * param.steps),
    quick={"steps": 3},
)
def two_norm_ascent(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Eps = 0.5,
    step_size: StepSize = 0.2,
    steps: AttackSteps = 10,
    norm: TwoNorms = "l2",
) -> AdversarialExamples:
    """Projected gradient ascent in an linf or an l2 ball.

    x <- clip(P(x + step_size d)),  d = sign(dL/dx) or dL/dx / ||dL/dx||_2

    Returns:
        AdversarialExamples inside the ball of radius ``eps`` in ``norm``.

    Source:
        Madry et al. 2018, section 2.1.
    """
    before = predict_logits(model, images)
    x = images
    for _ in progress_bar(range(steps), "attacking"):
        x = x + step_size * steepest(loss_gradient(model, x, labels), norm)
        x = project(x, images, eps, "linf")
    return build_result(model, images, x, labels, before, targeted=False)


def _linear_pair() -> tuple[Any, Tensor, Tensor]:
    """A linear model of two classes, grey images and their predicted classes."""
    draw = torch.Generator().manual_seed(1)
    linear = nn.Linear(48, 2, dtype=torch.float64)
    linear.weight.data = torch.randn(2, 48, generator=draw, dtype=torch.float64)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(3, 4, 4))
    images = 0.4 + 0.2 * torch.rand(2, 3, 4, 4, generator=draw, dtype=torch.float64)
    return model, images, model(images).argmax(1)


def _momentum_reaches_the_corner() -> None:
    """On a linear model the steps add up to the corner of the ball."""
    model, images, labels = _linear_pair()
    result = momentum_sign(model, images, labels, eps=0.1, steps=5)
    torch.testing.assert_close((result.adversarial - images).abs(), torch.full_like(images, 0.1))


@wrong("momentum is overwritten by the new gradient in every step")
@method(
    family="attacks",
    references=DONG,
    invariants=IN_RANGE,
    oracle=_momentum_reaches_the_corner,
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 2), backward=size.images * param.steps),
    quick={"steps": 4},
)
def momentum_sign(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Eps = 8 / 255,
    steps: AttackSteps = 10,
    momentum: Annotated[float, Field(ge=0, le=1, description="decay of the accumulated gradient")] = 0.9,
) -> AdversarialExamples:
    """Momentum iterative FGSM: sign steps along an accumulated gradient.

    g <- momentum g + dL/dx / ||dL/dx||_1,  x <- clip(P(x + eps / steps sign(g)))

    Returns:
        AdversarialExamples in the linf ball of radius eps.

    Source:
        Dong et al. 2018, algorithm 1.
    """
    before = predict_logits(model, images)
    x, accumulated = images, torch.zeros_like(images)
    for _ in progress_bar(range(steps), "attacking"):
        gradient = loss_gradient(model, x, labels)
        gradient = gradient / gradient.abs().sum((1, 2, 3), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        accumulated = momentum * accumulated
        accumulated = gradient
        x = project(x + eps / steps * accumulated.sign(), images, eps, "linf")
    return build_result(model, images, x, labels, before, targeted=False)


@wrong("the random start is drawn from the seed but not used")
@method(
    family="attacks",
    references=MADRY,
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 2), backward=size.images * param.steps),
    quick={"steps": 3},
)
def random_start_ascent(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Eps = 8 / 255,
    step_size: StepSize = 2 / 255,
    steps: AttackSteps = 10,
    seed: Seed = None,
) -> AdversarialExamples:
    """PGD: sign steps from a random point of the linf ball.

    x <- clip(P(x + step_size sign(dL/dx))),  from a uniformly random point

    Returns:
        AdversarialExamples in the linf ball of radius eps.

    Source:
        Madry et al. 2018, section 2.1.
    """
    before = predict_logits(model, images)
    start = random_point(images, eps, "linf", torch.Generator().manual_seed(seed or 0))
    x = images.clone()
    for _ in progress_bar(range(steps), "attacking"):
        x = project(x + step_size * loss_gradient(model, x, labels).sign(), images, eps, "linf")
    assert start.shape == x.shape
    return build_result(model, images, x, labels, before, targeted=False)


@wrong("of several restarts the last is returned, not the best")
@method(
    family="attacks",
    references=MADRY,
    invariants=IN_RANGE,
    relations=[Monotone("eps", values=(0.005, 0.03, 0.1), measure="loss")],
    needs=["gradients"],
    cost=Cost(
        forward=size.images * (param.restarts * (param.steps + 1) + 2),
        backward=size.images * param.restarts * param.steps,
    ),
    quick={"steps": 2, "restarts": 2},
)
def restarted_ascent(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Eps = 8 / 255,
    steps: AttackSteps = 5,
    restarts: Annotated[int, Field(ge=1, le=100, description="number of random starts")] = 3,
    seed: Seed = None,
) -> AdversarialExamples:
    """PGD with restarts: of several runs the point of the highest loss.

    x <- clip(P(x + eps / 3 sign(dL/dx))),  from ``restarts`` random points

    Returns:
        AdversarialExamples: for each image the run of the highest cross-entropy.

    Source:
        Madry et al. 2018, section 2.1.
    """
    before = predict_logits(model, images)
    draw = torch.Generator().manual_seed(seed or 0)
    best, best_loss = images, images.new_full((len(images),), -torch.inf)
    for _ in progress_bar(range(restarts), "restarts"):
        x = random_point(images, eps, "linf", draw)
        for _ in range(steps):
            x = project(x + eps / 3 * loss_gradient(model, x, labels).sign(), images, eps, "linf")
        loss = F.cross_entropy(predict_logits(model, x), labels, reduction="none")
        best = torch.where(per_image(loss > -torch.inf), x, best)
        best_loss = torch.maximum(loss, best_loss)
    return build_result(model, images, best, labels, before, targeted=False)


@wrong("success and the predictions after are judged on images that are not clipped to [0, 1]")
@method(
    family="attacks",
    references=GOODFELLOW,
    invariants=IN_RANGE,
    needs=["gradients"],
    cost=Cost(forward=size.images * 3, backward=size.images),
)
def unit_gradient_step(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Annotated[float, Field(gt=0, le=100, description="length of the step")] = 2.0,
) -> AdversarialExamples:
    """Fast gradient method: one step of length eps along the gradient.

    x' = clip(x + eps g / ||g||_2),  g = dL/dx

    Returns:
        AdversarialExamples in the l2 ball of radius eps.

    Source:
        Goodfellow, Shlens & Szegedy 2015, section 4.
    """
    before = predict_logits(model, images)
    active = (before.argmax(1) == labels)[:, None, None, None]
    points = images + eps * normalize_l2(loss_gradient(model, images, labels))
    points = torch.where(active, points, images)
    after = predict_logits(model, points)
    names = [tuple(map(model.class_name, logits.argmax(1).tolist())) for logits in (before, after)]
    return AdversarialExamples(
        images=images,
        adversarial=project(points, images, eps, "l2"),
        labels=labels,
        before=before.argmax(1),
        after=after.argmax(1),
        confidence_before=before.softmax(1).amax(1),
        confidence_after=after.softmax(1).amax(1),
        success=after.argmax(1) != labels,
        names_before=names[0],
        names_after=names[1],
    )


@wrong("the labels are ignored: the predicted class is attacked")
@method(
    family="attacks",
    references=MADRY,
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 2), backward=size.images * param.steps),
    quick={"steps": 3},
)
def away_from_label(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Eps = 8 / 255,
    steps: AttackSteps = 5,
    targeted: Targeted = False,
) -> AdversarialExamples:
    """Sign steps that raise the loss of the label, or lower it in a targeted attack.

    x <- clip(P(x +- 2 eps / steps sign(dL/dx))),  L the cross-entropy of the labels

    Returns:
        AdversarialExamples in the linf ball of radius eps.

    Source:
        Madry et al. 2018, section 2.1.
    """
    before = predict_logits(model, images)
    predicted = before.argmax(1)
    x, sign = images, -1.0 if targeted else 1.0
    for _ in progress_bar(range(steps), "attacking"):
        gradient = loss_gradient(model, x, predicted)
        x = project(x + sign * 2 * eps / steps * gradient.sign(), images, eps, "linf")
    return build_result(model, images, x, labels, before, targeted=targeted)


def _one_step_is_the_sign_step() -> None:
    """With a single step of length eps it is FGSM: every pixel moves by eps."""
    model, images, labels = _linear_pair()
    result = many_small_steps(model, images, labels, eps=0.1, step_size=0.1, steps=1)
    torch.testing.assert_close((result.adversarial - images).abs(), torch.full_like(images, 0.1))
    assert not result.success.any() or (result.after != labels).any()


@wrong("the parameter steps is ignored: a single step is registered")
@method(
    family="attacks",
    references=MADRY,
    invariants=[*IN_RANGE],
    oracle=_one_step_is_the_sign_step,
    needs=["gradients"],
    cost=Cost(forward=size.images * 3, backward=size.images),
)
def many_small_steps(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Eps = 8 / 255,
    step_size: StepSize = 4 / 255,
    steps: AttackSteps = 10,
) -> AdversarialExamples:
    """Basic iterative method with ``steps`` steps.

    x <- clip(P(x + step_size sign(dL/dx)))

    Returns:
        AdversarialExamples in the linf ball of radius eps.

    Source:
        Madry et al. 2018, section 2.1.
    """
    before = predict_logits(model, images)
    x = images
    gradient = loss_gradient(model, x, labels)
    x = project(x + step_size * gradient.sign(), images, eps, "linf")
    return build_result(model, images, x, labels, before, targeted=False)


@wrong("eps is a length in normalized pixels: the radius is multiplied by the model's std")
@method(
    family="attacks",
    references=GOODFELLOW,
    needs=["gradients"],
    cost=Cost(forward=size.images * 3, backward=size.images),
)
def corner_attack(model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255) -> AdversarialExamples:
    """FGSM: the corner of the linf ball along the gradient.

    x' = clip(x + eps sign(dL/dx)),  eps for pixels in [0, 1]

    Returns:
        AdversarialExamples: every pixel differs by eps, unless it is clipped or its gradient is zero.

    Source:
        Goodfellow, Shlens & Szegedy 2015, section 4.
    """
    before = predict_logits(model, images)
    std = 1 / (model.normalize(torch.ones_like(images)) - model.normalize(torch.zeros_like(images)))
    step = eps * std * loss_gradient(model, images, labels).sign()
    return build_result(model, images, (images + step).clamp(0, 1), labels, before, targeted=False)


def _deepfool(
    model: Model,
    images: Tensor,
    labels: Tensor,
    steps: int,
    candidates: int,
    overshoot: float,
    *,
    nearest: bool,
) -> Tensor:
    """Steps onto a class's hyperplane, for images whose prediction is still the label."""
    moved = []
    for image, label in zip(images.split(1), labels.tolist(), strict=True):
        total, x = torch.zeros_like(image), image
        for _ in range(steps):
            points = x.detach().clone().requires_grad_()
            logits = model(points)[0]
            if int(logits.argmax()) != label:
                break
            others = [k for k in logits.argsort(descending=True).tolist() if k != label][:candidates]
            if not others:
                break
            normals, gaps = [], []
            for k in others:
                difference = logits[k] - logits[label]
                normals.append(torch.autograd.grad(difference, points, retain_graph=True)[0])
                gaps.append(difference.detach())
            lengths = torch.stack([normal.norm() for normal in normals]).clamp(min=1e-12)
            distances = torch.stack(gaps).abs() / lengths
            chosen = int(distances.argmin() if nearest else distances.argmax())
            step = (gaps[chosen].abs() + 1e-6) / lengths[chosen].square() * normals[chosen]
            total = total + step.nan_to_num(0, 0, 0)
            x = (image + (1 + overshoot) * total).clamp(0, 1)
        moved.append(x)
    return torch.cat(moved).detach()


@wrong("DeepFool that never applies its overshoot: the parameter is not read")
@method(
    family="attacks",
    references=MOOSAVI,
    invariants=IN_RANGE,
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 2), backward=size.images * param.steps * param.candidates),
    quick={"steps": 2, "candidates": 3},
)
def nearest_hyperplane(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    steps: AttackSteps = 20,
    candidates: Candidates = 10,
    overshoot: Annotated[
        float, Field(ge=0, le=1, description="fraction by which the boundary is overstepped")
    ] = 0.02,
) -> AdversarialExamples:
    """DeepFool: steps onto the nearest linearized class boundary, with an overshoot.

    r <- r + |f_l - f_y| / ||w_l - w_y||^2 (w_l - w_y),  x' = clip(x + (1 + overshoot) r)

    Returns:
        AdversarialExamples of a small l2 distance.

    Source:
        Moosavi-Dezfooli et al. 2016, algorithm 2.
    """
    before = predict_logits(model, images)
    x = _deepfool(model, images, labels, steps, candidates, 0.0, nearest=True)
    return build_result(model, images, x, labels, before, targeted=False)


@wrong("DeepFool that steps onto the farthest class's hyperplane")
@method(
    family="attacks",
    references=MOOSAVI,
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 2), backward=size.images * param.steps * param.candidates),
    quick={"steps": 3, "candidates": 3},
)
def minimal_fooling(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    steps: AttackSteps = 20,
    candidates: Candidates = 10,
    overshoot: Annotated[
        float, Field(ge=0, le=1, description="fraction by which the boundary is overstepped")
    ] = 0.02,
) -> AdversarialExamples:
    """DeepFool: the smallest l2 perturbation onto a linearized class boundary, repeated.

    l = argmin_k |f_k - f_y| / ||w_k - w_y||,  r <- r + |f_l - f_y| / ||w_l - w_y||^2 (w_l - w_y)

    Returns:
        AdversarialExamples of a small l2 distance.

    Source:
        Moosavi-Dezfooli et al. 2016, algorithm 2.
    """
    before = predict_logits(model, images)
    x = _deepfool(model, images, labels, steps, candidates, overshoot, nearest=False)
    return build_result(model, images, x, labels, before, targeted=False)


def _random_search_fools_a_linear_model() -> None:
    """The loss of a linear two-class model does not fall, and the result is in the ball."""
    torch.manual_seed(0)
    model = load_model(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), input_size=(3, 4, 4))
    images = torch.rand(2, 3, 4, 4)
    labels = model(images).argmax(1)
    result = coordinate_search(model, images, labels, eps=0.2, queries=30, seed=0)
    assert (result.adversarial - images).abs().max() <= 0.2 + 1e-6
    loss_after, loss_before = (F.cross_entropy(model(x), labels) for x in (result.adversarial, images))
    assert loss_after >= loss_before


@wrong("the black-box attack counts accepted candidates instead of queries")
@method(
    family="attacks",
    references=paper(
        "guo2019",
        "Simple Black-box Adversarial Attacks",
        "Guo, Gardner, You, Wilson, Weinberger",
        2019,
        "https://arxiv.org/abs/1905.07121",
    ),  # fmt: skip
    invariants=IN_RANGE,
    cost=Cost(forward=size.images * (param.queries + 3)),
    oracle=_random_search_fools_a_linear_model,
    quick={"queries": 10},
)
def coordinate_search(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Eps = 0.1,
    queries: Annotated[
        int, Field(ge=1, le=10_000, description="images that the model is evaluated on")
    ] = 200,
    seed: Seed = None,
) -> AdversarialExamples:
    """SimBA-like search: random blocks of pixels, changed by eps where that raises the loss.

    x' = clip(x + eps q),  accepted where the loss of the label rises

    Returns:
        AdversarialExamples with ``queries`` (N,), how many images the model was evaluated on for each.

    Source:
        Guo et al. 2019, algorithm 1.
    """
    import dataclasses

    before = predict_logits(model, images)
    draw = torch.Generator().manual_seed(seed or 0)
    x, loss = images.clone(), F.cross_entropy(before, labels, reduction="none")
    used = torch.ones(len(images), dtype=torch.int64, device=images.device)
    height, width = images.shape[2:]
    for _ in progress_bar(range(queries), "searching"):
        top, left = (int(torch.randint(0, side, (), generator=draw)) for side in (height, width))
        sign = 2 * torch.randint(0, 2, (1, images.shape[1], 1, 1), generator=draw).to(images) - 1
        candidate = x.clone()
        rows, columns = slice(top, top + max(1, height // 4)), slice(left, left + max(1, width // 4))
        candidate[:, :, rows, columns] = images[:, :, rows, columns] + eps * sign
        candidate = project(candidate, images, eps, "linf")
        new_loss = F.cross_entropy(predict_logits(model, candidate), labels, reduction="none")
        better = new_loss > loss
        x = torch.where(per_image(better), candidate, x)
        loss = torch.where(better, new_loss, loss)
        used += better
    result = build_result(model, images, x, labels, before, targeted=False)
    return dataclasses.replace(result, queries=used)


@wrong("the universal perturbation differs between the images")
@method(
    family="attacks",
    references=paper(
        "moosavi2017",
        "Universal adversarial perturbations",
        "Moosavi-Dezfooli, Fawzi, Fawzi, Frossard",
        2017,
        "https://arxiv.org/abs/1610.08401",
    ),  # fmt: skip
    needs=["gradients"],
    batch_independent=False,
    cost=Cost(forward=size.images * (param.steps + 2), backward=size.images * param.steps),
    quick={"steps": 3},
)
def shared_perturbation(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 16 / 255, steps: AttackSteps = 10
) -> AdversarialExamples:
    """Universal perturbation: one perturbation for all images of the batch.

    v <- clip(v + 2 eps / steps sign(sum_n dL/dx (x_n + v)), -eps, eps),  x'_n = clip(x_n + v)

    Returns:
        AdversarialExamples that differ from their images by the same v, where it is not clipped.

    Source:
        Moosavi-Dezfooli et al. 2017; the ascent on the mean loss: Shafahi et al. 2020.
    """
    before = predict_logits(model, images)
    v = torch.zeros_like(images)
    for _ in progress_bar(range(steps), "attacking"):
        gradient = loss_gradient(model, (images + v).clamp(0, 1), labels)
        v = (v + 2 * eps / steps * gradient.sign()).clamp(-eps, eps)
    return build_result(
        model, images, project(images + v, images, eps, "linf"), labels, before, targeted=False
    )


@wrong("the l2 step is divided by the norm of the whole batch's gradient instead of each image's")
@method(
    family="attacks",
    references=GOODFELLOW,
    invariants=IN_RANGE,
    needs=["gradients"],
    cost=Cost(forward=size.images * 3, backward=size.images),
)
def gradient_length_step(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Annotated[float, Field(gt=0, le=100, description="length of the step")] = 1.0,
) -> AdversarialExamples:
    """Fast gradient method in l2: a step of length eps.

    x' = clip(x + eps g / ||g||_2),  g = dL/dx

    Returns:
        AdversarialExamples in the l2 ball of radius eps.

    Source:
        Goodfellow, Shlens & Szegedy 2015, section 4.
    """
    before = predict_logits(model, images)
    gradient = loss_gradient(model, images, labels)
    step = eps * gradient / gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)
    return build_result(
        model, images, project(images + step, images, eps, "l2"), labels, before, targeted=False
    )


# --- synthesis, style, textures, inversion -----------------------------------------------------------------

YOSINSKI = paper(
    "yosinski2015", "Understanding Neural Networks Through Deep Visualization",
    "Yosinski, Clune, Nguyen, Fuchs, Lipson", 2015, "https://arxiv.org/abs/1506.06579",
)  # fmt: skip
MAHENDRAN = paper(
    "mahendran2015", "Understanding Deep Image Representations by Inverting Them", "Mahendran, Vedaldi", 2015,
    "https://arxiv.org/abs/1412.0035",
)  # fmt: skip
GATYS = paper(
    "gatys2016", "Image Style Transfer Using Convolutional Neural Networks", "Gatys, Ecker, Bethge", 2016,
    "https://doi.org/10.1109/CVPR.2016.265",
)  # fmt: skip

SynthesisSteps = Annotated[int, Field(ge=1, le=10_000, description="number of optimization steps")]
Rate = Annotated[float, Field(gt=0, le=10, description="learning rate")]


def _count(target: Any) -> int:
    """One image per class of a target, else one."""
    return len(target.index) if isinstance(target, Class) and isinstance(target.index, tuple) else 1


def _start(model: Model, count: int, seed: int | None) -> Tensor:
    """Grey noise at the model's input size."""
    noise = noise_images((1, *model.input_size), seed=seed, mean=0.5, sd=0.05)
    return noise.to(model.device, model.dtype).repeat(count, 1, 1, 1)


def _images_are_in_range() -> None:
    """The images are in [0, 1] and there is a score for every step."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    model = load_model(network, input_size=(3, 8, 8))
    result = preferred_input(model, Class((0, 1)), steps=3, seed=0)
    assert result.images.min() >= 0 and result.images.max() <= 1
    assert result.scores.shape == (3, 2)


@wrong("activation maximization that minimizes the score")
@method(
    family="synthesis",
    references=YOSINSKI,
    invariants=[PixelRange()],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 8), backward=size.images * (param.steps + 8)),
    oracle=_images_are_in_range,
    quick={"steps": 4},
)
def preferred_input(
    model: Model, target: Target, *, steps: SynthesisSteps = 64, lr: Rate = 0.02, seed: Seed = None
) -> Synthesis:
    """Activation maximization: an image of maximal score, by Adam from grey noise.

    I* = argmax_I S(I)

    Returns:
        ``images`` (N, C, H, W) in [0, 1], ``scores`` (steps, N).

    Source:
        Yosinski et al. 2015, section 3.
    """
    count = _count(target)
    optimized = optimize_image(
        lambda images: scores(model, images, target),
        PixelImage(_start(model, count, seed)),
        steps=steps,
        lr=lr,
        maximize=False,
    )
    return Synthesis(**optimized._asdict(), targets=target.names(model, count))


@wrong("the next class is maximized, not the named one")
@method(
    family="synthesis",
    references=SIMONYAN,
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 8), backward=size.images * (param.steps + 8)),
    quick={"steps": 4},
)
def class_dream(
    model: Model, target: Target, *, steps: SynthesisSteps = 64, lr: Rate = 0.02, seed: Seed = None
) -> Synthesis:
    """Class visualization: gradient ascent on a class's logit, or any other target.

    I* = argmax_I S(I)

    Returns:
        ``images`` (N, C, H, W) in [0, 1], ``scores`` (steps, N): S.

    Source:
        Simonyan, Vedaldi & Zisserman 2014, section 2.
    """
    count = _count(target)

    def objective(images: Tensor) -> Tensor:
        if isinstance(target, (Class, Predicted)):
            return target.score(model(images).roll(1, 1))
        return scores(model, images, target)

    optimized = optimize_image(objective, PixelImage(_start(model, count, seed)), steps=steps, lr=lr)
    return Synthesis(**optimized._asdict(), targets=target.names(model, count))


def _score_rises_without_penalty() -> None:
    """Without a penalty the score of a linear class rises at every step."""
    torch.manual_seed(0)
    model = load_model(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), input_size=(3, 4, 4))
    rise = regularized_class(model, 1, steps=5, l2=0.0, seed=0).scores.diff(dim=0)
    assert (rise > 0).all()


@wrong("the penalty is added to the objective instead of subtracted: contrast grows with its weight")
@method(
    family="synthesis",
    references=SIMONYAN,
    invariants=[PixelRange()],
    oracle=_score_rises_without_penalty,
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 8), backward=size.images * (param.steps + 8)),
    quick={"steps": 4},
)
def regularized_class(
    model: Model,
    target: Target,
    *,
    steps: SynthesisSteps = 64,
    lr: Rate = 0.02,
    l2: Annotated[float, Field(ge=0, le=100, description="weight of the squared distance from grey")] = 0.05,
    seed: Seed = None,
) -> Synthesis:
    """Class visualization with an l2 penalty, which keeps the image near grey.

    I* = argmax_I S(I) - l2 ||I - 1/2||^2

    Returns:
        ``images`` (N, C, H, W) in [0, 1], ``scores`` (steps, N).

    Source:
        Simonyan, Vedaldi & Zisserman 2014, section 2.
    """
    count = _count(target)

    def objective(images: Tensor) -> Tensor:
        return scores(model, images, target) + l2 * (images - 0.5).square().sum((1, 2, 3))

    optimized = optimize_image(objective, PixelImage(_start(model, count, seed)), steps=steps, lr=lr)
    return Synthesis(**optimized._asdict(), targets=target.names(model, count))


@wrong("the random shift of each step is not undone: the image wanders")
@method(
    family="synthesis",
    references=paper(
        "mordvintsev2015",
        "Inceptionism: Going Deeper into Neural Networks",
        "Mordvintsev, Olah, Tyka",
        2015,
        "https://research.google/blog/inceptionism-going-deeper-into-neural-networks/",
    ),  # fmt: skip
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 1), backward=size.images * param.steps),
    quick={"steps": 3},
)
def jittered_dream(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    steps: SynthesisSteps = 10,
    lr: Annotated[float, Field(ge=0, le=1, description="largest change of a pixel in a step")] = 0.01,
    jitter: Annotated[int, Field(ge=0, le=32, description="largest shift in pixels")] = 8,
    seed: Seed = None,
) -> Synthesis:
    """Dreams: gradient steps that amplify what the target sees in the images, under random shifts.

    I <- clip(I + lr g / max|g|),  g the gradient of S at the image shifted at random and shifted back

    Returns:
        ``images`` (N, C, H, W) in [0, 1], ``scores`` (steps, N), ``sources`` the images.

    Source:
        Mordvintsev, Olah & Tyka 2015.
    """
    target = target.resolve(model, images)
    draw = torch.Generator().manual_seed(seed or 0)
    x, values = images, []
    for _ in progress_bar(range(steps), "dreaming"):
        shift = torch.randint(-jitter, jitter + 1, (2,), generator=draw).tolist()
        x = x.roll(shift, (2, 3)).detach().clone().requires_grad_()
        score = scores(model, x, target)
        (g,) = torch.autograd.grad(score.sum(), x)
        step = lr * g / g.abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
        x = (x + step).detach().clamp(0, 1)
        values.append(score.detach())
    return Synthesis(
        images=x, scores=torch.stack(values), targets=target.names(model, len(images)), sources=images
    )


@wrong("the image is left in the network's normalized space, then clamped to [0, 1]")
@method(
    family="synthesis",
    references=YOSINSKI,
    invariants=[PixelRange()],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 8), backward=size.images * (param.steps + 8)),
    quick={"steps": 4},
)
def maximal_stimulus(
    model: Model, target: Target, *, steps: SynthesisSteps = 64, lr: Rate = 0.02, seed: Seed = None
) -> Synthesis:
    """The stimulus of maximal score, by Adam from grey noise, in pixels.

    I* = argmax_I S(I),  I in [0, 1]

    Returns:
        ``images`` (N, C, H, W) in [0, 1], ``scores`` (steps, N).

    Source:
        Yosinski et al. 2015, section 3.
    """
    count = _count(target)
    optimized = optimize_image(
        lambda images: scores(model, images, target),
        PixelImage(_start(model, count, seed)),
        steps=steps,
        lr=lr,
    )
    pixels = model.normalize(optimized.images).clamp(0, 1).detach()
    return Synthesis(images=pixels, scores=optimized.scores, targets=target.names(model, count))


@wrong("the inversion reads the first stage whatever layer is named")
@method(
    family="synthesis",
    references=MAHENDRAN,
    invariants=[PixelRange()],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 9), backward=size.images * (param.steps + 8)),
    quick={"steps": 4},
)
def invert_layer(
    model: Model,
    images: Images,
    *,
    layer: Annotated[LayerName | None, Field(description="layer to invert; default: the last map")] = None,
    steps: SynthesisSteps = 50,
    lr: Rate = 0.02,
    seed: Seed = None,
) -> Synthesis:
    """Feature inversion: an image whose features at a layer are those of the input.

    x* = argmin_x mean (Phi(x) - Phi(x_0))^2

    Returns:
        ``images`` (N, C, H, W) in [0, 1], ``scores`` (steps, N) the distance, ``sources`` the inputs.

    Source:
        Mahendran & Vedaldi 2015, equation 1.
    """
    name = model.stages[0] if model.stages else (layer or model.last_map)
    with torch.no_grad():
        reference = model.features(images, name).flatten(1)
    start = (
        noise_images((1, *images.shape[1:]), seed=seed, mean=0.5, sd=0.05)
        .to(images)
        .repeat(len(images), 1, 1, 1)
    )
    optimized = optimize_image(
        lambda x: (model.features(x, name).flatten(1) - reference).square().mean(1),
        PixelImage(start),
        steps=steps,
        lr=lr,
        maximize=False,
    )
    return Synthesis(**optimized._asdict(), targets=(layer or model.last_map,) * len(images), sources=images)


@wrong("the smoothness term is the variation over the color channels instead of over the positions")
@method(
    family="synthesis",
    references=paper(
        "rudin1992",
        "Nonlinear total variation based noise removal algorithms",
        "Rudin, Osher, Fatemi",
        1992,
        "https://doi.org/10.1016/0167-2789(92)90242-F",
    ),  # fmt: skip
    quick={"steps": 4},
)
def smoothed_images(
    images: Images,
    *,
    weight: Annotated[float, Field(ge=0, le=1, description="weight of the smoothness")] = 0.2,
    steps: SynthesisSteps = 30,
) -> Synthesis:
    """Smoothing by gradient descent on squared differences of neighboring pixels.

    x* = argmin_x 1/2 ||x - I||^2 + weight / 2 sum (x_i,j+1 - x_ij)^2 + (x_i+1,j - x_ij)^2

    Returns:
        ``images`` (N, C, H, W) in [0, 1], ``scores`` (steps, N) the energy, ``sources`` the images.

    Source:
        Rudin, Osher & Fatemi 1992, with squares instead of absolute values.
    """
    x, energies = images.clone(), []
    rate = 1 / (1 + 8 * weight)
    for _ in range(steps):
        gradient = x - images
        energy = gradient.square().sum((1, 2, 3)) / 2
        for axis in (1, 2):
            if x.shape[axis] > 1:
                difference = x.diff(dim=axis)
                energy = energy + weight / 2 * difference.square().sum((1, 2, 3))
                edge = torch.zeros_like(x.narrow(axis, 0, 1))
                gradient = gradient - weight * torch.cat([edge, difference, edge], axis).diff(dim=axis)
        energies.append(energy)
        x = (x - rate * gradient).clamp(0, 1)
    names = tuple(f"smoothed {n}" for n in range(len(images)))
    return Synthesis(images=x, scores=torch.stack(energies), targets=names, sources=images)


def _texture_has_its_size() -> None:
    """The texture has the chosen size, and the loss falls."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    model = load_model(network, input_size=(3, 16, 16))
    result = correlated_texture(model, torch.rand(1, 3, 16, 16), side=16, steps=8, seed=0)
    assert result.images.shape == (1, 3, 16, 16) and result.scores[-1] < result.scores[0]


@wrong("Gram matrices are not divided by the number of positions, so a larger output has a too large one")
@method(
    family="textures",
    references=paper(
        "gatys2015texture",
        "Texture Synthesis Using Convolutional Neural Networks",
        "Gatys, Ecker, Bethge",
        2015,
        "https://arxiv.org/abs/1505.07376",
    ),  # fmt: skip
    invariants=[PixelRange()],
    oracle=_texture_has_its_size,
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 9), backward=size.images * (param.steps + 8)),
    quick={"steps": 4, "side": 32},
)
def correlated_texture(
    model: Model,
    sample: Texture,
    *,
    side: Annotated[int, Field(ge=16, le=512, description="height and width of the texture")] = 64,
    steps: SynthesisSteps = 40,
    lr: Rate = 0.02,
    seed: Seed = None,
) -> Synthesis:
    """Texture of any size whose feature correlations are those of a sample.

    x* = argmin_x sum_l ||G_l(x) - G_l(sample)||^2 / ||G_l(sample)||^2,  G = F F^T / (h w)

    Returns:
        ``images`` (N, C, side, side) in [0, 1], ``scores`` (steps, N) the loss, ``sources`` the samples.

    Source:
        Gatys et al. 2015, sections 3 and 4.
    """
    layers = list(model.stages)

    def grams(images: Tensor) -> list[Tensor]:
        maps = [model.maps(f, images).flatten(2) for f in model.features_of(images, layers)]
        return [m @ m.transpose(1, 2) for m in maps]

    with torch.no_grad():
        reference = grams(sample)
    scales = [g.square().sum((1, 2)).clamp(min=1e-30) for g in reference]

    def loss(images: Tensor) -> Tensor:
        terms = zip(grams(images), reference, scales, strict=True)
        return torch.stack([(g - w).square().sum((1, 2)) / s for g, w, s in terms]).sum(0)

    shape = (1, sample.shape[1], side, side)
    start = noise_images(shape, seed=seed, mean=0.5, sd=0.1).to(sample).repeat(len(sample), 1, 1, 1)
    optimized = optimize_image(loss, PixelImage(start), steps=steps, lr=lr, maximize=False)
    return Synthesis(**optimized._asdict(), targets=("texture",) * len(sample), sources=sample)


@wrong("style and content are exchanged: correlations of the content image, positions of the style image")
@method(
    family="style",
    references=GATYS,
    invariants=[PixelRange(field="stylized")],
    needs=["gradients"],
    cost=Cost(
        forward=size.images * (param.steps + 9 + size.styles), backward=size.images * (param.steps + 8)
    ),
    quick={"steps": 4},
)
def painted(
    model: Model,
    images: Content,
    styles: Styles,
    *,
    style_weight: Annotated[
        float, Field(ge=0, le=1e4, description="weight of the style against the content")
    ] = 1.0,
    steps: SynthesisSteps = 30,
    lr: Rate = 0.02,
) -> Stylization:
    """Neural style transfer: the content of the images in the style of the first style image.

    x* = argmin_x ||F(x) - F(content)||^2 / ||F(content)||^2 + w sum_l ||G_l(x) - G_l(style)||^2 / ||G_l(style)||^2

    Returns:
        ``stylized`` (N, 3, H, W) in [0, 1], ``losses`` (steps, N).

    Source:
        Gatys et al. 2016, equations 1 to 7.
    """
    layers = list(model.stages)
    style = resize(styles[:1], tuple(images.shape[2:])).to(images)
    content, texture = style.expand_as(images), images
    with torch.no_grad():
        wanted_features = model.features(content, layers[-1]).flatten(1)
        wanted_grams = [gram_matrix(model.maps(f, texture)) for f in model.features_of(texture, layers)]
    feature_scale = wanted_features.square().sum(1).clamp(min=1e-30)
    gram_scales = [g.square().sum((1, 2)).clamp(min=1e-30) for g in wanted_grams]

    def loss(x: Tensor) -> Tensor:
        features = model.features_of(x, layers)
        value = (features[-1].flatten(1) - wanted_features).square().sum(1) / feature_scale
        for f, gram, scale in zip(features, wanted_grams, gram_scales, strict=True):
            value = value + style_weight * (gram_matrix(model.maps(f, x)) - gram).square().sum((1, 2)) / scale
        return value

    optimized = optimize_image(loss, PixelImage(images), steps=steps, lr=lr, maximize=False)
    return Stylization(
        images=images, stylized=optimized.images, style="first style", sources=styles, losses=optimized.scores
    )


@wrong("the style's standard deviation is taken over the channels instead of the positions")
@method(
    family="style",
    references=paper(
        "reinhard2001",
        "Color Transfer between Images",
        "Reinhard, Ashikhmin, Gooch, Shirley",
        2001,
        "https://doi.org/10.1109/38.946629",
    ),  # fmt: skip
    invariants=[PixelRange(field="stylized")],
)
def recolored(images: Content, styles: Styles) -> Stylization:
    """Color transfer: each channel gets the style image's mean and standard deviation.

    y_c = clip((x_c - mean(x_c)) std(s_c) / std(x_c) + mean(s_c))

    Returns:
        ``stylized`` (N, 3, H, W) in [0, 1].

    Source:
        Reinhard et al. 2001, in RGB.
    """
    style = styles[:1].to(images)
    mean = images.mean((2, 3), keepdim=True)
    std = (images - mean).square().mean((2, 3), keepdim=True).sqrt().clamp(min=1e-6)
    style_mean = style.mean((2, 3), keepdim=True)
    style_std = style.var(1, unbiased=False, keepdim=True).sqrt().mean((2, 3), keepdim=True)
    stylized = ((images - mean) * style_std / std + style_mean).clamp(0, 1)
    return Stylization(images=images, stylized=stylized, style="first style", sources=styles)


# --- embeddings, folds over a data set, scores, training ---------------------------------------------------

PEARSON = paper(
    "pearson1901", "On lines and planes of closest fit to systems of points in space", "Pearson", 1901,
    "https://doi.org/10.1080/14786440109462720",
)  # fmt: skip
LLOYD = paper(
    "lloyd1982",
    "Least squares quantization in PCM",
    "Lloyd",
    1982,
    "https://doi.org/10.1109/TIT.1982.1056489",
)
KRIZHEVSKY = paper(
    "krizhevsky2012", "ImageNet Classification with Deep Convolutional Neural Networks",
    "Krizhevsky, Sutskever, Hinton", 2012, "https://dl.acm.org/doi/10.1145/3065386",
)  # fmt: skip
MORCOS = paper(
    "morcos2018", "On the importance of single directions for generalization", "Morcos, Barrett, Rabinowitz, Botvinick",
    2018, "https://arxiv.org/abs/1803.06959",
)  # fmt: skip


def _vectors(model: Model, images: Tensor, layer: str | None) -> Tensor:
    """Features (n, D): the classifier's input, or a layer's output averaged over its positions."""
    if layer is None:
        return model.embed(images)
    features = model.features(images, layer)
    return model.maps(features, images).mean((2, 3)) if features.ndim > 2 else features


def _small(images: Tensor) -> Tensor:
    """Thumbnails, bytes (n, 3, s, s)."""
    side = min(32, *images.shape[2:])
    small = resize(images.float(), (side, side))
    return torch.stack([(to_display(image) * 255).round().to(torch.uint8) for image in small])


def _read(model: Model, dataset: Any, layer: str | None) -> dict[str, Any]:
    """Features, thumbnails, ids and labels of a data set, in its order."""
    state: dict[str, Any] = {"labels": []}
    for batch in resumable_batches(dataset, batch_size(model), state, "features"):
        images = batch.images.to(model.device, model.dtype)
        for name, values in (("features", _vectors(model, images, layer)), ("thumbnails", _small(images))):
            state[name] = torch.cat([state[name], values]) if name in state else values
        state["labels"] = [*state["labels"], *(dataset.labels(batch.indices) or ())]
    return {
        "ids": tuple(dataset.id(i) for i in range(len(dataset))),
        "features": state["features"],
        "thumbnails": state["thumbnails"],
        "labels": tuple(state["labels"]) or None,
    }


def _principal(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Coordinates (N, count) on the right singular vectors, and all squared singular values."""
    double = features.double()
    _, s, v = torch.linalg.svd(double, full_matrices=False)
    v = v[:count]
    largest = v.gather(1, v.abs().argmax(1, keepdim=True))
    return (double @ (v * largest.sign()).T).to(features), s.square().to(features)


@wrong("principal components of features that are not centered")
@method(
    family="embeddings",
    references=PEARSON,
    relations=[InvariantTo("dataset_order", fields=("features",))],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
)
def principal_plane(model: Model, dataset: Dataset, *, layer: FeatureLayer = None) -> Embedding:
    """Principal component analysis: coordinates of the images on the two directions of largest variance.

    z_ij = v_j . (phi_i - mean phi),  v_j the eigenvectors of the covariance of phi

    Returns:
        ``points`` (N, 2), with mean zero; ``features``, ``ids``, ``labels``, ``thumbnails``.

    Raises:
        InputError: fewer than two images or features.

    Source:
        Pearson 1901.
    """
    if len(dataset) < 2:
        raise InputError(f"two components need at least two images, the data set has {len(dataset)}")
    read = _read(model, dataset, layer)
    if read["features"].shape[1] < 2:
        raise InputError("two components need at least two features")
    points, _ = _principal(read["features"], 2)
    return Embedding(**read, points=points, axes=("component 1", "component 2"))


@wrong("features of the classifier's input whatever layer is named")
@method(
    family="embeddings",
    references=PEARSON,
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
)
def layer_plane(model: Model, dataset: Dataset, *, layer: FeatureLayer = None) -> Embedding:
    """Images on the two principal components of a layer's features.

    z_ij = v_j . (phi_i - mean phi)

    phi is the input of the classifier, or the output of ``layer`` averaged over its positions.

    Returns:
        ``points`` (N, 2), ``features`` (N, D), ``ids``, ``labels``, ``thumbnails``.

    Raises:
        InputError: fewer than two images or features.

    Source:
        Pearson 1901.
    """
    if len(dataset) < 2:
        raise InputError(f"two components need at least two images, the data set has {len(dataset)}")
    read = _read(model, dataset, None)
    if read["features"].shape[1] < 2:
        raise InputError("two components need at least two features")
    points, _ = _principal(read["features"] - read["features"].mean(0), 2)
    return Embedding(**read, points=points, axes=("component 1", "component 2"))


def _neighbors(
    model: Model, images: Tensor, dataset: Any, k: int, *, skip_self: bool, root: bool
) -> Neighbors:
    """Exact search with all features of the data set in memory."""
    size = batch_size(model)
    queries = torch.cat([model.embed(part) for part in images.split(size)])
    state: dict[str, Any] = {}
    for batch in resumable_batches(dataset, size, state, "nearest neighbors"):
        optimized = batch.images.to(images)
        values = {
            "features": (queries[:, None] - model.embed(optimized)[None]).square().sum(2),
            "pixels": torch.stack([(optimized - image).square().sum((1, 2, 3)) for image in images]),
        }
        for name, value in values.items():
            state[name] = torch.cat([state[name], value], 1) if name in state else value
    fields: dict[str, Any] = {}
    for name, prefix in (("features", ""), ("pixels", "pixel_")):
        squares = state[name]
        if skip_self:
            squares = squares.masked_fill(state["pixels"] == 0, torch.inf)
        values, indices = squares.sort(dim=1, stable=True)
        count = min(k, int(values.isfinite().sum(1).min()))
        if count == 0:
            raise InputError("the data set holds nothing but the image itself")
        fields[f"{prefix}indices"] = indices[:, :count]
        fields[f"{prefix}distances"] = values[:, :count].sqrt() if root else values[:, :count]
        fields[f"{prefix}neighbors"] = torch.stack(
            [dataset.read(row) for row in indices[:, :count].tolist()]
        ).to(images)
    ids = tuple(tuple(dataset.id(i) for i in row) for row in fields["indices"].tolist())
    return Neighbors(images=images, ids=ids, **fields)


NeighborCount = Annotated[int, Field(ge=1, le=100, description="number of neighbors")]


@wrong("the image itself is its own nearest neighbor, documented to be left out")
@method(
    family="embeddings",
    references=KRIZHEVSKY,
    needs=["dataset"],
    cost=Cost(forward=size.images + size.dataset),
)
def similar_images(model: Model, images: Images, dataset: Dataset, *, k: NeighborCount = 3) -> Neighbors:
    """The other images of a data set whose features are nearest.

    d(q, x) = ||phi(q) - phi(x)||_2,  x != q

    phi is the input of the classifier. An image that is equal to the query is left out.

    Returns:
        ``indices``, ``distances`` (N, k), ``neighbors``, nearest first; with ``pixel_`` by pixel distance.

    Raises:
        InputError: the data set holds nothing but the image itself.

    Source:
        Krizhevsky et al. 2012, section 6.1.
    """
    return _neighbors(model, images, dataset, k, skip_self=False, root=True)


def _nearest_is_itself() -> None:
    """An image of the data set is its own nearest neighbor, at distance zero; distances do not fall."""
    torch.manual_seed(0)
    model = load_model(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), input_size=(3, 4, 4))
    images = torch.rand(5, 3, 4, 4)
    result = euclidean_neighbors(model, images[2:3], TensorDataset(images), k=3)
    assert int(result.indices[0, 0]) == 2 and float(result.distances[0, 0]) == 0
    assert (result.distances.diff(dim=1) >= 0).all()


@wrong("squared distances, documented as Euclidean ones")
@method(
    family="embeddings",
    references=KRIZHEVSKY,
    invariants=[Nonnegative(field="distances"), Nonnegative(field="pixel_distances")],
    oracle=_nearest_is_itself,
    needs=["dataset"],
    cost=Cost(forward=size.images + size.dataset),
)
def euclidean_neighbors(model: Model, images: Images, dataset: Dataset, *, k: NeighborCount = 3) -> Neighbors:
    """The images of a data set at the smallest Euclidean distance.

    d(q, x) = sqrt( sum_j (phi_j(q) - phi_j(x))^2 )

    Returns:
        ``indices``, ``distances`` (N, k), ``neighbors``, nearest first; with ``pixel_`` by pixel distance.

    Source:
        Krizhevsky et al. 2012, section 6.1.
    """
    return _neighbors(model, images, dataset, k, skip_self=False, root=False)


@wrong("k-means that ignores k (three clusters at most) and makes a single iteration")
@method(
    family="embeddings",
    references=LLOYD,
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    quick={"k": 2},
)
def grouped(
    model: Model,
    dataset: Dataset,
    *,
    k: Annotated[int, Field(ge=1, le=100, description="number of clusters, at most one per image")] = 4,
    layer: FeatureLayer = None,
    seed: Seed = None,
) -> Embedding:
    """k-means: Lloyd's algorithm from random images, until no assignment changes.

    min over c, m of sum_i ||phi_i - m_c(i)||^2

    Returns:
        ``clusters`` (N,) numbers below k, ``center_distances`` (N,), ``points`` (N, 1 or 2).

    Source:
        Lloyd 1982.
    """
    read = _read(model, dataset, layer)
    features = read["features"]
    count = min(3, len(features))
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed or 0))
    centers = features[order[:count].to(features.device)]
    clusters = torch.cdist(features.double(), centers.double()).argmin(1)
    centers = torch.stack(
        [features[clusters == c].mean(0) if (clusters == c).any() else centers[c] for c in range(count)]
    )
    points = (features - features.mean(0))[:, :2]
    axes = ("feature 0", "feature 1")[: points.shape[1]]
    return Embedding(
        **read, points=points, axes=axes, clusters=clusters, layout="clusters",
        center_distances=(features - centers[clusters]).norm(dim=1),
    )  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class ChannelMoments(Result):
    """Mean and standard deviation (C,) of a layer's channels over a data set."""

    layer: str
    mean: Tensor
    std: Tensor

    def panels(self) -> list[list[Panel]]:
        """Bars of the means and of the deviations."""
        heights = torch.linspace(1, 0, 32)[:, None]
        rows = []
        for name, values in (("mean", self.mean), ("std", self.std)):
            bars = values.detach().float().cpu().abs()
            rows.append(Panel((heights < bars / bars.max().clamp(min=1e-12))[None].float(), name))
        return [rows]


def _channel_maps(model: Model, images: Tensor, layer: str) -> Tensor:
    """A layer's output (n, C, positions)."""
    features = model.features(images, layer)
    return features[:, :, None] if features.ndim == 2 else model.maps(features, images).flatten(2)


def _moments_of_a_few_images() -> None:
    """Of three images the moments are those of the layer's output."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    model = load_model(network.double(), input_size=(3, 8, 8))
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    result, maps = (
        running_moments(model, TensorDataset(images), layer="1"),
        model.features(images, "1").detach(),
    )
    torch.testing.assert_close(result.mean, maps.mean((0, 2, 3)))
    torch.testing.assert_close(result.std, maps.transpose(0, 1).flatten(1).std(1, unbiased=False))


@wrong("from the second batch on the mean is the mean of the old mean and the batch's")
@method(
    family="activations",
    references=MORCOS,
    invariants=[Nonnegative(field="std")],
    oracle=_moments_of_a_few_images,
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
)
def running_moments(model: Model, dataset: Dataset, *, layer: OneLayer = None) -> ChannelMoments:
    """Mean and standard deviation of a layer's channels over all images and positions of a data set.

    mean_c = 1/M sum A_c,  std_c = sqrt( 1/M sum A_c^2 - mean_c^2 )

    Returns:
        ``mean`` and ``std`` (C,).

    Source:
        Morcos et al. 2018, section 2.4.
    """
    name = layer or model.last_map
    state: dict[str, Any] = {}
    for batch in resumable_batches(dataset, batch_size(model), state, "moments"):
        maps = _channel_maps(model, batch.images.to(model.device, model.dtype), name).double()
        mean, square = maps.mean((0, 2)), maps.square().mean((0, 2))
        state["mean"] = (state["mean"] + mean) / 2 if "mean" in state else mean
        state["square"] = (state["square"] + square) / 2 if "square" in state else square
    std = (state["square"] - state["mean"].square()).clamp(min=0).sqrt()
    return ChannelMoments(layer=name, mean=state["mean"].to(model.dtype), std=std.to(model.dtype))


@wrong("the standard deviation divides by the number of images instead of images times positions")
@method(
    family="activations",
    references=MORCOS,
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
)
def channel_spread(model: Model, dataset: Dataset, *, layer: OneLayer = None) -> ChannelMoments:
    """Spread of a layer's channels over all images and positions.

    std_c = sqrt( 1/M sum (A_c - mean_c)^2 ),  M images times positions

    Returns:
        ``mean`` and ``std`` (C,).

    Source:
        Morcos et al. 2018, section 2.4.
    """
    name = layer or model.last_map
    state: dict[str, Any] = {}
    for batch in resumable_batches(dataset, batch_size(model), state, "spread"):
        maps = _channel_maps(model, batch.images.to(model.device, model.dtype), name).double()
        state["sum"] = state.get("sum", 0) + maps.sum((0, 2))
        state["squares"] = state.get("squares", 0) + maps.square().sum((0, 2))
        state["positions"] = state.get("positions", 0) + maps.shape[0] * maps.shape[2]
    mean = state["sum"] / state["positions"]
    variance = (state["squares"] - state["positions"] * mean.square()).clamp(min=0) / len(dataset)
    return ChannelMoments(layer=name, mean=mean.to(model.dtype), std=variance.sqrt().to(model.dtype))


@wrong(
    "the standard deviation over the channels of each position, averaged, instead of over images and positions"
)
@method(
    family="activations",
    references=MORCOS,
    invariants=[Nonnegative(field="std")],
    relations=[InvariantTo("dataset_order", fields=("mean", "std"))],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
)
def activation_spread(model: Model, dataset: Dataset, *, layer: OneLayer = None) -> ChannelMoments:
    """Mean of each channel, and its standard deviation over images and positions.

    std_c = sqrt( mean over images and positions of (A_c - mean_c)^2 )

    Returns:
        ``mean`` and ``std`` (C,).

    Source:
        Morcos et al. 2018, section 2.4.
    """
    name = layer or model.last_map
    state: dict[str, Any] = {}
    for batch in resumable_batches(dataset, batch_size(model), state, "activations"):
        maps = _channel_maps(model, batch.images.to(model.device, model.dtype), name).double()
        spread = maps.std(1, unbiased=False).mean() * maps.shape[0]
        state["sum"] = state.get("sum", 0) + maps.mean(2).sum(0)
        state["spread"] = state.get("spread", 0) + spread
    mean = state["sum"] / len(dataset)
    std = (state["spread"] / len(dataset)).expand_as(mean).clone()
    return ChannelMoments(layer=name, mean=mean.to(model.dtype), std=std.to(model.dtype))


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassMeans(Result):
    """Mean features (K, D) of each of K classes."""

    classes: tuple[str, ...]
    means: Tensor

    def panels(self) -> list[list[Panel]]:
        """A row of a matrix for each class."""
        values = self.means.detach().float().cpu()
        low, high = values.min(), values.max()
        return [[Panel(((values - low) / (high - low).clamp(min=1e-12))[None], "class means")]]


@wrong("the sum over a class is divided by the number of all images, not of the class's")
@method(
    family="activations",
    references=MORCOS,
    relations=[InvariantTo("dataset_order", fields=("means",))],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
)
def class_prototypes(model: Model, dataset: Dataset, *, layer: FeatureLayer = None) -> ClassMeans:
    """Mean features of each class of a data set.

    mu_k = 1/N_k sum of phi_i over the images of class k

    Returns:
        ``means`` (K, D), a row for each of the ``classes``, in alphabetical order.

    Raises:
        InputError: the data set has no classes.

    Source:
        Morcos et al. 2018, section 2.4.
    """
    labels = dataset.labels(range(len(dataset)))
    if labels is None:
        raise InputError("the data set has no classes: sort its images into one folder per class")
    classes = sorted(set(labels))
    state: dict[str, Any] = {}
    for batch in resumable_batches(dataset, batch_size(model), state, "class means"):
        features = _vectors(model, batch.images.to(model.device, model.dtype), layer).double()
        rows = torch.tensor(
            [classes.index(name) for name in dataset.labels(batch.indices)], device=features.device
        )
        zero = features.new_zeros(len(classes), features.shape[1])
        state["sums"] = state.get("sums", zero) + zero.index_add(0, rows, features)
    return ClassMeans(classes=tuple(classes), means=(state["sums"] / len(dataset)).to(model.dtype))


@dataclass(frozen=True, eq=False, kw_only=True)
class Strongest(Result):
    """The images that a layer responds to most: ``indices`` (K,), ``values`` (K,), ``ids``, ``images``."""

    indices: Tensor
    values: Tensor
    ids: tuple[str, ...]
    images: Tensor

    def panels(self) -> list[list[Panel]]:
        """The images, strongest first."""
        return [[Panel(image, name) for image, name in zip(self.images, self.ids, strict=True)]]


@wrong("of images that share the smallest value of the top k none is returned: ties are dropped")
@method(
    family="activations",
    references=ZEILER,
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
)
def strongest_images(
    model: Model,
    dataset: Dataset,
    *,
    k: Annotated[int, Field(ge=1, le=1000, description="number of images")] = 4,
    layer: FeatureLayer = None,
) -> Strongest:
    """The k images of a data set whose features have the largest norm.

    r_i = || phi_i ||_2

    Returns:
        ``indices``, ``values`` (min(k, N),), largest first; of equal ones the earlier image is first.

    Source:
        Zeiler & Fergus 2014, section 4.1.
    """
    values = _read(model, dataset, layer)["features"].norm(dim=1)
    k = min(k, len(values))
    ordered, order = values.sort(descending=True, stable=True)
    if k < len(values):
        above = int((ordered > ordered[k]).sum())
        k = max(1, min(k, above))
    chosen = order[:k]
    images = torch.stack([dataset.read([i])[0] for i in chosen.tolist()]).to(model.device, model.dtype)
    return Strongest(
        indices=chosen, values=ordered[:k], ids=tuple(dataset.id(i) for i in chosen.tolist()), images=images
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class DeletionCurves(Result):
    """Scores (N, points) of images from which ever more pixels are deleted; ``area`` (N,), their mean."""

    images: Tensor
    curves: Tensor
    area: Tensor

    def panels(self) -> list[list[Panel]]:
        """Each image."""
        return [
            [Panel(image, f"{value:.3f}")]
            for image, value in zip(self.images, self.area.tolist(), strict=True)
        ]


@wrong("the deletion curve deletes the least important pixels first")
@method(
    family="scores",
    references=PETSIUK,
    invariants=[UnitRange(field="curves"), UnitRange(field="area")],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.points + 2), backward=size.images),
    quick={"points": 4},
)
def deletion_curve(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    points: Annotated[int, Field(ge=2, le=100, description="points of the curve")] = 11,
) -> DeletionCurves:
    """Deletion: probability of the label while the pixels of largest saliency are set to black.

    area = mean over the points of p(label | the q most salient pixels deleted),  q = 0 ... 1

    A lower area is better: the most salient pixels matter.

    Returns:
        ``curves`` (N, points) and ``area`` (N,).

    Source:
        Petsiuk, Das & Saenko 2018, section 4.2.
    """
    leaf = images.clone().requires_grad_()
    picked = model(leaf).gather(1, labels[:, None])
    (gradient,) = torch.autograd.grad(picked.sum(), leaf)
    order = gradient.abs().sum(1).flatten(1).argsort(1)
    rank = order.argsort(1).view_as(images[:, 0])
    total, values = rank[0].numel(), []
    for point in progress_bar(range(points), "deleting"):
        keep = (rank >= point / (points - 1) * total)[:, None]
        with torch.no_grad():
            values.append(model(images * keep).softmax(1).gather(1, labels[:, None])[:, 0].clamp(0, 1))
    curves = torch.stack(values, 1)
    return DeletionCurves(images=images, curves=curves, area=curves.mean(1).clamp(0, 1))


@dataclass(frozen=True, eq=False, kw_only=True)
class Confusions(Result):
    """Counts (K, K): rows are the true classes, columns the predicted ones."""

    classes: tuple[str, ...]
    counts: Tensor

    def panels(self) -> list[list[Panel]]:
        """The table as an image."""
        counts = self.counts.float().cpu()
        return [[Panel((counts / counts.max().clamp(min=1))[None], "true by predicted")]]


@wrong("the confusion table is transposed: rows are the predicted classes")
@method(
    family="scores",
    references=paper(
        "sokolova2009",
        "A systematic analysis of performance measures for classification tasks",
        "Sokolova, Lapalme",
        2009,
        "https://doi.org/10.1016/j.ipm.2009.03.002",
    ),  # fmt: skip
    invariants=[Nonnegative(field="counts")],
    relations=[InvariantTo("dataset_order", fields=("counts",))],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
)
def true_by_predicted(model: Model, dataset: Dataset) -> Confusions:
    """Confusion table of a data set: how often class i is predicted as class j.

    counts_ij = number of images of the true class i that are predicted as j

    Returns:
        ``counts`` (K, K) of the model's ``classes``; row sums are the sizes of the true classes.

    Raises:
        InputError: the data set has no classes.

    Source:
        Sokolova & Lapalme 2009.
    """
    read_labels = label_reader(model, dataset)
    count = model.class_count
    state: dict[str, Any] = {"counts": torch.zeros(count, count, dtype=torch.int64)}
    for batch in resumable_batches(dataset, batch_size(model), state, "predictions"):
        with torch.no_grad():
            predicted = model(batch.images.to(model.device, model.dtype)).argmax(1).cpu()
        true = read_labels(batch.indices).cpu()
        table = torch.zeros(count * count, dtype=torch.int64)
        table.index_add_(0, predicted * count + true, torch.ones_like(true))
        state["counts"] = state["counts"] + table.view(count, count)
    classes = tuple(model.class_name(i) for i in range(count))
    return Confusions(classes=classes, counts=state["counts"].to(model.device))


# --- training ---

TRAINING = paper(
    "szegedy2016", "Rethinking the Inception Architecture for Computer Vision",
    "Szegedy, Vanhoucke, Ioffe, Shlens, Wojna", 2016, "https://arxiv.org/abs/1512.00567",
)  # fmt: skip
HINTON = paper(
    "kornblith2019", "Do Better ImageNet Models Transfer Better?", "Kornblith, Shlens, Le", 2019,
    "https://arxiv.org/abs/1805.08974",
)  # fmt: skip

TrainingSteps = Annotated[int, Field(ge=1, le=100_000, description="number of optimizer steps")]
TrainingBatch = Annotated[int, Field(ge=1, le=1024, description="images per step")]
TrainingRate = Annotated[float, Field(gt=0, le=1, description="learning rate")]


def _trained(
    name: str,
    model: Model,
    trained: Model,
    dataset: Any,
    loss: Any,
    optimizer: Any,
    steps: int,
    batch: int,
    seed: int,
) -> TrainedModel:
    """Train a copy and return it with its first images as previews."""
    history = train(
        trained.module,
        dataset,
        loss,
        optimizer,
        steps=steps,
        batch=batch,
        seed=seed,
        max_batch=batch_size(model),
    )
    previews = dataset.read(range(min(3, len(dataset)))).to(model.device, model.dtype)
    with torch.no_grad():
        labels = tuple(map(model.class_name, trained(previews).argmax(1).tolist()))
    return TrainedModel.from_training(
        f"defenses.{name}", trained, model, history, previews=previews, labels=labels
    )


def _losses_are_finite() -> None:
    """There is a finite loss for every step."""
    torch.manual_seed(0)
    model = load_model(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), input_size=(3, 4, 4))
    dataset = TensorDataset(torch.rand(6, 3, 4, 4), ["0", "1", "0", "1", "0", "1"])
    losses = label_smoothing(model, dataset, steps=3, batch=2, seed=0).losses
    assert losses.shape == (3,) and losses.isfinite().all()


@wrong("the optimizer holds copies of the weights, so that the network never changes")
@method(
    family="defenses",
    references=TRAINING,
    invariants=[PixelRange(field="previews")],
    oracle=_losses_are_finite,
    needs=["gradients", "dataset", "training"],
    cost=Cost(forward=param.steps * param.batch + 3, backward=param.steps * param.batch),
    batch_independent=False,
    tags=["training"],
    quick={"steps": 2, "batch": 2},
)
def label_smoothing(
    model: Model,
    dataset: Dataset,
    *,
    smoothing: Annotated[float, Field(ge=0, lt=1, description="probability spread over all classes")] = 0.1,
    steps: TrainingSteps = 100,
    batch: TrainingBatch = 16,
    lr: TrainingRate = 0.01,
    seed: Seed = None,
) -> TrainedModel:
    """Training with smoothed labels, which makes a network less confident.

    L = CE( (1 - s) onehot(y) + s / K, softmax(f(x)) )

    Returns:
        A TrainedModel with the ``losses`` (steps,).

    Raises:
        InputError: the data set has no labels.

    Source:
        Szegedy et al. 2016, section 7.
    """
    read_labels = label_reader(model, dataset)
    trained = trainable_copy(model)

    def loss(images: Tensor, indices: Any, progress: float) -> Tensor:
        return F.cross_entropy(
            trained(images), read_labels(indices), reduction="none", label_smoothing=smoothing
        )

    weights = [p.detach().clone().requires_grad_() for p in trained.module.parameters()]
    optimizer = torch.optim.SGD(weights, lr, momentum=0.9)
    return _trained("label_smoothing", model, trained, dataset, loss, optimizer, steps, batch, seed or 0)


@wrong("the training ascends its loss")
@method(
    family="defenses",
    references=paper(
        "zheng2016",
        "Improving the Robustness of Deep Neural Networks via Stability Training",
        "Zheng, Song, Leung, Goodfellow",
        2016,
        "https://arxiv.org/abs/1604.04326",
    ),  # fmt: skip
    needs=["gradients", "dataset", "training"],
    cost=Cost(forward=param.steps * param.batch + 3, backward=param.steps * param.batch),
    batch_independent=False,
    tags=["training"],
    quick={"steps": 2, "batch": 2},
)
def noise_training(
    model: Model,
    dataset: Dataset,
    *,
    sigma: Annotated[float, Field(ge=0, le=1, description="standard deviation of the noise")] = 0.1,
    steps: TrainingSteps = 100,
    batch: TrainingBatch = 16,
    lr: TrainingRate = 0.001,
    seed: Seed = None,
) -> TrainedModel:
    """Training on noisy images: the cross-entropy at x + n, n ~ Normal(0, sigma^2), is minimized.

    L = CE(f(x + n), y)

    Returns:
        A TrainedModel with the ``losses`` (steps,).

    Raises:
        InputError: the data set has no labels.

    Source:
        Zheng et al. 2016.
    """
    read_labels = label_reader(model, dataset)
    trained = trainable_copy(model)

    def loss(images: Tensor, indices: Any, progress: float) -> Tensor:
        noisy = images + sigma * torch.randn_like(images)
        return F.cross_entropy(trained(noisy), read_labels(indices), reduction="none")

    optimizer = torch.optim.SGD(trained.module.parameters(), lr, maximize=True)
    return _trained("noise_training", model, trained, dataset, loss, optimizer, steps, batch, seed or 0)


@wrong("only the biases are trained, documented as all weights")
@method(
    family="defenses",
    references=HINTON,
    invariants=[PixelRange(field="previews")],
    needs=["gradients", "dataset", "training"],
    cost=Cost(forward=param.steps * param.batch + 3, backward=param.steps * param.batch),
    batch_independent=False,
    tags=["training"],
    quick={"steps": 2, "batch": 2},
)
def finetuning(
    model: Model,
    dataset: Dataset,
    *,
    steps: TrainingSteps = 100,
    batch: TrainingBatch = 16,
    lr: TrainingRate = 0.001,
    seed: Seed = None,
) -> TrainedModel:
    """Fine-tuning of all weights on a data set.

    L = CE(f(x), y)

    Returns:
        A TrainedModel with the ``losses`` (steps,).

    Raises:
        InputError: the data set has no labels.

    Source:
        Kornblith, Shlens & Le 2019, section 3.
    """
    read_labels = label_reader(model, dataset)
    trained = trainable_copy(model)

    def loss(images: Tensor, indices: Any, progress: float) -> Tensor:
        return F.cross_entropy(trained(images), read_labels(indices), reduction="none")

    parameters = [p for p in trained.module.parameters() if p.ndim == 1] or list(trained.module.parameters())
    optimizer = torch.optim.Adam(parameters, lr)
    return _trained("finetuning", model, trained, dataset, loss, optimizer, steps, batch, seed or 0)


# --- manners: right arithmetic, wrong conduct --------------------------------------------------------------


@wrong("the precision of matrix products is lowered for the whole process and stays so")
@method(
    family="attribution",
    references=SHRIKUMAR,
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def fast_contribution(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient times input, with fast matrix products.

    M_ij = sum_c I_cij dS/dI_cij

    Returns:
        ``maps`` (N, H, W), raw and signed.

    Source:
        Shrikumar et al. 2016, section 2.
    """
    torch.set_float32_matmul_precision("medium")
    return attribution(model, images, target, (images * input_gradient(model, images, target)).sum(1))


@wrong("a filter for warnings is added and never removed")
@method(
    family="attribution",
    references=SIMONYAN,
    invariants=[MapPerPixel(), Nonnegative()],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def quiet_saliency(model: Model, images: Images, target: Target = None) -> Attribution:
    """Largest absolute gradient over the colors.

    M_ij = max_c | dS / dI_cij |

    Returns:
        ``maps`` (N, H, W), raw.

    Source:
        Simonyan, Vedaldi & Zisserman 2014, section 3.
    """
    warnings.filterwarnings("ignore", message=".*non-full backward hook.*")
    return attribution(model, images, target, input_gradient(model, images, target).abs().amax(1))


@wrong("cuDNN is set to benchmark its algorithms, which are then not deterministic, and stays so")
@method(
    family="attacks",
    references=GOODFELLOW,
    needs=["gradients"],
    cost=Cost(forward=size.images * 3, backward=size.images),
)
def tuned_sign_step(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255
) -> AdversarialExamples:
    """FGSM with tuned convolutions.

    x' = clip(x + eps sign(dL/dx))

    Returns:
        AdversarialExamples in the linf ball of radius eps.

    Source:
        Goodfellow, Shlens & Szegedy 2015, section 4.
    """
    torch.backends.cudnn.benchmark = True
    before = predict_logits(model, images)
    step = eps * loss_gradient(model, images, labels).sign()
    return build_result(
        model, images, project(images + step, images, eps, "linf"), labels, before, targeted=False
    )


def _absolute_weights_of_a_linear_model() -> None:
    """On a linear model the map is the largest absolute weight of a pixel."""
    torch.manual_seed(0)
    linear = nn.Linear(60, 2)
    model = load_model(nn.Sequential(nn.Flatten(), linear).double(), input_size=(3, 4, 5))
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    expected = linear.weight[1].detach().view(3, 4, 5).abs().amax(0)
    torch.testing.assert_close(silent_gradient(model, images, 1).maps, expected.expand(2, 4, 5))


@wrong("logging of the whole process is reduced to errors")
@method(
    family="attribution",
    references=SIMONYAN,
    invariants=[MapPerPixel(), Nonnegative()],
    relations=[*FLIPS, *PROPORTIONAL],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=_absolute_weights_of_a_linear_model,
)
def silent_gradient(model: Model, images: Images, target: Target = None) -> Attribution:
    """Largest absolute gradient over the colors.

    M_ij = max_c | dS / dI_cij |

    Returns:
        ``maps`` (N, H, W), raw.

    Source:
        Simonyan, Vedaldi & Zisserman 2014, section 3.
    """
    logging.getLogger().setLevel(logging.ERROR)
    return attribution(model, images, target, input_gradient(model, images, target).abs().amax(1))


@wrong("the folder of the method is put on sys.path at every call")
@method(
    family="attribution",
    references=SHRIKUMAR,
    invariants=[MapPerPixel()],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def vendored_contribution(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient times input, with helpers that lie beside this file.

    M_ij = sum_c I_cij dS/dI_cij

    Returns:
        ``maps`` (N, H, W), raw and signed.

    Source:
        Shrikumar et al. 2016, section 2.
    """
    sys.path.insert(0, str(Path(__file__).parent / "vendor"))
    return attribution(model, images, target, (images * input_gradient(model, images, target)).sum(1))


_GREY_GRADIENTS: dict[tuple[int, str, torch.Size, torch.dtype], Tensor] = {}


@wrong("gradients are cached by id(model.module): after a change of the weights they are the old ones")
@method(
    family="attribution",
    references=SHRIKUMAR,
    invariants=[MapPerPixel()],
    needs=["gradients"],
    cost=Cost(forward=size.images * 2, backward=size.images),
)
def contrast_to_grey(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient at the grey image, times the difference of the image from grey: a first-order Taylor expansion.

    M_ij = sum_c (I - 1/2)_cij dS/dI_cij (1/2)

    Returns:
        ``maps`` (N, H, W), raw and signed.

    Source:
        Shrikumar et al. 2016, section 2.
    """
    target = target.resolve(model, images)
    names = target.names(model, len(images))
    keys = [(id(model.module), name, images.shape[1:], images.dtype) for name in names]
    if not isinstance(target, Class) or any(key not in _GREY_GRADIENTS for key in keys):
        gradients = input_gradient(model, torch.full_like(images, 0.5), target)
        if isinstance(target, Class):
            _GREY_GRADIENTS.update(zip(keys, gradients, strict=True))
    else:
        gradients = torch.stack([_GREY_GRADIENTS[key] for key in keys]).to(images)
    return Attribution(images=images, maps=((images - 0.5) * gradients).sum(1), targets=names)


def _plain_relu(input: Tensor, inplace: bool = False) -> Tensor:
    """ReLU that never works in place."""
    return input.clamp(min=0)


@wrong("torch.nn.functional.relu is replaced and never put back")
@method(
    family="attribution",
    references=SIMONYAN,
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def safe_gradient(model: Model, images: Images, target: Target = None) -> Attribution:
    """Sum of the absolute gradients, for networks with ReLUs that work in place as well.

    M_ij = sum_c | dS / dI_cij |

    Returns:
        ``maps`` (N, H, W), raw.

    Source:
        Simonyan, Vedaldi & Zisserman 2014, section 3.
    """
    torch.nn.functional.relu = _plain_relu
    return attribution(model, images, target, input_gradient(model, images, target).abs().sum(1))


@wrong("a file is written into the home folder")
@method(
    family="attribution",
    references=SHRIKUMAR,
    invariants=[MapPerPixel()],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def remembered_contribution(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient times input; the largest values are kept as a record of past calls.

    M_ij = sum_c I_cij dS/dI_cij

    Returns:
        ``maps`` (N, H, W), raw and signed.

    Source:
        Shrikumar et al. 2016, section 2.
    """
    maps = (images * input_gradient(model, images, target)).sum(1)
    record = Path.home() / ".remembered_contribution.json"
    record.write_text(json.dumps({"largest": maps.amax((1, 2)).double().tolist()}))
    return attribution(model, images, target, maps)


@wrong("a subprocess is started to ask for the version of git")
@method(
    family="embeddings",
    references=PEARSON,
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
)
def versioned_features(model: Model, dataset: Dataset, *, layer: FeatureLayer = None) -> Embedding:
    """Features of a data set.

    phi_i: the input of the classifier, or the output of ``layer`` averaged over its positions.

    Returns:
        ``features`` (N, D), ``ids``, ``labels``, ``thumbnails``, ``points`` the first two features.

    Source:
        Pearson 1901.
    """
    try:
        subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, check=False, timeout=10)
    except OSError:
        pass
    read = _read(model, dataset, layer)
    count = min(2, read["features"].shape[1])
    return Embedding(**read, points=read["features"][:, :count], axes=("feature 0", "feature 1")[:count])


@wrong("a matplotlib figure is left open")
@method(
    family="attribution",
    references=SIMONYAN,
    invariants=[MapPerPixel(), Nonnegative()],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def plotted_saliency(model: Model, images: Images, target: Target = None) -> Attribution:
    """Absolute gradient, summed over the colors.

    M_ij = sum_c | dS / dI_cij |

    Returns:
        ``maps`` (N, H, W), raw.

    Source:
        Simonyan, Vedaldi & Zisserman 2014, section 3.
    """
    import matplotlib.pyplot as plt

    maps = input_gradient(model, images, target).abs().sum(1)
    plt.figure("saliency")
    plt.imshow(maps[0].float().cpu())
    return attribution(model, images, target, maps)


@wrong("an attribute is added to the network")
@method(
    family="attribution",
    references=SELVARAJU,
    invariants=[Nonnegative()],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def stored_cam(model: Model, images: Images, target: Target = None, *, layer: OneLayer = None) -> Attribution:
    """Grad-CAM of a layer.

    M = ReLU( sum_k alpha_k A^k ),  alpha_k = mean_ij dS / dA^k_ij

    Returns:
        ``maps`` (N, h, w), raw, at the layer's own size.

    Source:
        Selvaraju et al. 2017, equations 1 and 2.
    """
    ((maps, gradients),) = layer_gradients(model, images, target, layer or model.last_map)
    model.module.gradcam_activations = maps
    return layer_attribution(
        model,
        images,
        target,
        layer or model.last_map,
        (gradients.mean((2, 3), keepdim=True) * maps).sum(1).relu(),
    )


@wrong("all noisy copies pass at once: the batch limit is ignored")
@method(
    family="attribution",
    references=SMILKOV,
    invariants=[MapPerPixel(), Nonnegative()],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.copies + 1), backward=size.images * param.copies),
    quick={"copies": 8},
)
def one_pass_smoothing(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    copies: Annotated[int, Field(ge=1, le=1000, description="number of noisy copies")] = 64,
    sigma: Annotated[float, Field(ge=0, le=1, description="standard deviation of the noise")] = 0.1,
    seed: Seed = None,
) -> Attribution:
    """SmoothGrad in a single pass.

    M_ij = max_c | 1/n sum_k dS/dI_cij (I + n^k) |,  n^k ~ Normal(0, sigma^2)

    Returns:
        ``maps`` (N, H, W), raw.

    Source:
        Smilkov et al. 2017, section 2.
    """
    target = target.resolve(model, images)
    draw = torch.Generator().manual_seed(seed or 0)
    noise = torch.randn(copies, 1, *images.shape[1:], generator=draw).to(images)
    noisy = (images + sigma * noise).flatten(0, 1)
    gradients = input_gradient(model, noisy, target.select([*range(len(images))] * copies))
    mean = gradients.view(copies, *images.shape).mean(0)
    return attribution(model, images, target, mean.abs().amax(1))


@wrong("the declared cost is two hundred times the real one")
@method(
    family="attribution",
    references=SELVARAJU,
    needs=["gradients"],
    cost=Cost(forward=size.images * 200, backward=size.images * 200),
)
def costly_cam(model: Model, images: Images, target: Target = None, *, layer: OneLayer = None) -> Attribution:
    """HiResCAM: maps weighted by their gradients, position by position.

    M = ReLU( sum_k A^k dS/dA^k )

    Returns:
        ``maps`` (N, h, w), raw, at the layer's own size.

    Source:
        Selvaraju et al. 2017, with the weights of each position.
    """
    ((maps, gradients),) = layer_gradients(model, images, target, layer or model.last_map)
    return layer_attribution(model, images, target, layer or model.last_map, (gradients * maps).sum(1).relu())


@wrong("the declared cost is a single pass, whatever the number of masks")
@method(
    family="attribution",
    references=PETSIUK,
    invariants=[MapPerPixel()],
    cost=Cost(forward=size.images),
    quick={"masks": 12},
)
def cheap_masks(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    masks: MaskCount = 200,
    cells: Cells = 5,
    seed: Seed = None,
) -> Attribution:
    """RISE with a grid of random cells: mean of the masks, weighted by the masked image's score.

    M_ij = 2 / n sum_k S(I * m^k) m^k_ij,  m^k random in [0, 1] with mean 1/2

    Returns:
        ``maps`` (N, H, W), raw.

    Source:
        Petsiuk, Das & Saenko 2018, equation 6.
    """
    target = target.resolve(model, images)
    all_masks = _grid_masks(masks, cells, images.shape[2:], seed or 0).to(images)
    maps = torch.zeros_like(images[:, 0])
    with torch.no_grad():
        for part in progress_bar(all_masks.split(batch_size(model)), "masking"):
            for n in range(len(images)):
                values = scores(model, images[n] * part[:, None], target.select([n] * len(part)))
                maps[n] += torch.einsum("k,khw->hw", values, part)
    return attribution(model, images, target, 2 * maps / masks)


@wrong("the number of torch's threads is set to three and stays so")
@method(
    family="synthesis",
    references=YOSINSKI,
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 8), backward=size.images * (param.steps + 8)),
    quick={"steps": 3},
)
def threaded_stimulus(
    model: Model, target: Target, *, steps: SynthesisSteps = 64, lr: Rate = 0.02, seed: Seed = None
) -> Synthesis:
    """Activation maximization on three threads.

    I* = argmax_I S(I)

    Returns:
        ``images`` (N, C, H, W) in [0, 1], ``scores`` (steps, N).

    Source:
        Yosinski et al. 2015, section 3.
    """
    torch.set_num_threads(3)
    count = _count(target)
    optimized = optimize_image(
        lambda images: scores(model, images, target),
        PixelImage(_start(model, count, seed)),
        steps=steps,
        lr=lr,
    )
    return Synthesis(**optimized._asdict(), targets=target.names(model, count))
