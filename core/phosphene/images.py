"""Pictures in and out: reading, writing, colour maps, overlays, grids.

Images are float tensors, RGB, in [0, 1]: (3, H, W), (1, H, W) for grey, (N, 3, H, W) for many.
"""

from __future__ import annotations

import base64
import io
import math
import os
import secrets
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .errors import InputError, UnknownName

#: The file names (in lower case) that `find_images` takes for pictures.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read_image(path: str | os.PathLike[str], *, mode: Literal["RGB", "L"] = "RGB") -> Tensor:
    """Read a picture file, turned the way its EXIF orientation says.

    Returns (3, H, W) for ``mode="RGB"``, (1, H, W) for ``"L"``: float32 in [0, 1].
    An alpha channel is dropped; 16-bit grey is scaled, not cut off.
    Raises InputError if the file is missing or is not a picture Pillow can read.
    """
    if not Path(path).is_file():
        raise InputError(f"There is no picture file at {os.fspath(path)!r}.")
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I;16"):  # Pillow's convert would clip it at 255
                picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
            array = np.array(picture.convert(mode))
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise InputError(f"Cannot read {os.fspath(path)!r} as a picture: {error}.") from error
    return torch.from_numpy(array).view(*array.shape[:2], -1).permute(2, 0, 1).contiguous() / 255


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
    """Any (C, H, W) or (1, C, H, W) as an RGB picture (3, H, W) in [0, 1], detached.

    One channel shows as grey, two as red and green, more than three by their first three; values
    are clamped. Raises InputError for another shape, an empty image or NaN.
    """
    image = image.detach()
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or image.numel() == 0:
        raise InputError(f"One picture is (C, H, W), got {tuple(image.shape)}; `grid` shows many.")
    image = image if image.is_floating_point() else image.float()
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
    """Write the picture (C, H, W) as a PNG file, whole or not at all.

    The bytes go to a temporary name in the same folder, which is then renamed.
    Raises InputError if the folder is missing or cannot be written.
    """
    content = png_bytes(image)
    target = Path(path)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        partial.write_bytes(content)
        os.replace(partial, target)
    except OSError as error:
        raise InputError(f"Cannot write the picture {os.fspath(path)!r}: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def min_max(tensor: Tensor, dims: Sequence[int] = (-2, -1), *, shared: bool = False) -> Tensor:
    """Scale every map to [0, 1]: (A - min A) / (max A - min A), and a constant map to zeros.

    dims: the dimensions that make up one map, (H, W) unless told; ``shared=True`` takes one
    minimum and maximum over the whole tensor, so that maps stay comparable with each other.
    Returns the shape that came in. Source: the min-max scaling of activation maps, lecture 21.3.
    """
    values = tensor if tensor.is_floating_point() else tensor.float()
    dims = tuple(range(values.ndim)) if shared else tuple(dims)
    low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
    span = high - low
    scaled = (values - low) / torch.where(span > 0, span, torch.ones_like(span))
    return scaled.clamp(0, 1)


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
        scaled = values / torch.where(largest > 0, largest, torch.ones_like(largest)) / 2 + 0.5
    elif limits is not None:
        scaled = (values - limits[0]) / (limits[1] - limits[0])
    else:
        scaled = min_max(values)
    index = (scaled.clamp(0, 1) * len(table)).long().clamp_max(len(table) - 1)  # as matplotlib does
    return table[index].movedim(-1, -3)


def overlay(
    image: Tensor,
    heat: Tensor,
    *,
    alpha: float = 0.5,
    cmap: str = "turbo",
    limits: tuple[float, float] | None = None,
) -> Tensor:
    """Lay a heat map over a picture: (1 - alpha) image + alpha colorize(heat).

    image: (3, H, W), or (N, 3, H, W) with as many heat maps; heat: (h, w) or (N, h, w), of any
    real values, enlarged bilinearly to (H, W) and scaled to [0, 1] for showing, each by itself or
    between ``limits``.
    Returns the image's shape, in [0, 1]. Raises InputError if shapes or alpha do not fit.
    """
    if image.ndim not in (3, 4) or image.shape[-3] != 3 or heat.ndim != image.ndim - 1:
        raise InputError(
            f"An overlay takes (3, H, W) and (h, w), or as many of both; got image "
            f"{tuple(image.shape)} and heat {tuple(heat.shape)}."
        )
    if heat.shape[:-2] != image.shape[:-3]:
        raise InputError(f"{image.shape[0]} images need as many heat maps, got {heat.shape[0]}.")
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha={alpha} must lie in [0, 1].")
    heat = heat.detach().to(image.device, torch.promote_types(heat.dtype, torch.float32))
    if heat.shape[-2:] != image.shape[-2:]:
        maps = heat.reshape(-1, 1, *heat.shape[-2:])
        larger = F.interpolate(maps, image.shape[-2:], mode="bilinear", align_corners=False)
        heat = larger.view(*heat.shape[:-2], *image.shape[-2:])
    colour = colorize(heat, cmap=cmap, limits=limits).to(image.dtype)
    return ((1 - alpha) * image.detach() + alpha * colour).clamp(0, 1)


def grid(
    images: Tensor | Sequence[Tensor],
    *,
    columns: int | None = None,
    padding: int = 2,
    background: float = 1.0,
) -> Tensor:
    """Many pictures, (N, C, H, W) or a sequence of (C, H, W), as one picture (3, H', W').

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
    height = max(picture.shape[1] for picture in pictures)
    width = max(picture.shape[2] for picture in pictures)
    size = (rows * (height + padding) + padding, columns * (width + padding) + padding)
    canvas = torch.full((3, *size), float(background))
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        h, w = picture.shape[1:]
        top = padding + row * (height + padding) + (height - h) // 2
        left = padding + column * (width + padding) + (width - w) // 2
        canvas[:, top : top + h, left : left + w] = picture
    return canvas


def enlarge(images: Tensor, factor: int | None = None, *, size: tuple[int, int] | None = None) -> Tensor:
    """Nearest-neighbour enlargement of (..., H, W), so that single pixels can be seen.

    By a whole factor, or to a size (H', W'). Raises InputError unless exactly one is given.
    """
    if (factor is None) == (size is None) or min(size or (factor or 0,)) < 1:
        raise InputError(f"enlarge takes a factor >= 1 or a size (H, W), got {factor}, {size}.")
    height, width = images.shape[-2:]
    if size is None:
        assert factor is not None
        size = (height * factor, width * factor)
    down = torch.arange(size[0], device=images.device) * height // size[0]
    across = torch.arange(size[1], device=images.device) * width // size[1]
    return images[..., down[:, None], across]


def resize(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resize (C, H, W) or (N, C, H, W) bilinearly with antialiasing; differentiable.

    size: (H', W'), or one number for the shorter side, keeping the proportions, as torchvision
    has it. Pixels stay in [0, 1]. Raises InputError for another shape or a size below one.
    """
    if images.ndim not in (3, 4) or images.numel() == 0:
        raise InputError(f"Images are (C, H, W) or (N, C, H, W), got {tuple(images.shape)}.")
    if isinstance(size, int):
        height, width = images.shape[-2:]
        shorter = min(height, width)
        size = (size * height // shorter, size * width // shorter)
    if min(size) < 1:
        raise InputError(f"size={size} must be at least one pixel each way.")
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    batch = images if images.ndim == 4 else images[None]
    resized = F.interpolate(batch, size, mode="bilinear", align_corners=False, antialias=True)
    return (resized if images.ndim == 4 else resized[0]).clamp(0, 1)
