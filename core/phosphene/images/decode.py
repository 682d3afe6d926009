"""Pillow images, image files and NumPy arrays as RGB pixels: a rule for each Pillow mode and array layout."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from ..errors import InputError, type_name
from .paths import local_path

T = TypeVar("T")

#: Numbers of channels of an array's last axis: gray, RGB and RGBA.
ARRAY_CHANNELS = (1, 3, 4)

#: Types of an array's values.
_ARRAY_TYPES = (np.uint8, np.bool_, np.float16, np.float32, np.float64)


def read_image(path: str | os.PathLike[str] | Image.Image) -> Tensor:
    """Read an image file as RGB (3, H, W), float32 in [0, 1], with its EXIF orientation applied.

    ``path`` may be a ``file://`` URI or a Pillow image. Every Pillow mode is converted by the rule of
    ``to_rgb``; of an animation the first frame is read.

    Raises:
        InputError: a missing file, one that Pillow cannot read, or a mode without defined black and white.
    """
    return to_pixels(to_rgb(path) if isinstance(path, Image.Image) else open_rgb(path))


def open_rgb(path: str | os.PathLike[str], at_least: tuple[int, int] | None = None) -> Image.Image:
    """An image file as a Pillow RGB image; see ``read_image``.

    ``at_least`` (width, height): a JPEG file is decoded at 1/2, 1/4 or 1/8 of its size, the smallest that
    still covers this size. That is faster, and its pixels are averages of those of the file.
    """
    return _decode(_image_file(path), repr(str(path)), lambda file: to_rgb(_draft(file, at_least)))


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(width, height) of an image file with its EXIF orientation applied, from its header."""
    return _decode(_image_file(path), repr(str(path)), _oriented_size)


def decode_image(content: bytes) -> Image.Image:
    """The content of an image file as a Pillow RGB image."""
    return _decode(io.BytesIO(content), f"an image of {len(content)} bytes", to_rgb)


def _image_file(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"an image file is a path or a file:// URI, not {type_name(path)}")
    if not (file := local_path(path)).is_file():
        raise InputError(f"there is no image file at {str(path)!r}")
    return file


def _decode(source: Path | io.BytesIO, name: str, read: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(source) as file:
            return read(file)
    except Exception as error:  # Pillow's decoders raise any exception on a damaged file
        raise InputError(f"{name} cannot be read as an image: {error}") from error


def _is_turned(image: Image.Image) -> bool:
    """Whether the EXIF orientation exchanges width and height."""
    return image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)


def _oriented_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _is_turned(image) else (width, height)


def _draft(image: Image.Image, at_least: tuple[int, int] | None) -> Image.Image:
    """A file that will be decoded at a fraction of its size; only JPEG files can."""
    if at_least is not None:
        width, height = at_least
        image.draft(None, (height, width) if _is_turned(image) else (width, height))
    return image


def to_pixels(image: Image.Image) -> Tensor:
    """A Pillow RGB or L image as (3, H, W) or (1, H, W), float32 in [0, 1]."""
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1).contiguous() / 255


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode as 8-bit RGB, with its EXIF orientation applied.

    1, L: gray. LA, PA, RGBA, RGBX: the alpha channel is dropped. La, RGBa: colors are divided by alpha, which
    is then dropped. P: the palette's colors. CMYK, YCbCr, HSV, LAB: Pillow's conversions, without a color
    profile. I;16 in any byte order: v // 257. F: values in [0, 1], rounded to 8 bits.

    Raises:
        InputError: mode I, whose white is 255 or 65535; mode F with values outside [0, 1] or NaN.
    """
    image = ImageOps.exif_transpose(image)
    mode = image.mode
    if mode == "I":
        raise InputError(
            "Pillow mode I stores 32-bit integers whose white is not defined: "
            'use image.convert("L") if it is 255, image.convert("I;16") if it is 65535'
        )
    if mode.startswith("I;16"):  # Image.convert would clip it at 255
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            extremes = f"{values.min():.4g} to {values.max():.4g}"
            raise InputError(f"values of Pillow mode F must lie in [0, 1], these range from {extremes}")
        return Image.fromarray(np.round(values * 255).astype(np.uint8)).convert("RGB")
    if mode in ("La", "RGBa"):
        image = image.convert("LA" if mode == "La" else "RGBA")
    elif mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # to RGB directly, Pillow warns of the transparency
    return image if image.mode == "RGB" else image.convert("RGB")


def array_images(array: NDArray[Any], channels: int | None = None) -> Tensor:
    """A NumPy array as images (N, C, H, W) in [0, 1]: (H, W), (H, W, C), (N, H, W, C) or (N, C, H, W).

    uint8 is divided by 255, bool is 0 and 1, floats become float32. ``channels`` is the model's number; None,
    1 and 3 allow gray, RGB and RGBA arrays, whose alpha channel is dropped. Gray is repeated to RGB except
    for ``channels=1``. The range of floats is not checked here.

    Raises:
        InputError: another type, a shape with two readings (both are named), or with none.
    """
    if array.dtype.newbyteorder("=") not in _ARRAY_TYPES:
        raise InputError(
            f"an image array must be uint8, or float in [0, 1], not {array.dtype}: divide it by its white "
            "(255 or 65535), or convert it with .astype('uint8') if that is 255"
        )
    if array.size == 0:
        raise InputError(f"an image array of shape {array.shape} is empty")
    if array.dtype == np.uint8 and array.max() == 1:
        raise InputError(
            "a uint8 image array whose largest value is 1 has two readings: bytes (nearly black), "
            "array / 255, or 0 and 1, array.astype(bool)"
        )
    native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    pixels = torch.from_numpy(native)
    pixels = pixels / 255 if pixels.dtype == torch.uint8 else pixels.float()
    images = _channels_first(pixels, ARRAY_CHANNELS if channels in (None, 1, 3) else (channels,))
    images = images[:, :3] if channels in (None, 1, 3) else images
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 and channels != 1 else images


def _channels_first(pixels: Tensor, allowed: tuple[int, ...]) -> Tensor:
    """An array's pixels as (N, C, H, W), C one of ``allowed``."""
    shape = tuple(pixels.shape)
    match pixels.ndim:
        case 2 if 1 in allowed:
            return pixels[None, None]
        case 3:
            first, last = shape[0] in allowed, shape[2] in allowed
            if first and last:
                tensor = "torch.from_numpy(array)"
                raise _ambiguous(
                    shape, "(H, W, C)", f"{tensor}.permute(2, 0, 1)[None]", "(C, H, W)", f"{tensor}[None]"
                )
            if last:
                return pixels.permute(2, 0, 1)[None]
            if first:
                gray = "array[..., None]"
                raise _ambiguous(shape, "(C, H, W)", "array.transpose(1, 2, 0)", "(N, H, W)", gray)
        case 4:
            first, last = shape[1] in allowed, shape[3] in allowed
            if first and last:
                tensor = "torch.from_numpy(array)"
                raise _ambiguous(
                    shape, "(N, H, W, C)", f"{tensor}.permute(0, 3, 1, 2)", "(N, C, H, W)", tensor
                )
            if last:
                return pixels.permute(0, 3, 1, 2)
            if first:
                return pixels
    counts = ", ".join(map(str, allowed))
    gray = "; gray images (N, H, W) need a last axis: array[..., None]" if pixels.ndim == 3 else ""
    raise InputError(
        f"an image array must have shape (H, W, C) or (N, H, W, C) with C of {counts}, not {shape}{gray}"
    )


def _ambiguous(
    shape: tuple[int, ...], first: str, write_first: str, second: str, write_second: str
) -> InputError:
    return InputError(
        f"an image array of shape {shape} has two readings: pass {write_first} if it is {first}, "
        f"{write_second} if it is {second}"
    )


def item_pixels(
    value: object, transform: Callable[[Image.Image], Tensor], channels: int | None = None
) -> Tensor | None:
    """An image in memory as pixels (N, C, H, W) in [0, 1]; None for what is no image.

    A Pillow image is converted to RGB and passed through ``transform``, which returns (C, H, W). Arrays are
    read by ``array_images``; tensors (C, H, W) and (N, C, H, W) must be floats.
    """
    if isinstance(value, Image.Image):
        return transform(to_rgb(value))[None]
    if isinstance(value, np.ndarray):
        return array_images(value, channels)
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise InputError(f"images must be floats in [0, 1], not {value.dtype}: divide bytes by 255")
        if value.ndim not in (3, 4):
            raise InputError(f"images must have shape (C, H, W) or (N, C, H, W), not {tuple(value.shape)}")
        return value if value.ndim == 4 else value[None]
    return None


def array_masks(array: NDArray[Any]) -> Tensor:
    """A NumPy array (H, W) or (N, H, W) as masks (N, H, W): bool, 0 and 1, or 0 and 255.

    Raises:
        InputError: other values or axes.
    """
    if array.ndim not in (2, 3) or array.size == 0:
        raise InputError(f"a mask array has shape (H, W) or (N, H, W), not {array.shape}")
    values = np.unique(array)
    if array.dtype.kind not in "bui" or not ({*values.tolist()} <= {0, 1} or {*values.tolist()} <= {0, 255}):
        raise InputError(
            "a mask array holds bool, 0 and 1, or 0 and 255, true in the object, "
            f"not {len(values)} values of {array.dtype}; compare it with a threshold: array > 0.5"
        )
    masks = torch.from_numpy(array != 0)
    return masks[None] if masks.ndim == 2 else masks
