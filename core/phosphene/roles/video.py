"""The role ``video``: the frames of a video, in order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor

from ..builtin.clip import draw_clip
from ..errors import InputError, UnknownName, value_repr
from ..images.video import read_video
from ..spec.spec import Role
from .base import InputContext, InputRole, SampleRequest
from .images import bad_images, check_images, read_images

#: Frames of a video: float (T, 3, H, W) in [0, 1], two or more.
Video: TypeAlias = Annotated[Tensor, Role("video")]

#: The keys of a video as a mapping, and the smallest value of each number.
_SMALLEST = {"size": 8, "frames": 2, "start": 0, "every": 1}


class VideoRole(InputRole):
    """A video; default: a drawn clip of six frames."""

    name, value_type, size_name = "video", Tensor, "frames"
    default = "builtin:clip/6"
    metavar = "FILE|FOLDER"
    description = (
        'frames (T, 3, H, W) in [0, 1], a video file, an animation or a folder of frames; {"files": file, '
        '"size": 256, "frames": 48, "start": 0, "every": 2} reads a part of it'
    )
    help = "video file (MP4, GIF, ...), folder of frames, or builtin:clip/6 (default: builtin:clip/6)"

    def read(self, value: Any, context: InputContext) -> Tensor:
        options: dict[str, Any] = {}
        if isinstance(value, Mapping):
            options = dict(value)
            for key in options:
                if key not in ("files", *_SMALLEST):
                    raise UnknownName("key", key, ("files", *_SMALLEST), "a video")
            if "files" not in options:
                raise InputError('a video as a mapping needs the key "files": {"files": ..., "frames": 48}')
            value = options.pop("files")
        for key, number in options.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < _SMALLEST[key]:
                raise InputError(
                    f"{key} of a video is an integer of {_SMALLEST[key]} or more, not {value_repr(number)}"
                )
        if isinstance(value, str) and value.startswith("builtin:"):
            if "size" in options:
                raise InputError("a bundled clip has 64 pixels a side: size is for files and folders")
            clip = _bundled_clip(value)[options.get("start", 0) :: options.get("every", 1)]
            return clip[: options.get("frames")]
        if isinstance(value, (str, os.PathLike)):
            return read_video(value, **options)
        if options:
            raise InputError(f"{', '.join(options)} of a video need a file or a folder")
        return read_images(value)

    def check(self, value: Any, context: InputContext) -> Tensor:
        frames = check_images(value, context)
        if len(frames) < 2:
            raise InputError(f"a video has two frames or more, not {len(frames)}")
        return frames

    def sample(self, request: SampleRequest) -> Tensor:
        """Images of the case, each with a copy that is moved by a pixel."""
        images = request.draw(request.count, request.model.input_size[0])
        images = images.to(request.model.device, request.model.dtype)
        return torch.stack([images, images.roll(1, 3)], 1).flatten(0, 1)

    def bad_values(self, good: Tensor, context: InputContext) -> Iterator[tuple[str, Any]]:
        yield from bad_images(good, context)
        yield "a single frame", good[:1]


def _bundled_clip(uri: str) -> Tensor:
    name, _, count = uri.removeprefix("builtin:").partition("/")
    if name != "clip":
        raise UnknownName("bundled video", uri, ("builtin:clip/6",))
    if not (count or "6").isdecimal() or not 2 <= int(count or 6) <= 16:
        raise InputError(f"a bundled clip has 2 to 16 frames, builtin:clip/6, not {uri!r}")
    return draw_clip(int(count or 6)).frames


VIDEO = VideoRole()
