"""Pictures in and out: reading, writing, colour maps, overlays, grids.

Images are float tensors, RGB, in [0, 1]: (3, H, W), (1, H, W) for grey, (N, 3, H, W) for many.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .errors import InputError, UnknownName

#: The file names (in lower case) that `find_images` takes for pictures.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read a picture file, turned the way its EXIF orientation says: (3, H, W), float32 in [0, 1].

    An alpha channel is dropped; 16-bit grey is scaled, not cut off.
    Raises InputError if the file is missing or is not a picture Pillow can read.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"a picture is read from a file's path, not from a {type(path).__name__}")
    if not Path(path).is_file():
        raise InputError(f"There is no picture file at {os.fspath(path)!r}.")
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I;16"):  # Pillow's convert would clip it at 255
                picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
            array = np.array(picture.convert("RGB"))
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise InputError(f"Cannot read {os.fspath(path)!r} as a picture: {error}.") from error
    return torch.from_numpy(array).permute(2, 0, 1).contiguous() / 255


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Every picture file in a folder and its subfolders, sorted by path; hidden ones left out.

    Raises InputError if there is no such folder or no picture in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"There is no folder at {os.fspath(folder)!r}.")
    found = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    )
    if not found:
        raise InputError(f"The folder {os.fspath(folder)!r} holds no pictures ({', '.join(IMAGE_SUFFIXES)}).")
    return found


def to_display(image: Tensor) -> Tensor:
    """Any (C, H, W) as an RGB picture (3, H, W) in [0, 1], detached.

    One channel shows as grey, two as red and green, more than three by their first three; values
    are clamped. Raises InputError for another shape, an empty image or NaN.
    """
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or image.numel() == 0:
        raise InputError(f"One picture is (C, H, W), got {tuple(image.shape)}; `grid` shows many.")
    image = image.detach() if image.is_floating_point() else image.float()
    if image.isnan().any():
        raise InputError("The picture holds NaN, which has no colour.")
    if image.shape[0] == 1:
        image = image.expand(3, -1, -1)
    elif image.shape[0] == 2:
        image = torch.cat([image, torch.zeros_like(image[:1])])
    return image[:3].clamp(0, 1)


def to_pil(image: Tensor) -> Image.Image:
    """The picture (C, H, W) as an 8-bit RGB Pillow image; see `to_display` for other channels."""
    levels = (to_display(image).float() * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def png_bytes(image: Tensor) -> bytes:
    """The picture (C, H, W) as the bytes of a PNG file."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG")
    return buffer.getvalue()


def data_uri(image: Tensor) -> str:
    """The picture (C, H, W) as a ``data:image/png;base64,`` address, for HTML."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")


def write_png(image: Tensor, path: str | os.PathLike[str]) -> None:
    """Write the picture (C, H, W) as a PNG file."""
    Path(path).write_bytes(png_bytes(image))


def min_max(tensor: Tensor, dims: Sequence[int] = (-2, -1)) -> Tensor:
    """Scale every map to [0, 1]: (A - min A) / (max A - min A), and a constant map to zeros.

    dims: the dimensions that make up one map, (H, W) unless told. Returns the shape that came in.
    Source: the min-max scaling of activation maps, lecture 21.3.
    """
    values = tensor if tensor.is_floating_point() else tensor.float()
    low, high = values.amin(tuple(dims), keepdim=True), values.amax(tuple(dims), keepdim=True)
    span = high - low
    return ((values - low) / torch.where(span > 0, span, 1)).clamp(0, 1)


@lru_cache(maxsize=32)
def _lookup_table(cmap: str) -> Tensor:
    import matplotlib  # imported late: reading and writing pictures does not need it

    if cmap not in matplotlib.colormaps:
        raise UnknownName("colour map", cmap, list(matplotlib.colormaps), "matplotlib")
    table = matplotlib.colormaps[cmap]
    return torch.from_numpy(table(np.arange(table.N))[:, :3]).float()


def colorize(
    maps: Tensor,
    *,
    cmap: str | None = None,
    symmetric: bool = False,
    limits: tuple[float, float] | None = None,
) -> Tensor:
    """Show maps of any real values in colour: (H, W) -> (3, H, W), (N, H, W) -> (N, 3, H, W).

    Each map runs over the whole colour map from its own minimum to its maximum; ``limits`` sets
    the two ends for all maps instead, clipping what lies outside. ``symmetric=True``, for signed
    maps, runs from -max|A| to max|A| of each map, so that zero is the middle colour.
    cmap: a matplotlib name; "viridis" unless told, "RdBu_r" if symmetric.
    Raises InputError for another shape, NaN or empty limits, UnknownName for no such colour map.
    """
    if maps.ndim not in (2, 3) or maps.numel() == 0:
        raise InputError(f"Maps are (H, W) or (N, H, W), got {tuple(maps.shape)}.")
    if maps.isnan().any():
        raise InputError("The map holds NaN, which has no colour.")
    if limits is not None and (symmetric or not limits[0] < limits[1]):
        raise InputError(f"limits={limits} must be (low, high), low < high, without symmetric.")
    table = _lookup_table(cmap or ("RdBu_r" if symmetric else "viridis")).to(maps.device)
    values = maps.detach() if maps.is_floating_point() else maps.detach().float()
    if symmetric:
        largest = values.abs().amax((-2, -1), keepdim=True)
        scaled = values / torch.where(largest > 0, largest, 1) / 2 + 0.5
    elif limits is not None:
        scaled = (values - limits[0]) / (limits[1] - limits[0])
    else:
        scaled = min_max(values)
    index = (scaled.clamp(0, 1) * len(table)).long().clamp_max(len(table) - 1)  # as matplotlib does
    return table[index].movedim(-1, -3)


def overlay(
    image: Tensor, heat: Tensor, *, alpha: float = 0.5, limits: tuple[float, float] | None = None
) -> Tensor:
    """Lay a heat map over a picture: (1 - alpha) image + alpha colorize(heat), (3, H, W) in [0, 1].

    heat: (h, w), of any real values, enlarged bilinearly to the picture's size and scaled to [0, 1]
    for showing, by itself or between ``limits``. Raises InputError if shapes or alpha do not fit.
    """
    if image.ndim != 3 or image.shape[0] != 3 or heat.ndim != 2:
        shapes = f"{tuple(image.shape)} and {tuple(heat.shape)}"
        raise InputError(f"An overlay takes a picture (3, H, W) and a map (h, w), got {shapes}.")
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha={alpha} must lie in [0, 1].")
    heat = heat.detach().to(image.device, torch.promote_types(heat.dtype, torch.float32))
    if heat.shape != image.shape[1:]:
        heat = F.interpolate(heat[None, None], image.shape[1:], mode="bilinear")[0, 0]
    colour = colorize(heat, cmap="turbo", limits=limits).to(image.dtype)
    return ((1 - alpha) * image.detach() + alpha * colour).clamp(0, 1)


def grid(images: Tensor | Sequence[Tensor], *, columns: int | None = None, padding: int = 2) -> Tensor:
    """Many pictures, (N, C, H, W) or a sequence of (C, H, W), as one picture (3, H', W') on white.

    Row by row in equal cells as large as the largest picture, smaller ones centred; nearly square
    unless told how many columns. padding: pixels between and around the cells.
    Raises InputError if there are no pictures or the numbers make no sense.
    """
    pictures = [to_display(image).float().cpu() for image in images]
    if not pictures:
        raise InputError("A grid needs at least one picture.")
    columns = columns if columns is not None else math.ceil(math.sqrt(len(pictures)))
    if columns < 1 or padding < 0:
        raise InputError(f"A grid needs columns >= 1 and padding >= 0, got {columns}, {padding}.")
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    height, width = (max(picture.shape[side] for picture in pictures) for side in (1, 2))
    canvas = torch.ones(3, rows * (height + padding) + padding, columns * (width + padding) + padding)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        h, w = picture.shape[1:]
        top = padding + row * (height + padding) + (height - h) // 2
        left = padding + column * (width + padding) + (width - w) // 2
        canvas[:, top : top + h, left : left + w] = picture
    return canvas


def enlarge(images: Tensor, factor: int) -> Tensor:
    """Every pixel of (..., H, W) so many times in a row and a column, so that it can be seen."""
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (C, H, W) or (N, C, H, W) to (H', W') bilinearly with antialiasing; differentiable.

    Pixels stay in [0, 1]. Raises InputError for another shape or a size below one.
    """
    if images.ndim not in (3, 4) or images.numel() == 0:
        raise InputError(f"Images are (C, H, W) or (N, C, H, W), got {tuple(images.shape)}.")
    if min(size) < 1:
        raise InputError(f"size={size} must be at least one pixel each way.")
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    batch = images if images.ndim == 4 else images[None]
    resized = F.interpolate(batch, size, mode="bilinear", align_corners=False, antialias=True)
    return (resized if images.ndim == 4 else resized[0]).clamp(0, 1)
