"""Reading videos: MP4 and other files through ffmpeg, animated GIF, WebP and PNG, and folders of frames."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

from ..errors import InputError, MissingExtra
from .decode import open_rgb, to_pixels, to_rgb
from .paths import find_images, local_path

#: Suffixes of the files that ffmpeg reads, and of animations, which Pillow reads.
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
ANIMATION_SUFFIXES = (".apng", ".gif", ".png", ".webp")

#: Most pixels of all frames together, 800 MB in float32.
_MOST_PIXELS = 2**26


def read_video(
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    frames: int | None = None,
    start: int = 0,
    every: int = 1,
) -> Tensor:
    """Frames (T, 3, H, W) of a video file, an animation or a folder of images, float32 in [0, 1].

    Args:
        path: an MP4, MOV, AVI, MKV or WebM file, a GIF, WebP or PNG animation, or a folder of images of one
            size, which are sorted by name.
        size: longer side to which larger frames are shrunk; default: their own.
        frames: most frames to read; default: all.
        start: number of the first frame.
        every: read every n-th frame.

    Raises:
        InputError: a missing or unreadable file, frames of different sizes, fewer than two frames, or more
            pixels in all than 2^26.
        MissingExtra: a video file without imageio and its ffmpeg.
    """
    file = local_path(path)
    if file.is_dir():
        images: Iterator[Image.Image] = map(open_rgb, find_images(file))
    elif not file.is_file():
        raise InputError(f"there is no video file or folder at {str(path)!r}")
    elif file.suffix.lower() in VIDEO_SUFFIXES:
        images = _video_frames(file)
    elif file.suffix.lower() in ANIMATION_SUFFIXES:
        images = _animation_frames(file)
    else:
        listed = ", ".join((*VIDEO_SUFFIXES, *ANIMATION_SUFFIXES))
        raise InputError(f"{str(path)!r} is no video: the suffixes are {listed}, or a folder of images")
    stop = None if frames is None else start + every * frames
    read: list[Tensor] = []
    pixels = 0
    for image in itertools.islice(images, start, stop, every):
        if size is not None and max(image.size) > size:
            image = ImageOps.contain(image, (size, size), Image.Resampling.BICUBIC)
        if read and (image.height, image.width) != tuple(read[0].shape[1:]):
            height, width = read[0].shape[1:]
            raise InputError(
                f"frame {len(read)} of {str(path)!r} is {image.height}x{image.width}, the first one "
                f"{height}x{width} (height x width): frames of a video have one size"
            )
        pixels += image.height * image.width
        if pixels > _MOST_PIXELS:
            raise InputError(
                f"{str(path)!r} has more than {_MOST_PIXELS:,} pixels in its first {len(read) + 1} frames: "
                f"read it smaller or in parts, such as size=256, frames=48 or every=2"
            )
        read.append((to_pixels(image) * 255).round().byte())
    if len(read) < 2:
        raise InputError(f"a video has two frames or more; {str(path)!r} has {len(read)} from frame {start}")
    return torch.stack(read) / 255


def _animation_frames(file: Path) -> Iterator[Image.Image]:
    """The frames of an animation that Pillow reads."""
    try:
        with Image.open(file) as animation:
            for frame in ImageSequence.Iterator(animation):
                yield to_rgb(frame)
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise any exception on a damaged file
        raise InputError(f"{str(file)!r} cannot be read as an animation: {error}") from error


def _video_frames(file: Path) -> Iterator[Image.Image]:
    """The frames of a video file that ffmpeg decodes, turned as it says."""
    if not find_spec("imageio_ffmpeg"):
        raise MissingExtra(f"reading {file.suffix} files", "video")
    from imageio.v3 import imiter

    try:
        for frame in imiter(file, plugin="FFMPEG"):
            yield Image.fromarray(frame)
    except Exception as error:  # ffmpeg's errors arrive as OSError, RuntimeError, IndexError and others
        reason = " ".join(str(error).split())
        raise InputError(f"{str(file)!r} cannot be read as a video: {reason:.200}") from error
