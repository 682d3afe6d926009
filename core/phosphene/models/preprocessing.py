"""Image preprocessing for a model: resize, crop and pad, as timm, torchvision and transformers do it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

#: The values of ``crop_mode``, see ``preprocess``.
CROP_MODES = (
    *("center", "center-floor", "squash", "squash-floor", "border", "pad", "resize", "resize-16", "none"),
)


def preprocess(
    image: Image.Image,
    input_size: tuple[int, int, int],
    *,
    crop_pct: float = 1.0,
    crop_mode: str = "center",
    interpolation: str = "bilinear",
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    full_size: tuple[int, int] | None = None,
) -> Tensor:
    """A PIL image as (C, h, w) in [0, 1]; C is 1 (gray) or 3 (RGB).

    Each ``crop_mode`` but the last two returns the input size (C, H, W). With S = (H, W) / ``crop_pct``:

    - ``"center"`` (torchvision, timm): the image, resized to cover S, is cropped at its center.
    - ``"squash"`` (timm, transformers): resized to S without its aspect ratio, cropped at the center.
    - ``"border"`` (timm): resized to fit into S, padded on all sides with ``mean``, cropped at the center.
    - ``"pad"`` (transformers): resized to fit into (H, W), padded at the right and the bottom with ``mean``.
    - ``"resize"`` (segmentation, detection): the shorter side is resized to min(H, W), and the longer one to
      at most max(H, W), where H and W differ. Nothing is cropped. ``"resize-16"`` (YOLOS) rounds both down
      to multiples of 16.
    - ``"none"``: the image at its own size.

    The corner of a crop is rounded to the nearest pixel, with the suffix ``-floor`` down, as transformers
    does. Other sizes are rounded as in the library that has the mode. ``full_size`` (width, height) is the
    size of the image where it was decoded at a fraction of it.
    """
    channels, height, width = input_size
    mode, _, variant = crop_mode.partition("-")
    image = image.convert("L" if channels == 1 else "RGB")
    resized = resized_size(full_size or image.size, input_size, crop_pct=crop_pct, crop_mode=crop_mode)
    if resized != image.size:
        image = image.resize(resized, Image.Resampling[interpolation.upper()])
    pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, channels).permute(2, 0, 1)
    if mode in ("resize", "none"):
        return pixels.contiguous() / 255
    if mode == "pad":
        canvas = torch.tensor(mean)[:, None, None].repeat(1, height, width)
        canvas[:, : image.height, : image.width] = pixels / 255
        return canvas
    # Outside the image, torchvision and transformers crop black pixels, and timm's border has the mean color.
    pixels = _add_border(pixels, (height, width), mean if mode == "border" else [0.0] * channels)
    corners = [(pixels.shape[1] - height) / 2, (pixels.shape[2] - width) / 2]
    top, left = (int(corner) if variant else round(corner) for corner in corners)
    return pixels[:, top : top + height, left : left + width].contiguous() / 255


def resized_size(
    size: tuple[int, int], input_size: tuple[int, int, int], *, crop_pct: float, crop_mode: str
) -> tuple[int, int]:
    """(width, height) that ``preprocess`` resizes an image of this ``size`` (width, height) to."""
    _, height, width = input_size
    mode, _, variant = crop_mode.partition("-")
    target = (int(width / crop_pct + 1e-6), int(height / crop_pct + 1e-6))
    resized = _resized_size(size, (width, height), target, mode)
    return (resized[0] // 16 * 16, resized[1] // 16 * 16) if variant == "16" else resized


def _resized_size(
    size: tuple[int, int], input_size: tuple[int, int], target: tuple[int, int], mode: str
) -> tuple[int, int]:
    """(width, height) that an image of this ``size`` is resized to; all sizes are (width, height)."""
    if mode == "none":
        return size
    if mode == "squash":
        return target
    if mode == "resize":
        return _limited_size(size, min(input_size), max(input_size))
    if mode == "pad":
        scale = max(input_size) / max(size)
        return min(input_size[0], int(size[0] * scale + 0.5)), min(input_size[1], int(size[1] * scale + 0.5))
    ratios = [side / goal for side, goal in zip(size, target, strict=True)]
    if mode == "border":
        return round(size[0] / max(ratios)), round(size[1] / max(ratios))
    if target[0] != target[1]:  # timm rounds the sides to the nearest pixel where the input is no square
        return round(size[0] / min(ratios)), round(size[1] / min(ratios))
    scale = max(target[0] / size[0], target[1] / size[1])
    return int(size[0] * scale + 1e-6), int(size[1] * scale + 1e-6)


def _limited_size(size: tuple[int, int], shorter: int, longer: int) -> tuple[int, int]:
    """The size with this shorter side and, where ``longer`` is greater, at most that longer side."""
    exact = float(shorter)
    if longer > shorter and max(size) / min(size) * shorter > longer:
        exact = longer * min(size) / max(size)
        shorter = round(exact)
    if min(size) == shorter:
        return size
    long_side = int(exact * max(size) / min(size))
    return (shorter, long_side) if size[0] < size[1] else (long_side, shorter)


def _add_border(pixels: Tensor, size: tuple[int, int], mean: Sequence[float]) -> Tensor:
    """Pixels (C, h, w) in [0, 255], centered on a canvas of at least ``size`` (H, W) of this color."""
    channels, *sides = pixels.shape
    if all(side >= least for side, least in zip(sides, size, strict=True)):
        return pixels
    height, width = (max(side, least) for side, least in zip(sides, size, strict=True))
    top, left = (height - sides[0]) // 2, (width - sides[1]) // 2
    color = torch.tensor([round(255 * value) for value in mean], dtype=pixels.dtype)
    canvas = color[:, None, None].repeat(1, height, width)
    canvas[:, top : top + sides[0], left : left + sides[1]] = pixels
    return canvas
