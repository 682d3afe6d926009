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

#: The file names (in lower case) that `find_images` takes for pictures.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


#: Beside a picture ``dog.jpg``, ``dog.mask.png`` is no picture but says where its object is.
MASK_SUFFIX = ".mask.png"


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read a picture file, turned the way its EXIF orientation says: (3, H, W), float32 in [0, 1].

    An alpha channel is dropped; 16-bit grey is scaled, not cut off.
    Raises InputError if the file is missing or is not a picture Pillow can read.
    """
    if not isinstance(path, (str, os.PathLike)) or not Path(path).is_file():
        raise InputError(f"There is no picture file at {str(path)!r}.")
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I;16"):  # Pillow's convert would clip it at 255
                picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
            array = np.array(picture.convert("RGB"))
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise InputError(f"Cannot read {str(path)!r} as a picture: {error}.") from error
    return torch.from_numpy(array).permute(2, 0, 1).contiguous() / 255


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Every picture file in a folder and its subfolders, sorted by path; hidden ones and masks left out.

    Raises InputError if there is no such folder or no picture in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"There is no folder at {str(folder)!r}.")
    found = [path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    shown = [path for path in found if not any(p.startswith(".") for p in path.relative_to(root).parts)]
    shown = [path for path in shown if not path.name.endswith(MASK_SUFFIX)]
    if not shown:
        raise InputError(f"The folder {str(folder)!r} holds no pictures ({', '.join(IMAGE_SUFFIXES)}).")
    return sorted(shown)


def to_pil(image: Tensor) -> Image.Image:
    """The picture (C, H, W) as an 8-bit RGB Pillow image; see `to_display` for other channels."""
    levels = (to_display(image).float() * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def data_uri(image: Tensor) -> str:
    """The picture (C, H, W) as a ``data:image/png;base64,`` address, for HTML."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_png(image: Tensor, path: str | os.PathLike[str]) -> None:
    """Write the picture (C, H, W) as a PNG file."""
    to_pil(image).save(path, "PNG")


def write_gif(pictures: Sequence[Tensor], path: str | os.PathLike[str], *, seconds: float = 0.1) -> None:
    """Write pictures (C, H, W) of one size as an animation without end, each shown for so many seconds."""
    first, *rest = map(to_pil, pictures)
    first.save(path, "GIF", save_all=True, append_images=rest, duration=round(1000 * seconds), loop=0)


def write_mp4(pictures: Sequence[Tensor], path: str | os.PathLike[str], *, seconds: float = 0.1) -> None:
    """Write pictures (C, H, W) of one size as an H.264 film, each shown for so many seconds.

    The codec wants even sides: of an odd one the last row or column is shown twice.
    Raises MissingExtra without imageio and its ffmpeg.
    """
    if not find_spec("imageio_ffmpeg"):
        raise MissingExtra("writing MP4", "video")
    from imageio.v3 import imwrite

    frames = np.stack([np.asarray(to_pil(picture)) for picture in pictures])
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    imwrite(path, frames, extension=".mp4", fps=1 / seconds, codec="libx264", macro_block_size=1)
