"""Methods without a defect, by an author who had not read the conformance kit."""

from dataclasses import dataclass
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
    InputError,
    Method,
    ModelError,
    batch_size,
    input_gradient,
    layer_gradients,
    load_model,
    method,
    progress_bar,
    resumable_batches,
    scores,
)
from phosphene.attacks import (
    build_result,
    is_adversarial,
    not_adversarial,
    per_image,
    predict_logits,
    project,
    random_point,
    steepest,
)
from phosphene.images import gaussian_blur, min_max, noise_images, resize, to_display
from phosphene.optimize import PixelImage, optimize_image
from phosphene.results import (
    ActivationMaps,
    AdversarialExamples,
    Attribution,
    Embedding,
    Panel,
    Result,
    Synthesis,
)
from phosphene.roles import Dataset, Images, Labels, Model, Seed, Target, Texture
from phosphene.spec import (
    Agrees,
    Cost,
    Equivariant,
    InvariantTo,
    LinearIn,
    MapPerPixel,
    Monotone,
    Nonnegative,
    PixelRange,
    SameShape,
    ScalesWith,
    UnitRange,
    WithinBall,
    ZeroWhen,
    ceil,
    param,
    size,
)
from phosphene.training import TrainedModel, label_reader, train, trainable_copy

RIGHT: list[Method[Any, Any]] = []


def right(registered: Method[Any, Any]) -> Method[Any, Any]:
    """Add a method to the list."""
    RIGHT.append(registered)
    return registered


Steps = Annotated[int, Field(ge=1, le=1000, description="number of steps")]


# --- attribution -------------------------------------------------------------------------------------------


@right
@method(
    family="attribution",
    references=ZEILER,
    invariants=[MapPerPixel()],
    cost=Cost(forward=size.images * (2 + ceil(size.height / param.stride) * ceil(size.width / param.stride))),
    exempt={
        "equivariant": "the windows start in the upper left corner and their stride need not divide the side"
    },
    quick={"window": 11, "stride": 7},
)
def strided_occlusion(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    window: Annotated[int, Field(ge=1, le=512, description="side of the window in pixels")] = 9,
    stride: Annotated[int, Field(ge=1, le=512, description="pixels between windows; at most the window")] = 5,
) -> Attribution:
    """Occlusion by overlapping windows whose stride need not divide the image.

    M_ij = mean over the windows p that cover (i, j) of  S(x) - S(x with p grey)

    Windows start every ``stride`` pixels from the upper left corner and are cut at the border.

    Returns:
        ``maps`` (N, H, W), raw: positive where occlusion lowers the score.

    Raises:
        InputError: the stride is longer than the window.

    Source:
        Zeiler & Fergus 2014, section 4.2.
    """
    if stride > window:
        raise InputError(f"stride={stride} would skip pixels: it can be at most the window, {window}")
    target = target.resolve(model, images)
    height, width = images.shape[2:]
    places = [
        (slice(top, top + window), slice(left, left + window))
        for top in range(0, height, stride)
        for left in range(0, width, stride)
    ]
    total, cover = torch.zeros_like(images[:, 0]), torch.zeros_like(images[0, 0])
    for rows, columns in places:
        cover[rows, columns] += 1
    limit = batch_size(model)
    with torch.no_grad():
        clean = scores(model, images, target)
        parts = [(n, start) for n in range(len(images)) for start in range(0, len(places), limit)]
        for n, start in progress_bar(parts, "occluding"):
            part = places[start : start + limit]
            batch = images[n].repeat(len(part), 1, 1, 1)
            for row, (rows, columns) in enumerate(part):
                batch[row, :, rows, columns] = 0.5
            drops = clean[n] - scores(model, batch, target.select([n] * len(part)))
            for drop, (rows, columns) in zip(drops, part, strict=True):
                total[n, rows, columns] += drop
    return attribution(model, images, target, total / cover)


@right
@method(
    family="attribution",
    references=paper(
        "petsiuk2018",
        "RISE: Randomized Input Sampling for Explanation of Black-box Models",
        "Petsiuk, Das, Saenko",
        2018,
        "https://arxiv.org/abs/1806.07421",
    ),  # fmt: skip
    cost=Cost(forward=size.images * (param.masks + 1)),
    quick={"masks": 60},
)
def visible_mean(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    masks: Annotated[int, Field(ge=2, le=100_000, description="number of random masks")] = 500,
    cells: Annotated[int, Field(ge=2, le=32, description="cells of a mask in a row and in a column")] = 6,
    seed: Seed = None,
) -> Attribution:
    """Mean score of the randomly masked images in which a pixel is visible (RISE, normalized per pixel).

    M_ij = sum_k S(I * m^k) m^k_ij / sum_k m^k_ij,  m^k random cells of 0 and 1, enlarged bilinearly

    Where a pixel is never visible the map is the mean score of all masks.

    Returns:
        ``maps`` (N, H, W), in units of the score.

    Source:
        Petsiuk, Das & Saenko 2018, section 3.1.
    """
    target = target.resolve(model, images)
    draw = torch.Generator().manual_seed(seed or 0)
    grid = (torch.rand(masks, 1, cells, cells, generator=draw) < 0.5).float()
    everywhere = F.interpolate(grid, size=tuple(images.shape[2:]), mode="bilinear", align_corners=False)
    everywhere = everywhere[:, 0].clamp(0, 1).to(images)
    values = images.new_zeros(len(images), masks)
    limit = batch_size(model)
    with torch.no_grad():
        for start in progress_bar(range(0, masks, limit), "masking"):
            part = everywhere[start : start + limit]
            for n in range(len(images)):
                masked = images[n] * part[:, None]
                values[n, start : start + limit] = scores(model, masked, target.select([n] * len(part)))
    mean = values.double().mean(1)[:, None, None]
    weighted = torch.einsum("nk,khw->nhw", values.double() - mean[:, 0], everywhere.double())
    maps = mean + weighted / everywhere.double().sum(0).clamp(min=1e-6)
    return attribution(model, images, target, maps.to(images))


@right
@method(
    family="attribution",
    references=paper(
        "xu2020",
        "Attribution in Scale and Space",
        "Xu, Venugopalan, Sundararajan",
        2020,
        "https://arxiv.org/abs/2004.03383",
    ),  # fmt: skip
    invariants=[MapPerPixel()],
    relations=[LinearIn("target"), *FLIPS, *PROPORTIONAL, ZeroWhen("constant")],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 1), backward=size.images * param.steps),
    quick={"steps": 5},
)
def blur_integrated_gradients(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    steps: Annotated[int, Field(ge=1, le=1000, description="number of blurs on the path")] = 24,
    sigma: Annotated[
        float, Field(gt=0, le=16, description="largest standard deviation of the blur, in pixels")
    ] = 6.0,
) -> Attribution:
    """Blur integrated gradients: the score's change while a blurred image becomes sharp.

    M_ij = sum_k sum_c (x_k+1 - x_k)_cij dS/dI_cij ((x_k + x_k+1) / 2),  x_k blurred by sigma (1 - k/n)

    Returns:
        ``maps`` (N, H, W), raw and signed; they sum to S(x) - S(x blurred), up to the sum's error.

    Source:
        Xu, Venugopalan & Sundararajan 2020, equation 4.
    """
    target = target.resolve(model, images)
    maps, before = torch.zeros_like(images), gaussian_blur(images, sigma)
    for step in progress_bar(range(1, steps + 1), "sharpening"):
        after = gaussian_blur(images, sigma * (1 - step / steps)) if step < steps else images
        maps += (after - before) * input_gradient(model, (before + after) / 2, target)
        before = after
    return attribution(model, images, target, maps.sum(1))


@right
@method(
    family="attribution",
    references=paper(
        "ribeiro2016",
        "'Why Should I Trust You?': Explaining the Predictions of Any Classifier",
        "Ribeiro, Singh, Guestrin",
        2016,
        "https://arxiv.org/abs/1602.04938",
    ),  # fmt: skip
    invariants=[MapPerPixel()],
    relations=[LinearIn("target"), *PROPORTIONAL],
    cost=Cost(forward=size.images * (param.samples + 1)),
    quick={"samples": 80, "cells": 4},
)
def square_regression(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    samples: Annotated[int, Field(ge=2, le=100_000, description="number of random images")] = 300,
    cells: Annotated[int, Field(ge=2, le=16, description="squares in a row and in a column")] = 6,
    ridge: Annotated[float, Field(gt=0, le=100, description="penalty of the regression")] = 1.0,
    seed: Seed = None,
) -> Attribution:
    """LIME on a grid of squares: a ridge regression of the score on which squares are visible.

    M = argmin_b sum_k (S(x with the hidden squares in its mean color) - b_0 - b . z_k)^2 + ridge ||b||^2

    Each z_k has ones with probability 1/2; all images get the same.

    Returns:
        ``maps`` (N, H, W): the coefficient of each pixel's square.

    Source:
        Ribeiro, Singh & Guestrin 2016, section 3.4, with equal weights.
    """
    target = target.resolve(model, images)
    height, width = images.shape[2:]
    rows, columns = (torch.arange(side, device=images.device) * cells // side for side in (height, width))
    owner = rows[:, None] * cells + columns
    draw = torch.Generator().manual_seed(seed or 0)
    visible = torch.randint(0, 2, (samples, cells * cells), generator=draw).to(images)
    hidden = images.mean((2, 3), keepdim=True)
    values = images.new_zeros(samples, len(images))
    limit = batch_size(model)
    with torch.no_grad():
        for start in progress_bar(range(0, samples, limit), "hiding squares"):
            masks = visible[start : start + limit][:, owner][:, None]
            for n in range(len(images)):
                batch = hidden[n] + masks * (images[n] - hidden[n])
                values[start : start + limit, n] = scores(model, batch, target.select([n] * len(masks)))
    z, y = visible.double(), values.double()
    z, y = z - z.mean(0), y - y.mean(0)
    identity = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    coefficients = torch.linalg.solve(z.T @ z + ridge * identity, z.T @ y).to(images)
    return attribution(model, images, target, coefficients.T[:, owner])


@right
@method(
    family="attribution",
    references=SIMONYAN,
    invariants=[MapPerPixel(), Nonnegative()],
    relations=[*FLIPS, *PROPORTIONAL, InvariantTo("batch_order")],
    needs=["gradients"],
    cost=Cost(forward=size.images * 5, backward=size.images * 4),
)
def mirrored_saliency(model: Model, images: Images, target: Target = None) -> Attribution:
    """Absolute gradient, averaged over the image and its three mirror images.

    M = 1/4 sum_T T^-1( sum_c | dS / dI_c (T x) | ),  T the identity and the flips

    Returns:
        ``maps`` (N, H, W), raw.

    Source:
        Simonyan, Vedaldi & Zisserman 2014, section 3; the average over augmentations is common practice.
    """
    target = target.resolve(model, images)
    maps = torch.zeros_like(images[:, 0])
    for axes in progress_bar([(), (-1,), (-2,), (-2, -1)], "mirroring"):
        gradient = input_gradient(model, images.flip(axes), target)
        maps += gradient.abs().sum(1).flip(axes) / 4
    return attribution(model, images, target, maps)


def _gradient_times_pixels_of_a_linear_model() -> None:
    """On a linear model the map is the weights times the pixels; it sums to the score without the bias."""
    draw = torch.Generator().manual_seed(3)
    std = torch.tensor([0.2, 0.25, 0.5], dtype=torch.float64)
    weights = torch.randn(2, 3, 4, 5, generator=draw, dtype=torch.float64)
    linear = nn.Linear(60, 2, dtype=torch.float64)
    linear.weight.data = (weights * std[:, None, None]).flatten(1)
    network = nn.Sequential(nn.Flatten(), linear)
    model = load_model(network, input_size=(3, 4, 5), mean=[0.4, 0.5, 0.6], std=std.tolist())
    images = torch.rand(2, 3, 4, 5, generator=draw, dtype=torch.float64)
    for index in (0, 1):
        maps = slope_times_pixel(model, images, index).maps
        torch.testing.assert_close(maps, (weights[index] * images).sum(1))


@right
@method(
    family="attribution",
    references=SHRIKUMAR,
    invariants=[MapPerPixel()],
    relations=[
        LinearIn("target"),
        *FLIPS,
        Equivariant("shift"),
        *PROPORTIONAL,
        ScalesWith("images", power=1),
        ZeroWhen("ignored"),
        ZeroWhen("constant"),
        Agrees("attribution.gradient_x_input"),
    ],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=_gradient_times_pixels_of_a_linear_model,
)
def slope_times_pixel(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient times input, summed over the colors.

    M_ij = sum_c I_cij dS/dI_cij

    Returns:
        ``maps`` (N, H, W), raw and signed.

    Source:
        Shrikumar et al. 2016, section 2.
    """
    return attribution(model, images, target, (images * input_gradient(model, images, target)).sum(1))


@right
@method(
    family="attribution",
    references=paper(
        "selvaraju2017",
        "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
        "Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra",
        2017,
        "https://arxiv.org/abs/1610.02391",
    ),  # fmt: skip
    invariants=[Nonnegative()],
    relations=[
        Equivariant("hflip"),
        Equivariant("transpose"),
        ScalesWith("logits", power=2),
        InvariantTo("logit_shift"),
    ],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def squared_gradient_cam(
    model: Model, images: Images, target: Target = None, *, layer: OneLayer = None
) -> Attribution:
    """Grad-CAM with mean squared gradients as weights: channels count by how much, not by which way.

    M = ReLU( sum_k alpha_k A^k ),  alpha_k = mean_ij (dS / dA^k_ij)^2

    Unlike Grad-CAM's, the weights are never negative, so evidence against the target is shown as well.

    Returns:
        ``maps`` (N, h, w), raw, at the layer's own size.

    Source:
        Selvaraju et al. 2017, equations 1 and 2, with squared gradients.
    """
    ((maps, gradients),) = layer_gradients(model, images, target, layer or model.last_map)
    alpha = gradients.square().mean((2, 3), keepdim=True)
    return layer_attribution(model, images, target, layer or model.last_map, (alpha * maps).sum(1).relu())


@right
@method(
    family="attribution",
    references=SIMONYAN,
    invariants=[MapPerPixel(), UnitRange()],
    relations=[*FLIPS, ScalesWith("logits", power=0), InvariantTo("logit_shift"), ZeroWhen("constant")],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def scaled_saliency(model: Model, images: Images, target: Target = None) -> Attribution:
    """Largest absolute gradient over the colors, scaled to [0, 1] in each image.

    M = (G - min G) / (max G - min G),  G_ij = max_c | dS / dI_cij |

    Returns:
        ``maps`` (N, H, W) in [0, 1]; a constant G becomes zeros.

    Source:
        Simonyan, Vedaldi & Zisserman 2014, section 3.
    """
    return attribution(model, images, target, min_max(input_gradient(model, images, target).abs().amax(1)))


# --- activations -------------------------------------------------------------------------------------------


@right
@method(
    family="activations",
    references=paper(
        "caron2021",
        "Emerging Properties in Self-Supervised Vision Transformers",
        "Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin",
        2021,
        "https://arxiv.org/abs/2104.14294",
    ),  # fmt: skip
    invariants=[Nonnegative(), UnitRange(field="scaled")],
    cost=Cost(forward=size.images),
)
def received_attention(model: Model, images: Images) -> ActivationMaps:
    """How much attention each patch receives in a transformer's last attention layer, by head.

    A_hj = mean over the tokens i of softmax(Q_h K_h^T / sqrt(d))_ij

    For transformers only, whose patch tokens form the same grid in the last attention layer.

    Returns:
        ``maps`` (N, heads, h, w): a map for each head; ``scaled`` the same in [0, 1].

    Raises:
        ModelError: the network has no attention, or its tokens are no grid of square patches.

    Source:
        Caron et al. 2021, figure 3, with the mean over all queries.
    """
    layers = model.for_images(images).attention_layers
    by_layer = {n: maps for n, maps in model.attention(images).items() if layers[n].windows == 1}
    if not by_layer:
        raise ModelError("the network computes attention inside windows only")
    layer, attention = list(by_layer.items())[-1]
    received = attention.detach().mean(2)
    tokens, (height, width) = received.shape[2], images.shape[2:]
    grids = [
        (height // side, width // side)
        for side in range(1, min(height, width) + 1)
        if height % side == 0 and width % side == 0 and 0 <= tokens - (height // side) * (width // side) <= 5
    ]
    if not grids:
        raise ModelError(f"the {tokens} tokens of {layer} are no grid of square patches of the image")
    rows, columns = max(grids)
    maps = received[:, :, tokens - rows * columns :].unflatten(2, (rows, columns))
    return ActivationMaps(
        images=images, maps=maps, scaled=min_max(maps), channels=tuple(range(maps.shape[1])), layer=layer
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class ChannelActivity(Result):
    """``activity`` (N, C): the mean activation of each of a layer's C channels in each of N images."""

    layer: str
    images: Tensor
    activity: Tensor

    def panels(self) -> list[list[Panel]]:
        """Each image beside the bars of its channels."""
        heights = torch.linspace(1, 0, 32)[:, None]
        bars = self.activity.detach().float().cpu().abs()
        bars = bars / bars.amax(1, keepdim=True).clamp(min=1e-12)
        return [
            [Panel(image), Panel((heights < row)[None].float(), self.layer, is_output=True)]
            for image, row in zip(self.images, bars, strict=True)
        ]


@right
@method(family="activations", references=ZEILER, cost=Cost(forward=size.images))
def channel_activity(model: Model, images: Images, *, layer: OneLayer = None) -> ChannelActivity:
    """Mean activation of each channel of a layer, for each image.

    a_nc = mean_ij A^c_ij (x_n)

    Returns:
        ``activity`` (N, C).

    Raises:
        ModelError for a layer without maps.

    Source:
        Zeiler & Fergus 2014, section 4.
    """
    name = layer or model.last_map
    features = model.features(images, name)
    maps = features[:, :, None, None] if features.ndim == 2 else model.maps(features, images)
    return ChannelActivity(layer=name, images=images, activity=maps.mean((2, 3)).detach())


@dataclass(frozen=True, eq=False, kw_only=True)
class ChannelMeans(Result):
    """``means`` (C,): the mean of a layer's channels over a data set; ``count`` how many values each is of."""

    layer: str
    means: Tensor
    count: int

    def panels(self) -> list[list[Panel]]:
        """Bars of the absolute means."""
        bars = self.means.detach().float().cpu().abs()
        heights = torch.linspace(1, 0, 32)[:, None]
        return [[Panel((heights < bars / bars.max().clamp(min=1e-12))[None].float(), self.layer)]]


@right
@method(
    family="activations",
    references=paper(
        "hu2016",
        "Network Trimming: A Data-Driven Neuron Pruning Approach",
        "Hu, Peng, Tai, Tang",
        2016,
        "https://arxiv.org/abs/1607.03250",
    ),  # fmt: skip
    relations=[InvariantTo("dataset_order", fields=("means",))],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
)
def channel_means(model: Model, dataset: Dataset, *, layer: OneLayer = None) -> ChannelMeans:
    """Mean of each channel of a layer over all images and positions of a data set.

    mean_c = 1/M sum A_c,  M images times positions

    Returns:
        ``means`` (C,).

    Source:
        Hu et al. 2016, section 3.
    """
    name = layer or model.last_map
    state: dict[str, Any] = {"count": 0}
    for batch in resumable_batches(dataset, batch_size(model), state, "channel means"):
        images = batch.images.to(model.device, model.dtype)
        features = model.features(images, name)
        maps = features[:, :, None] if features.ndim == 2 else model.maps(features, images).flatten(2)
        total = maps.detach().double().sum((0, 2)).cpu()
        state["sum"] = state["sum"] + total if "sum" in state else total
        state["count"] = state["count"] + maps.shape[0] * maps.shape[2]
    means = (state["sum"] / state["count"]).to(model.device, model.dtype)
    return ChannelMeans(layer=name, means=means, count=state["count"])


@dataclass(frozen=True, eq=False, kw_only=True)
class ColorHistograms(Result):
    """``histograms`` (N, C, bins): the share of an image's pixels in each bin of each channel."""

    images: Tensor
    histograms: Tensor

    def panels(self) -> list[list[Panel]]:
        """Each image beside the bars of its channels."""
        heights = torch.linspace(1, 0, 32)[:, None]
        rows = []
        for image, bars in zip(self.images, self.histograms.float().cpu(), strict=True):
            panel = (heights[None] < (bars / bars.max().clamp(min=1e-12))[:, None]).float()
            rows.append([Panel(image), Panel(panel, "histogram", is_output=True)])
        return rows


@right
@method(
    family="embeddings",
    references=paper(
        "swain1991", "Color indexing", "Swain, Ballard", 1991, "https://doi.org/10.1007/BF00130487"
    ),
    invariants=[UnitRange(field="histograms")],
)
def color_histogram(
    images: Images, *, bins: Annotated[int, Field(ge=1, le=256, description="number of bins")] = 16
) -> ColorHistograms:
    """Histogram of each color of an image, without a model.

    h_cb = share of the pixels with  b <= bins I_cij < b + 1;  white is in the last bin

    Returns:
        ``histograms`` (N, C, bins), which sum to one over the bins.

    Source:
        Swain & Ballard 1991, section 2, with a histogram for each channel.
    """
    numbers = (images.double() * bins).floor().clamp(0, bins - 1).long().flatten(2)
    counts = torch.zeros(*numbers.shape[:2], bins, dtype=torch.float64, device=images.device)
    counts.scatter_add_(2, numbers, torch.ones_like(numbers, dtype=torch.float64))
    return ColorHistograms(images=images, histograms=(counts / numbers.shape[2]).to(images))


# --- embeddings and tables ---------------------------------------------------------------------------------


def _read(model: Model, dataset: Any, layer: str | None) -> dict[str, Any]:
    """Features, thumbnails, ids and labels of a data set, in its order."""
    state: dict[str, Any] = {"labels": []}
    for batch in resumable_batches(dataset, batch_size(model), state, "features"):
        images = batch.images.to(model.device, model.dtype)
        if layer is None:
            features = model.embed(images)
        else:
            features = model.features(images, layer)
            features = model.maps(features, images).mean((2, 3)) if features.ndim > 2 else features
        side = min(32, *images.shape[2:])
        small = torch.stack(
            [
                (to_display(image) * 255).round().to(torch.uint8)
                for image in resize(images.float(), (side, side))
            ]
        )
        for name, values in (("features", features.detach()), ("thumbnails", small)):
            state[name] = torch.cat([state[name], values]) if name in state else values
        state["labels"] = [*state["labels"], *(dataset.labels(batch.indices) or ())]
    return {
        "ids": tuple(dataset.id(i) for i in range(len(dataset))),
        "features": state["features"],
        "thumbnails": state["thumbnails"],
        "labels": tuple(state["labels"]) or None,
    }


@right
@method(
    family="embeddings",
    references=paper(
        "park2009",
        "A simple and fast algorithm for K-medoids clustering",
        "Park, Jun",
        2009,
        "https://doi.org/10.1016/j.eswa.2008.01.039",
    ),  # fmt: skip
    invariants=[Nonnegative(field="center_distances")],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    quick={"k": 2},
)
def medoids(
    model: Model,
    dataset: Dataset,
    *,
    k: Annotated[int, Field(ge=1, le=1000, description="number of clusters, at most one for each image")] = 4,
    layer: FeatureLayer = None,
) -> Embedding:
    """k-medoids: clusters around images of the data set, by alternation from distant images.

    min over m in the data set of sum_i min_c ||phi_i - m_c||_2

    The first medoid is the image nearest to all others, each further one the image farthest from the
    medoids so far; then assignments and medoids alternate until nothing changes.

    Returns:
        ``clusters`` (N,), ``center_distances`` (N,) to the medoid, ``points`` (N, 1 or 2): the distances to
        the first two medoids.

    Raises:
        InputError: more clusters than images.

    Source:
        Park & Jun 2009, with another start.
    """
    if k > len(dataset):
        raise InputError(f"{len(dataset)} images make at most {len(dataset)} clusters, not {k}")
    read = _read(model, dataset, layer)
    features = read["features"].double()
    table = (features[:, None] - features[None]).norm(dim=2)
    chosen = [int(table.sum(0).argmin())]
    while len(chosen) < k:
        nearest = table[:, chosen].amin(1)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    for _ in range(100):
        clusters = table[:, chosen].argmin(1)
        clusters[chosen] = torch.arange(k, device=clusters.device)
        moved = []
        for cluster in range(k):
            members = (clusters == cluster).nonzero()[:, 0]
            moved.append(int(members[table[members][:, members].sum(0).argmin()]))
        if moved == chosen:
            break
        chosen = moved
    clusters = table[:, chosen].argmin(1)
    clusters[chosen] = torch.arange(k, device=clusters.device)
    rows = torch.arange(len(features), device=clusters.device)
    axes = ("distance to medoid 0", "distance to medoid 1")[: min(2, k)]
    return Embedding(
        **read,
        points=table[:, chosen[:2]].to(read["features"]),
        axes=axes,
        clusters=clusters,
        center_distances=table[rows, torch.tensor(chosen, device=clusters.device)[clusters]].to(
            read["features"]
        ),
        layout="clusters",
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class ConfusionTable(Result):
    """``counts`` (K, K): rows are the true classes, columns the predicted ones. ``accuracy``: a scalar."""

    classes: tuple[str, ...]
    counts: Tensor
    accuracy: Tensor

    def panels(self) -> list[list[Panel]]:
        """The table as an image."""
        counts = self.counts.float().cpu()
        return [[Panel((counts / counts.max().clamp(min=1))[None], f"accuracy {float(self.accuracy):.2f}")]]


@right
@method(
    family="scores",
    references=paper(
        "sokolova2009",
        "A systematic analysis of performance measures for classification tasks",
        "Sokolova, Lapalme",
        2009,
        "https://doi.org/10.1016/j.ipm.2009.03.002",
    ),  # fmt: skip
    invariants=[Nonnegative(field="counts"), UnitRange(field="accuracy")],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
)
def confusion_table(model: Model, dataset: Dataset) -> ConfusionTable:
    """Confusion table of a data set: how often class i is predicted as class j.

    counts_ij = number of images of class i that are predicted as j,  accuracy = sum_i counts_ii / N

    Returns:
        ``counts`` (K, K) of the model's ``classes``, ``accuracy``.

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
        table.index_add_(0, true * count + predicted, torch.ones_like(true))
        state["counts"] = state["counts"] + table.view(count, count)
    counts = state["counts"].to(model.device)
    accuracy = (counts.diagonal().sum() / counts.sum().clamp(min=1)).to(model.dtype)
    classes = tuple(model.class_name(i) for i in range(count))
    return ConfusionTable(classes=classes, counts=counts, accuracy=accuracy)


# --- attacks -----------------------------------------------------------------------------------------------


def _judged(
    model: Model,
    images: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    before: Tensor,
    after: Tensor,
    queries: Tensor,
) -> AdversarialExamples:
    """A result from logits that are known already, so that no further query is needed."""
    classes = before.argmax(1), after.argmax(1)
    names = [tuple(map(model.class_name, c.tolist())) for c in classes]
    return AdversarialExamples(
        images=images,
        adversarial=adversarial,
        labels=labels,
        before=classes[0],
        after=classes[1],
        confidence_before=before.softmax(1).amax(1),
        confidence_after=after.softmax(1).amax(1),
        success=classes[1] != labels,
        names_before=names[0],
        names_after=names[1],
        queries=queries,
    )


@right
@method(
    family="attacks",
    references=paper(
        "brendel2018",
        "Decision-Based Adversarial Attacks: Reliable Attacks Against Black-Box Machine Learning Models",
        "Brendel, Rauber, Bethge",
        2018,
        "https://arxiv.org/abs/1712.04248",
    ),  # fmt: skip
    invariants=IN_RANGE,
    cost=Cost(forward=size.images * (1 + param.tries + param.halvings)),
    tags=["black-box"],
    quick={"tries": 8, "halvings": 6},
)
def noise_bisection(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    tries: Annotated[int, Field(ge=1, le=1000, description="random images that are tried as a start")] = 50,
    halvings: Annotated[int, Field(ge=1, le=12, description="halvings of the line to the start")] = 10,
    seed: Seed = None,
) -> AdversarialExamples:
    """Decision-based attack: from a random image of another class along the line to the original.

    x' = x + t (z - x) with the smallest t of a bisection for which the predicted class is not the label

    z is the first of ``tries`` images of random blocks that the model does not assign to the label. Only
    predicted classes are used. Without such a z the image is returned unchanged.

    Returns:
        AdversarialExamples with ``queries`` (N,), how many images the model was evaluated on.

    Source:
        Brendel, Rauber & Bethge 2018, section 2, the initialization and the step towards the original.
    """
    before = predict_logits(model, images)
    after, adversarial = before.clone(), images.clone()
    queries = torch.ones_like(labels)
    draw = torch.Generator().manual_seed(seed or 0)
    far = images.clone()
    searching = not_adversarial(before, labels, False)
    selected = searching[:0]
    for _ in progress_bar(range(tries), "searching a start"):
        blocks = torch.rand(1, images.shape[1], 4, 4, generator=draw)
        noise = F.interpolate(blocks, size=tuple(images.shape[2:])).to(images)
        if not len(searching):
            continue
        logits = predict_logits(model, noise.expand(len(searching), -1, -1, -1).contiguous())
        queries[searching] += 1
        hit = is_adversarial(logits, labels[searching], False)
        new, searching = searching[hit], searching[~hit]
        far[new], after[new] = noise, logits[hit]
        selected = torch.cat([selected, new])
    low, high = images.new_zeros(len(selected)), images.new_ones(len(selected))
    adversarial[selected] = far[selected]
    for _ in progress_bar(range(halvings if len(selected) else 0), "bisection"):
        middle = (low + high) / 2
        points = (images[selected] + per_image(middle) * (far[selected] - images[selected])).clamp(0, 1)
        logits = predict_logits(model, points)
        queries[selected] += 1
        fools = is_adversarial(logits, labels[selected], False)
        low, high = torch.where(fools, low, middle), torch.where(fools, middle, high)
        adversarial[selected[fools]], after[selected[fools]] = points[fools], logits[fools]
    return _judged(model, images, adversarial, labels, before, after, queries)


@right
@method(
    family="attacks",
    references=paper(
        "kurakin2017",
        "Adversarial examples in the physical world",
        "Kurakin, Goodfellow, Bengio",
        2017,
        "https://arxiv.org/abs/1607.02533",
    ),  # fmt: skip
    invariants=IN_RANGE,
    needs=["gradients"],
    cost=Cost(forward=size.images * (2 * param.steps + 2), backward=size.images * param.steps),
    quick={"steps": 3},
)
def first_success(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Eps = 8 / 255,
    step_size: StepSize = 1 / 255,
    steps: Steps = 20,
    targeted: Annotated[bool, Field(description="whether labels are the classes to reach")] = False,
) -> AdversarialExamples:
    """Basic iterative method that stops for each image as soon as it is adversarial.

    x <- clip(P(x + step_size sign(dL/dx))),  targeted: x - step_size sign(dL/dx)

    Returns:
        AdversarialExamples in the linf ball of radius eps: the first successful point, else the last.

    Source:
        Kurakin, Goodfellow & Bengio 2017, section 2.2.
    """
    before = predict_logits(model, images)
    active = not_adversarial(before, labels, targeted)
    x = images.clone()
    sign = -1.0 if targeted else 1.0
    for _ in progress_bar(range(steps), "attacking"):
        if not len(active):
            break
        gradient = loss_gradient(model, x[active], labels[active])
        x[active] = project(x[active] + sign * step_size * gradient.sign(), images[active], eps, "linf")
        logits = predict_logits(model, x[active])
        active = active[~is_adversarial(logits, labels[active], targeted)]
    return build_result(model, images, x, labels, before, targeted=targeted)


@right
@method(
    family="attacks",
    references=MADRY,
    invariants=[WithinBall(radius="eps", norm="norm"), *IN_RANGE],
    relations=[
        Monotone("eps", values=(0.05, 0.2, 0.8), measure="distance", where={"norm": "l2", "step_size": 0.5}),
    ],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 2), backward=size.images * param.steps),
    quick={"steps": 3},
)
def euclidean_ascent(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Annotated[float, Field(gt=0, le=100, description="radius of the ball, for pixels in [0, 1]")] = 0.5,
    step_size: Annotated[float, Field(gt=0, le=100, description="length of one step")] = 0.2,
    steps: Steps = 10,
    norm: Annotated[Literal["l2", "linf"], Field(description="norm of the ball")] = "l2",
    seed: Seed = None,
) -> AdversarialExamples:
    """Projected gradient ascent in an l2 ball, from a random point.

    x <- clip(P(x + step_size g / ||g||_2)),  g = dL/dx; in "linf" the step is step_size sign(g)

    Returns:
        AdversarialExamples inside the ball.

    Source:
        Madry et al. 2018, section 2.1.
    """
    before = predict_logits(model, images)
    x = random_point(images, eps, norm, torch.Generator().manual_seed(seed or 0))
    for _ in progress_bar(range(steps), "attacking"):
        x = project(x + step_size * steepest(loss_gradient(model, x, labels), norm), images, eps, norm)
    return build_result(model, images, x, labels, before, targeted=False)


def _corner_of_a_linear_model() -> None:
    """On a linear model of two classes the step is to the corner away from the label's weights."""
    draw = torch.Generator().manual_seed(5)
    linear = nn.Linear(60, 2, dtype=torch.float64)
    linear.weight.data = torch.randn(2, 60, generator=draw, dtype=torch.float64)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(3, 4, 5))
    images = torch.rand(3, 3, 4, 5, generator=draw, dtype=torch.float64)
    labels = model(images).argmax(1)
    normal = (linear.weight[1 - labels] - linear.weight[labels]).detach().view_as(images)
    result = gradient_sign(model, images, labels, eps=0.05)
    torch.testing.assert_close(result.adversarial, (images + 0.05 * normal.sign()).clamp(0, 1))


@right
@method(
    family="attacks",
    references=GOODFELLOW,
    invariants=IN_RANGE,
    relations=[Equivariant("hflip", fields=("adversarial",))],
    needs=["gradients"],
    cost=Cost(forward=size.images * 3, backward=size.images),
    oracle=_corner_of_a_linear_model,
)
def gradient_sign(model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255) -> AdversarialExamples:
    """Fast gradient sign method: one step to a corner of the linf ball.

    x' = clip(x + eps sign(dL/dx))

    Returns:
        AdversarialExamples in the linf ball of radius eps.

    Source:
        Goodfellow, Shlens & Szegedy 2015, section 4.
    """
    before = predict_logits(model, images)
    step = eps * loss_gradient(model, images, labels).sign()
    return build_result(
        model, images, project(images + step, images, eps, "linf"), labels, before, targeted=False
    )


@right
@method(
    family="attacks",
    references=paper(
        "su2019",
        "One Pixel Attack for Fooling Deep Neural Networks",
        "Su, Vargas, Sakurai",
        2019,
        "https://arxiv.org/abs/1710.08864",
    ),  # fmt: skip
    cost=Cost(forward=size.images * param.max_queries),
    tags=["black-box"],
    quick={"max_queries": 12},
)
def few_pixels(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    pixels: Annotated[int, Field(ge=1, le=100, description="largest number of changed pixels")] = 5,
    max_queries: Annotated[int, Field(ge=2, le=100_000, description="largest number of queries")] = 300,
    seed: Seed = None,
) -> AdversarialExamples:
    """Few-pixel attack by random search: some pixels get random colors where that lowers the label's logit margin.

    x' = x with at most ``pixels`` pixels replaced,  accepted where  f_y - max_k!=y f_k  falls

    In each step one of the pixels, in turn, gets another position and color, black or white in each channel;
    all images get the same proposals. An image is left alone from its first success on.

    Returns:
        AdversarialExamples with ``queries`` (N,), the image itself included.

    Source:
        Su, Vargas & Sakurai 2019, with random search instead of differential evolution.
    """

    def margins(logits: Tensor, classes: Tensor) -> Tensor:
        own = logits.gather(1, classes[:, None])[:, 0]
        rest = logits.scatter(1, classes[:, None], -torch.inf).amax(1)
        return own - rest

    before = predict_logits(model, images)
    after, margin = before.clone(), margins(before, labels)
    queries = torch.ones_like(labels)
    count, channels, height, width = images.shape
    places = torch.zeros(count, pixels, dtype=torch.int64, device=images.device)
    colors = images.flatten(2)[:, :, :1].transpose(1, 2).repeat(1, pixels, 1)
    draw = torch.Generator().manual_seed(seed or 0)
    active = not_adversarial(before, labels, False)

    def drawn(rows: Tensor, places: Tensor, colors: Tensor) -> Tensor:
        points = images[rows].flatten(2).clone()
        for slot in range(pixels):
            index = places[:, slot, None, None].expand(-1, channels, 1)
            points.scatter_(2, index, colors[:, slot, :, None])
        return points.view(len(rows), channels, height, width)

    for step in progress_bar(range(max_queries - 1), "searching"):
        place = int(torch.randint(0, height * width, (), generator=draw))
        color = torch.randint(0, 2, (channels,), generator=draw).to(images)
        if not len(active):
            continue
        new_places, new_colors = places[active].clone(), colors[active].clone()
        new_places[:, step % pixels], new_colors[:, step % pixels] = place, color
        logits = predict_logits(model, drawn(active, new_places, new_colors))
        queries[active] += 1
        new_margin = margins(logits, labels[active])
        better = new_margin < margin[active]
        rows = active[better]
        places[rows], colors[rows] = new_places[better], new_colors[better]
        margin[rows], after[rows] = new_margin[better], logits[better]
        active = active[~is_adversarial(after[active], labels[active], False)]
    changed = drawn(torch.arange(count, device=images.device), places, colors)
    return _judged(model, images, changed, labels, before, after, queries)


# --- synthesis and textures --------------------------------------------------------------------------------


@right
@method(
    family="synthesis",
    references=paper(
        "mahendran2015",
        "Understanding Deep Image Representations by Inverting Them",
        "Mahendran, Vedaldi",
        2015,
        "https://arxiv.org/abs/1412.0035",
    ),  # fmt: skip
    invariants=[PixelRange(), SameShape()],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 9), backward=size.images * (param.steps + 8)),
    quick={"steps": 4},
)
def quick_inversion(
    model: Model,
    images: Images,
    *,
    layer: OneLayer = None,
    steps: Steps = 20,
    lr: Annotated[float, Field(gt=0, le=10, description="learning rate")] = 0.03,
    seed: Seed = None,
) -> Synthesis:
    """Feature inversion in few steps: an image whose features at a layer are those of the input.

    x* = argmin_x ||Phi(x) - Phi(x_0)||^2 / ||Phi(x_0)||^2,  by Adam from grey noise

    Returns:
        ``images`` (N, C, H, W) in [0, 1], ``scores`` (steps, N) the relative distance, ``sources`` the inputs.

    Raises:
        DivergenceError: the gradient is zero at the start.

    Source:
        Mahendran & Vedaldi 2015, equation 1, without a prior.
    """
    name = layer or model.last_map
    with torch.no_grad():
        reference = model.features(images, name).flatten(1)
    scale = reference.square().sum(1)
    scale = torch.where(scale > 0, scale, 1)
    start = noise_images((1, *images.shape[1:]), seed=seed, mean=0.5, sd=0.05).to(images)
    selected = optimize_image(
        lambda x: (model.features(x, name).flatten(1) - reference).square().sum(1) / scale,
        PixelImage(start.repeat(len(images), 1, 1, 1)),
        steps=steps,
        lr=lr,
        maximize=False,
    )
    return Synthesis(**selected._asdict(), targets=(name,) * len(images), sources=images)


@right
@method(
    family="textures",
    references=paper(
        "efros2001",
        "Image Quilting for Texture Synthesis and Transfer",
        "Efros, Freeman",
        2001,
        "https://doi.org/10.1145/383259.383296",
    ),  # fmt: skip
    invariants=[PixelRange()],
    quick={"side": 32, "patch": 8},
)
def shuffled_patches(
    sample: Texture,
    *,
    side: Annotated[int, Field(ge=4, le=1024, description="height and width of the texture")] = 64,
    patch: Annotated[
        int, Field(ge=1, le=256, description="side of a patch; at most the sample's shorter side")
    ] = 12,
    seed: Seed = None,
) -> Synthesis:
    """Texture of random patches of a sample, side by side: the baseline of image quilting.

    x[block b] = sample[window at a uniformly random position],  cut at the border

    All samples use the same positions.

    Returns:
        ``images`` (N, C, side, side) in [0, 1], ``scores`` (0, N), ``sources`` the samples.

    Source:
        Efros & Freeman 2001, figure 2 (a).
    """
    height, width = sample.shape[2:]
    patch = min(patch, height, width)
    draw = torch.Generator().manual_seed(seed or 0)
    images = sample.new_zeros(*sample.shape[:2], side, side)
    for top in range(0, side, patch):
        for left in range(0, side, patch):
            y = int(torch.randint(0, height - patch + 1, (), generator=draw))
            x = int(torch.randint(0, width - patch + 1, (), generator=draw))
            rows, columns = min(patch, side - top), min(patch, side - left)
            images[:, :, top : top + rows, left : left + columns] = sample[
                :, :, y : y + rows, x : x + columns
            ]
    return Synthesis(
        images=images,
        scores=sample.new_zeros(0, len(sample)),
        targets=("texture",) * len(sample),
        sources=sample,
    )


# --- training ----------------------------------------------------------------------------------------------


@right
@method(
    family="defenses",
    references=paper(
        "zhang2018mixup",
        "mixup: Beyond Empirical Risk Minimization",
        "Zhang, Cisse, Dauphin, Lopez-Paz",
        2018,
        "https://arxiv.org/abs/1710.09412",
    ),  # fmt: skip
    invariants=[PixelRange(field="previews")],
    needs=["gradients", "dataset", "training"],
    cost=Cost(forward=param.steps * param.batch + 3, backward=param.steps * param.batch),
    batch_independent=False,
    tags=["training"],
    quick={"steps": 3, "batch": 2},
)
def brief_training(
    model: Model,
    dataset: Dataset,
    *,
    steps: Annotated[int, Field(ge=1, le=100_000, description="number of optimizer steps")] = 30,
    batch: Annotated[int, Field(ge=1, le=1024, description="images per step")] = 16,
    lr: Annotated[float, Field(gt=0, le=1, description="learning rate")] = 0.005,
    weight_decay: Annotated[float, Field(ge=0, le=1, description="weight decay")] = 0.0,
    seed: Seed = None,
) -> TrainedModel:
    """A few steps of training of all weights on a data set, by gradient descent without momentum.

    theta <- theta - lr dL/dtheta,  L = mean CE(f(x), y) over a batch

    Returns:
        A TrainedModel with the ``losses`` (steps,) and the first images as ``previews``.

    Raises:
        InputError: the data set has no labels.
        DivergenceError: the loss is not finite.

    Source:
        Zhang et al. 2018, equation 1, without mixing.
    """
    read_labels = label_reader(model, dataset)
    trained = trainable_copy(model)

    def loss(images: Tensor, indices: Any, progress: float) -> Tensor:
        return F.cross_entropy(trained(images), read_labels(indices), reduction="none")

    optimizer = torch.optim.SGD(trained.module.parameters(), lr, weight_decay=weight_decay)
    history = train(
        trained.module,
        dataset,
        loss,
        optimizer,
        steps=steps,
        batch=batch,
        seed=seed or 0,
        max_batch=batch_size(model),
    )
    previews = dataset.read(range(min(3, len(dataset)))).to(model.device, model.dtype)
    with torch.no_grad():
        labels = tuple(map(model.class_name, trained(previews).argmax(1).tolist()))
    return TrainedModel.from_training(
        "defenses.brief_training", trained, model, history, previews=previews, labels=labels
    )
