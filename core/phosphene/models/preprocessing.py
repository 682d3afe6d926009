"""Image preprocessing for a model: resize and center crop, as timm and torchvision do it."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def resize_and_crop(
    image: Image.Image, input_size: tuple[int, int, int], *, crop_pct: float, interpolation: str
) -> Tensor:
    """A PIL image as (C, H, W) in [0, 1], the center of the resized image; C is 1 (gray) or 3 (RGB).

    The image is resized so that it covers (H, W) / ``crop_pct``. Sizes are rounded as in torchvision and
    timm: sides down, the crop's corner to the nearest pixel.
    """
    channels, height, width = input_size
    image = image.convert("L" if channels == 1 else "RGB")
    target = [int(side / crop_pct + 1e-6) for side in (width, height)]
    scale = max(target[0] / image.width, target[1] / image.height)
    resized = (max(width, int(image.width * scale + 1e-6)), max(height, int(image.height * scale + 1e-6)))
    if resized != image.size:
        image = image.resize(resized, Image.Resampling[interpolation.upper()])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.array(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels).view(height, width, channels).permute(2, 0, 1).contiguous() / 255
