"""Colour maps, overlays and resizing of maps and images for display."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError


def to_display(image: Tensor) -> Tensor:
    """Any (C, H, W) as an RGB picture (3, H, W) in [0, 1], detached.

    One channel shows as grey, two as red and green, more than three by their first three; values
    are clamped. Raises InputError for another shape, an empty image or NaN.
    """
    if image.ndim != 3 or image.numel() == 0:
        raise InputError(f"One picture is (C, H, W), got {tuple(image.shape)}.")
    if image.isnan().any():
        raise InputError("The picture holds NaN, which has no colour.")
    image = image.detach() if image.is_floating_point() else image.detach().float()
    if len(image) == 1:
        return image.expand(3, -1, -1).clamp(0, 1)
    return F.pad(image, (0, 0, 0, 0, 0, 3 - len(image))).clamp(0, 1)  # a negative padding cuts off


def min_max(tensor: Tensor, dims: Sequence[int] = (-2, -1)) -> Tensor:
    """Scale every map to [0, 1]: (A - min A) / (max A - min A), and a constant map to zeros.

    dims: the dimensions that make up one map, (H, W) unless told. Returns the shape that came in.
    Source: the min-max scaling of activation maps, lecture 21.3.
    """
    values = tensor if tensor.is_floating_point() else tensor.float()
    low, high = values.amin(tuple(dims), keepdim=True), values.amax(tuple(dims), keepdim=True)
    span = high - low
    return ((values - low) / torch.where(span > 0, span, 1)).clamp(0, 1)


def symmetric(maps: Tensor) -> Tensor:
    """Scale every signed map (..., H, W) to [0, 1] with zero in the middle: A / (2 max|A|) + 1/2."""
    largest = maps.abs().amax((-2, -1), keepdim=True)
    return maps / torch.where(largest > 0, largest, 1) / 2 + 0.5


def colorize(maps: Tensor, cmap: str = "viridis") -> Tensor:
    """Show maps in [0, 1] by one of matplotlib's colour maps: (..., H, W) -> (..., 3, H, W).

    What lies outside is clipped; `min_max` and `symmetric` bring any real values there.
    """
    from matplotlib import colormaps  # imported late: reading and writing pictures does not need it

    colours = colormaps[cmap](maps.detach().float().cpu().numpy())[..., :3]
    return torch.from_numpy(colours).to(maps.device, torch.float32).movedim(-1, -3)


def overlay(image: Tensor, heat: Tensor) -> Tensor:
    """Lay a map (h, w) in [0, 1], enlarged bilinearly, over a picture: (image + colorize(heat)) / 2."""
    enlarged = F.interpolate(heat[None, None].float(), image.shape[1:], mode="bilinear")[0, 0]
    return (image.detach() + colorize(enlarged, "turbo").to(image)) / 2


def enlarge(images: Tensor, factor: int) -> Tensor:
    """Every pixel of (..., H, W) so many times in a row and a column, so that it can be seen."""
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (..., C, H, W) to (H', W') bilinearly with antialiasing; differentiable, within [0, 1]."""
    batch = images.reshape(-1, *images.shape[-3:])
    resized = F.interpolate(batch, size, mode="bilinear", antialias=True).clamp(0, 1)
    return resized.reshape(*images.shape[:-2], *size)
