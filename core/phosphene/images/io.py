"""Pillow images from tensors, and writing PNG, GIF and MP4."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import MissingExtra
from .color import to_display


def to_pil(image: Tensor) -> Image.Image:
    """Image (C, H, W) as an 8-bit RGB Pillow image; see ``to_display`` for other channel counts."""
    levels = (to_display(image).float() * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def data_uri(image: Tensor) -> str:
    """Image (C, H, W) as a ``data:image/png;base64,`` URI, for HTML."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_png(image: Tensor, path: str | os.PathLike[str]) -> None:
    """Write an image (C, H, W) as a PNG file."""
    to_pil(image).save(path, "PNG")


def write_gif(images: Sequence[Tensor], path: str | os.PathLike[str], *, seconds: float = 0.1) -> None:
    """Write images (C, H, W) of one size as a looping GIF with ``seconds`` per image."""
    first, *rest = map(to_pil, images)
    first.save(path, "GIF", save_all=True, append_images=rest, duration=round(1000 * seconds), loop=0)


def write_mp4(images: Sequence[Tensor], path: str | os.PathLike[str], *, seconds: float = 0.1) -> None:
    """Write images (C, H, W) of one size as an H.264 video with ``seconds`` per image.

    H.264 needs even sides: an odd one is padded by repeating the last row or column.

    Raises:
        MissingExtra: imageio and its ffmpeg are not installed.
    """
    if not find_spec("imageio_ffmpeg"):
        raise MissingExtra("writing MP4", "video")
    from imageio.v3 import imwrite

    frames = np.stack([np.asarray(to_pil(image)) for image in images])
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    imwrite(path, frames, extension=".mp4", fps=1 / seconds, codec="libx264", macro_block_size=1)
