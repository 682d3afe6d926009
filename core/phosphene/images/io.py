"""Reading images from files and writing PNG, GIF and MP4."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import InputError, MissingExtra
from .color import to_display

#: Suffixes (in lower case) of the files that ``find_images`` returns.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


#: ``dog.mask.png`` is the object mask of the image ``dog.jpg``, not an image.
MASK_SUFFIX = ".mask.png"


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read an image file as RGB (3, H, W), float32 in [0, 1], with its EXIF orientation applied.

    An alpha channel is dropped; 16-bit grey is scaled to 8 bits, not clipped.

    Raises:
        InputError: a missing file, or one that Pillow cannot read.
    """
    if not isinstance(path, (str, os.PathLike)) or not Path(path).is_file():
        raise InputError(f"there is no image file at {str(path)!r}")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):  # Image.convert would clip it at 255
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            array = np.array(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise any exception on a damaged file
        raise InputError(f"{str(path)!r} cannot be read as an image: {error}") from error
    return torch.from_numpy(array).permute(2, 0, 1).contiguous() / 255


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Image files in a folder and its subfolders, sorted by path, without hidden files and masks.

    Raises:
        InputError: a missing folder, or one without images.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"there is no folder at {str(folder)!r}")
    files = [path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    visible = [path for path in files if not any(p.startswith(".") for p in path.relative_to(root).parts)]
    images = [path for path in visible if not path.name.endswith(MASK_SUFFIX)]
    if not images:
        raise InputError(f"the folder {str(folder)!r} contains no images ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(images)


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
