"""Scaling, color maps, overlays and resizing of maps and images for display."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..precision import at_least_float32
from .map_style import chosen_alpha, chosen_cmap


def to_display(image: Tensor) -> Tensor:
    """Image (C, H, W) of any channel count as RGB (3, H, W), clamped to [0, 1] and detached.

    One channel is shown as gray, two as red and green; of more than three the first three are used.

    Raises:
        InputError: another shape, an empty image or NaN.
    """
    if image.ndim != 3 or image.numel() == 0:
        raise InputError(f"an image has shape (C, H, W), not {tuple(image.shape)}")
    if image.isnan().any():
        raise InputError("the image contains NaN, which has no color")
    image = image.detach() if image.is_floating_point() else image.detach().float()
    if len(image) == 1:
        return image.expand(3, -1, -1).clamp(0, 1)
    return F.pad(image, (0, 0, 0, 0, 0, 3 - len(image))).clamp(0, 1)  # negative padding crops channels


def min_max(tensor: Tensor, dims: Sequence[int] = (-2, -1)) -> Tensor:
    """Min-max scaling of every map to [0, 1]: (A - min A) / (max A - min A); a constant map becomes zeros.

    Args:
        dims: dimensions of one map; default: the last two.

    Returns:
        A tensor of the same shape.

    Source:
        Min-max scaling of activation maps (lecture 21.3).
    """
    values = tensor if tensor.is_floating_point() else tensor.float()
    low, high = values.amin(tuple(dims), keepdim=True), values.amax(tuple(dims), keepdim=True)
    span = high - low
    return ((values - low) / torch.where(span > 0, span, 1)).clamp(0, 1)


def symmetric(maps: Tensor) -> Tensor:
    """Scale every signed map (..., H, W) to [0, 1], zero to 1/2: A / (2 max|A|) + 1/2."""
    largest = maps.abs().amax((-2, -1), keepdim=True)
    return maps / torch.where(largest > 0, largest, 1) / 2 + 0.5


def colorize(maps: Tensor, cmap: str = "viridis") -> Tensor:
    """Apply a matplotlib color map to maps in [0, 1]: (..., H, W) -> (..., 3, H, W).

    Values outside [0, 1] are clipped; scale with ``min_max`` or ``symmetric`` first. Inside ``map_style`` its
    color map is used.
    """
    from matplotlib import colormaps  # imported here: reading and writing images does not need it

    colors = colormaps[chosen_cmap(cmap)](maps.detach().float().cpu().numpy())[..., :3]
    return torch.from_numpy(colors).to(maps.device, torch.float32).movedim(-1, -3)


def overlay(image: Tensor, heat: Tensor) -> Tensor:
    """Blend an image in gray with a heat map in colors: (1 - a) gray + a colors, a = min(1, 4 heat) / 2.

    Where the heat is 0 the image is seen as it is. It has no colors of its own: red heat over a teal object
    would be gray, and the same value another color on every object.

    Args:
        image: (3, H, W) in [0, 1], or (1, H, W).
        heat: (h, w) in [0, 1], resized to the image.

    Returns:
        (3, H, W) in [0, 1]. Inside ``map_style`` its color map is used, and its ``alpha`` as a everywhere.
    """
    from torchvision.transforms.functional import rgb_to_grayscale  # imported here, as matplotlib is

    enlarged = F.interpolate(heat[None, None].float(), image.shape[1:], mode="bilinear")[0, 0]
    gray = rgb_to_grayscale(image.detach())
    colors = colorize(enlarged, "turbo").to(image)
    alpha = chosen_alpha()
    opacity = (4 * enlarged).clamp(max=1).to(image) / 2 if alpha is None else alpha
    return gray * (1 - opacity) + colors * opacity


def enlarge(images: Tensor, factor: int) -> Tensor:
    """Nearest-neighbor enlargement: every pixel of (..., H, W) repeated ``factor`` times along both axes."""
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


#: The pixels at which the rows and the columns of a map are centered; see ``unit_centers``.
Centers = tuple[tuple[float, ...], tuple[float, ...]]


def enlarge_maps(maps: Tensor, size: Sequence[int], centers: Centers | None = None) -> Tensor:
    """Maps (N, h, w) at the size (H, W) of their images: linear between the centers of the cells.

    Args:
        centers: the pixels at which the maps' rows and columns are centered, as ``unit_centers`` returns
            them; a map is constant beyond the outermost. Default: cell i of n covers its share of the image,
            with center (i + 1/2) H / n - 1/2, which is torch's bilinear interpolation.

    Returns:
        (N, H, W); the maps themselves where they have one value for each pixel already.

    Raises:
        InputError for centers of a map of another size.
    """
    if centers is not None:
        grid = tuple(map(len, centers))
        if grid != tuple(maps.shape[1:]):
            raise InputError(f"centers of a map of {grid} do not fit maps of {tuple(maps.shape[1:])}")
        if not all(map(_share_the_image, centers, size)):
            for dim, positions in enumerate(centers, 1):
                maps = _interpolate(maps, positions, int(size[dim - 1]), dim)
            return maps
    if maps.shape[1:] == tuple(size):
        return maps
    return F.interpolate(maps[:, None], tuple(size), mode="bilinear")[:, 0]


def _share_the_image(centers: Sequence[float], side: int) -> bool:
    """Whether cells of equal sides that cover the image have these centers."""
    count = len(centers)
    return count == 1 or all(abs(c - ((i + 0.5) * side / count - 0.5)) < 1e-3 for i, c in enumerate(centers))


def _interpolate(maps: Tensor, centers: Sequence[float], side: int, dim: int) -> Tensor:
    """Values at the pixels 0 to side - 1 along a dimension, from those at the centers."""
    positions, cell = torch.tensor(centers, dtype=torch.float64, device="cpu").unique(return_inverse=True)
    if cell.tolist() != [*range(len(cell))]:  # sorted, with the mean of those at one position
        cells = [(cell == number).nonzero()[:, 0].to(maps.device) for number in range(len(positions))]
        maps = torch.stack([maps.index_select(dim, c).mean(dim) for c in cells], dim)
    if len(positions) == 1:
        return maps.repeat_interleave(side, dim)
    pixels = torch.arange(side, dtype=torch.float64, device="cpu")
    above = torch.searchsorted(positions, pixels, right=True).clamp(1, len(positions) - 1)
    fraction = (pixels - positions[above - 1]) / (positions[above] - positions[above - 1])
    weight = fraction.clamp(0, 1).to(maps).view(-1, *[1] * (2 - dim))
    above = above.to(maps.device)
    return torch.lerp(maps.index_select(dim, above - 1), maps.index_select(dim, above), weight)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing of images (..., C, H, W) to (H', W'), antialiased, differentiable, within [0, 1]."""
    batch = images.reshape(-1, *images.shape[-3:])
    resized = F.interpolate(at_least_float32(batch), size, mode="bilinear", antialias=True).clamp(0, 1)
    return resized.to(images.dtype).reshape(*images.shape[:-2], *size)
