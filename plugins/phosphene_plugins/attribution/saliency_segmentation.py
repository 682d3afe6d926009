"""Saliency segmentation: GrabCut initialized with a class saliency map."""

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from phosphene import (
    InputError,
    Method,
    MissingExtra,
    Reference,
    hookimpl,
    input_gradient,
    method,
    progress_bar,
)
from phosphene.images import gaussian_blur, min_max, to_display
from phosphene.results import Segmentation
from phosphene.roles import Images, Masks, Model, Seed, Target
from phosphene.spec import Agrees, Cost, Equivariant, MapPerPixel, ScalesWith, ZeroWhen, size
from phosphene.testing import linear_model

from ._references import SIMONYAN_2014

#: GrabCut models the colors of foreground and background by five Gaussians, each of at least one pixel.
_MIN_SEED_PIXELS = 5


def segments_the_discs_that_a_model_weights() -> None:
    """For a linear model with weights around the center of a red disc on green the mask is the disc.

    On noise it is OpenCV's GrabCut of the same seeds; with few seeds it is the pixels fixed as object.
    """
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(40.0), indexing="ij")
    distances = torch.stack([torch.hypot(y - 15.1, x - 18.25), torch.hypot(y - 17.1, x - 25.25)])
    discs = distances < torch.tensor([9, 7])[:, None, None]
    noise = torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    colors = torch.tensor([[0.8, 0.2, 0.1], [0.0, 0.6, 0.0]])[..., None, None]
    images = torch.where(discs[:, None], colors[0], colors[1]) + 0.1 * noise
    weights = 1 / (1 + distances)
    model = linear_model(weights[:, None] * torch.tensor([1, 0.5, -2])[:, None, None])
    true = discs & (x < 25)
    result = saliency_segmentation(model, images, [0, 1], true, smooth=0, seed=0)
    torch.testing.assert_close(result.maps, 2 * weights)
    assert torch.equal(result.masks, discs)
    torch.testing.assert_close(result.iou, true.sum((1, 2)) / discs.sum((1, 2)))
    assert result.targets == ("class 0", "class 1")
    result = saliency_segmentation(model, images, [0, 1], seed=2**31)
    torch.testing.assert_close(result.maps, gaussian_blur(2 * weights[:, None], 1)[:, 0])
    assert torch.equal(result.masks, discs) and result.iou is None

    for fixed in (5, 4, 1):  # fewer than 5 pixels have no color model
        nearest = distances.flatten(1).argsort(1).argsort(1).view(2, 32, 40) < fixed
        result = saliency_segmentation(
            model, images, [0, 1], nearest, foreground=(fixed - 0.5) / 1279, smooth=0, seed=0
        )
        assert torch.equal(result.masks, discs if fixed == 5 else nearest)
        torch.testing.assert_close(result.iou, fixed / result.masks.sum((1, 2)))
    result = saliency_segmentation(model, images, [0, 1], foreground=0.0, background=0.0)
    assert not result.masks.any()

    noise = torch.rand(3, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    image, _, weight = min_max(gaussian_blur(noise, 2), (1, 2, 3))
    result = saliency_segmentation(
        linear_model(weight[None]), image[None], 0,
        foreground=199.5 / 1279, background=299.5 / 1279, smooth=0, iterations=2, seed=3,
    )  # fmt: skip
    assert torch.equal(result.masks[0], _grab_cut(image, weight.amax(0), 200, 300, seed=3))


def _grab_cut(image: Tensor, saliency: Tensor, objects: int, background: int, seed: int) -> Tensor:
    """OpenCV's mask after two iterations; labels are 0 and 1 for fixed pixels, 2 and 3 for likely ones."""
    import cv2

    ranks = saliency.flatten().argsort().argsort().view(saliency.shape)
    count = ranks.numel()
    labels = torch.where(ranks >= count // 2, 3, 2)
    labels[ranks >= count - objects], labels[ranks < background] = 1, 0
    labels_of_cv = labels.byte().numpy()
    cv2.setRNGSeed(seed)
    pixels = np.ascontiguousarray((255 * image).round().byte().permute(1, 2, 0).numpy())
    cv2.grabCut(pixels, labels_of_cv, None, None, None, 2, cv2.GC_INIT_WITH_MASK)
    return torch.from_numpy(labels_of_cv % 2 == 1)


@method(
    family="attribution",
    references=[
        SIMONYAN_2014,
        Reference(
            key="rother2004",
            title="GrabCut: Interactive Foreground Extraction using Iterated Graph Cuts",
            authors="Rother, Kolmogorov, Blake",
            year=2004,
            url="https://doi.org/10.1145/1015706.1015720",
        ),
    ],
    invariants=[MapPerPixel(), MapPerPixel(field="masks")],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=segments_the_discs_that_a_model_weights,
    relations=[
        Agrees("attribution.saliency", where={"smooth": 0}),
        Equivariant("hflip", fields=("maps",)),
        Equivariant("transpose", fields=("maps",)),
        ScalesWith("logits", power=1, fields=("maps",)),
        ZeroWhen("constant"),
    ],
    quick={"iterations": 1},
    demo={"background": 0.5, "smooth": 4.0},
)
def saliency_segmentation(
    model: Model,
    images: Images,
    target: Target = None,
    masks: Masks = None,
    *,
    foreground: Annotated[
        float, Field(ge=0, le=1, description="fraction of pixels, the most salient, fixed as object")
    ] = 0.05,
    background: Annotated[
        float, Field(ge=0, le=1, description="fraction of pixels, the least salient, fixed as background")
    ] = 0.3,
    smooth: Annotated[
        float | None,
        Field(
            ge=0,
            le=100,
            description="standard deviation of the map's blur in pixels; default: 1/32 of the shorter side",
        ),
    ] = None,
    iterations: Annotated[int, Field(ge=1, le=100, description="iterations of GrabCut")] = 5,
    seed: Seed = None,
) -> Segmentation:
    """Saliency segmentation: object masks from GrabCut initialized with a class saliency map.

    M_ij = max_c | dS / dI_cij |,  object where M > its (1 - foreground)-quantile,  background where
    M < its background-quantile

    GrabCut assigns the pixels between the quantiles by their colors, starting from those above the map's
    median as object. Where fewer pixels are fixed than its color models need, as in a constant map, GrabCut
    is not run and the mask is the pixels fixed as object.

    Returns:
        ``maps`` (N, H, W), the blurred saliency; ``masks`` (N, H, W) bool; ``iou`` (N,), the intersection
        over union with the true ``masks`` where these are passed.

    Raises:
        InputError where foreground and background overlap, MissingExtra without OpenCV.

    Example::
        from phosphene import run

        result = run("saliency_segmentation", images="builtin:scenes/2", iterations=1)
        result.masks.shape  # (2, 64, 64)

    Source:
        Simonyan et al. 2014, section 3.2; Rother et al. 2004.
    """
    if foreground + background > 1:
        raise InputError(f"foreground={foreground} and background={background} overlap: at most 1 together")
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise MissingExtra("saliency_segmentation", "segmentation") from error

    saliency = input_gradient(model, images, target).abs().amax(1)
    sigma = min(images.shape[2:]) / 32 if smooth is None else smooth
    maps = gaussian_blur(saliency[:, None], sigma)[:, 0].contiguous()
    segments = []
    for image, heat in progress_bar(list(zip(images, maps, strict=True)), "segmenting"):
        is_object, is_background = _seeds(heat, foreground, background)
        if min(int(is_object.sum()), int(is_background.sum())) < _MIN_SEED_PIXELS:
            segments.append(is_object)
            continue
        labels = np.where(_numpy(heat > heat.median()), cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
        labels[_numpy(is_object)], labels[_numpy(is_background)] = cv2.GC_FGD, cv2.GC_BGD
        pixels = np.ascontiguousarray(_numpy((to_display(image) * 255).round().byte().permute(1, 2, 0)))
        cv2.setRNGSeed((seed or 0) % 2**31)
        cv2.grabCut(pixels, labels, None, None, None, iterations, cv2.GC_INIT_WITH_MASK)
        segment = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
        segments.append(torch.from_numpy(segment).to(images.device))
    predicted = torch.stack(segments)
    return Segmentation(
        images=images,
        maps=maps,
        masks=predicted,
        targets=target.names(model, len(images)),
        iou=None if masks is None else _iou(predicted, masks),
    )


def _iou(predicted: Tensor, true: Tensor) -> Tensor:
    """Intersection over union of masks (N, H, W): (N,), 0 for two empty masks."""
    return (predicted & true).sum((1, 2)) / (predicted | true).sum((1, 2)).clamp(min=1)


def _seeds(saliency: Tensor, foreground: float, background: float) -> tuple[Tensor, Tensor]:
    """The pixels fixed as object and those fixed as background, (H, W) bool each."""
    values = saliency.flatten().cpu().double()
    bounds = torch.tensor([background, 1 - foreground], dtype=torch.float64)
    low, high = torch.quantile(values, bounds)
    return saliency > high, saliency < low


def _numpy(tensor: Tensor) -> Any:
    return tensor.cpu().numpy()


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [saliency_segmentation]
