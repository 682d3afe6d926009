"""Saliency segmentation: GrabCut told by the saliency map where the object is."""

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    InputError,
    Method,
    MissingExtra,
    Reference,
    hookimpl,
    input_gradient,
    load_model,
    method,
    progress_bar,
)
from phosphene.images import gaussian_blur, to_display
from phosphene.results import Segmentation
from phosphene.roles import Images, Masks, Model, Seed, Target
from phosphene.spec import Cost, MapPerPixel, size

#: GrabCut models the colours of either side by five Gaussians, each of at least one pixel.
_FEWEST = 5


def a_disc_is_found_by_the_pixels_that_matter() -> None:
    """A model that looks at a few pixels of a red disc on green: the mask is the disc."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    distance = torch.hypot(y - 15, x - 18)
    disc = distance < 9
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.1
    image = (torch.tensor([0.8, 0.2, 0.1])[:, None, None] * disc + noise)[None]
    image[:, 1] += 0.6 * ~disc
    linear = nn.Linear(3 * 32 * 32, 1)
    linear.weight.data = (1 / (1 + distance)).expand(3, -1, -1).reshape(1, -1).clone()
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(3, 32, 32))
    result = saliency_segmentation(model, image, 0, disc[None], smooth=0, seed=0)
    assert torch.equal(result.masks[0], disc)
    assert result.iou is not None and float(result.iou) == 1


@method(
    family="attribution",
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
    oracle=a_disc_is_found_by_the_pixels_that_matter,
    quick={"iterations": 1},
)
def saliency_segmentation(
    model: Model,
    images: Images,
    target: Target = None,
    masks: Masks = None,
    *,
    foreground: Annotated[
        float, Field(ge=0, le=1, description="share of the most salient pixels that are surely the object")
    ] = 0.05,
    background: Annotated[
        float, Field(ge=0, le=1, description="share of the least salient ones that are surely not")
    ] = 0.3,
    smooth: Annotated[
        float | None,
        Field(ge=0, le=100, description="sigma of the map's blur in pixels; 1/32 of the picture"),
    ] = None,
    iterations: Annotated[int, Field(ge=1, le=100, description="rounds of GrabCut")] = 5,
    seed: Seed = None,
) -> Segmentation:
    """Cut the object out: GrabCut, told by the saliency map where it is and where it is not.

    M_ij = max_c | dS / dI_cij |,  object where M > its (1 - foreground)-quantile,  background where
    M < its background-quantile,  what lies between is GrabCut's to decide by colour
    (at first it counts as the object where M is above its median)

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, H, W), the blurred saliency, and ``masks`` (N, H, W)
    bool. Given the true ``masks``, ``iou`` (N,) is the intersection over union with them. Where a map has
    no such pixels, as a constant one, or fewer than GrabCut's colour models need, the mask is the surest
    pixels alone. Raises InputError where foreground and background overlap, MissingExtra without OpenCV.

    Source: Simonyan et al. 2014, section 3.2; Rother et al. 2004.
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
    found = []
    for image, heat in progress_bar(list(zip(images, maps, strict=True)), "cutting out"):
        surely, never = _seeds(heat, foreground, background)
        if min(int(surely.sum()), int(never.sum())) < _FEWEST:
            found.append(surely)
            continue
        marks = np.where(_numpy(heat > heat.median()), cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
        marks[_numpy(surely)], marks[_numpy(never)] = cv2.GC_FGD, cv2.GC_BGD
        picture = np.ascontiguousarray(_numpy((to_display(image) * 255).round().byte().permute(1, 2, 0)))
        cv2.setRNGSeed((seed or 0) % 2**31)
        cv2.grabCut(picture, marks, None, None, None, iterations, cv2.GC_INIT_WITH_MASK)
        found.append(torch.from_numpy((marks == cv2.GC_FGD) | (marks == cv2.GC_PR_FGD)).to(images.device))
    cut = torch.stack(found)
    return Segmentation(
        images=images,
        maps=maps,
        masks=cut,
        targets=target.names(model, len(images)),
        iou=None if masks is None else (cut & masks).sum((1, 2)) / (cut | masks).sum((1, 2)).clamp(min=1),
    )


def _seeds(saliency: Tensor, foreground: float, background: float) -> tuple[Tensor, Tensor]:
    """The pixels that are surely the object's and the ones that surely are not."""
    values = saliency.flatten().double()
    bounds = torch.tensor([background, 1 - foreground], dtype=torch.float64, device=values.device)
    low, high = torch.quantile(values, bounds)
    return saliency > high, saliency < low


def _numpy(tensor: Tensor) -> Any:
    return tensor.cpu().numpy()


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [saliency_segmentation]
