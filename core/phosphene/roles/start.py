"""The role ``start``: the image that an optimization begins from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

from torch import Tensor

from ..data.datasets import stack
from ..errors import InputError
from ..results import Result
from ..spec.spec import Role
from .base import InputContext, InputRole, SampleRequest, image_count
from .images import IMAGES, check_images, read_images

#: Start of an optimization: an image for each image of the call, (N, C, H, W) in [0, 1], or None. ``run``
#: also takes a saved result, whose images the optimization continues from.
Start: TypeAlias = Annotated[Tensor | None, Role("start")]


class StartRole(InputRole):
    """Images to begin from; default: the method's own start."""

    name, value_type, per_image = "start", Tensor, True
    metavar = "FILE"
    description = "images to begin from, (N, C, H, W) in [0, 1], or None"
    help = "image to begin from, one for all or one each, repeatable; or a saved result (default: noise)"

    def read(self, value: Any, context: InputContext) -> Tensor | None:
        model = context.model
        if isinstance(value, (str, Path)) and Path(value, "result.json").is_file():
            value = context.result(value)
        if isinstance(value, Result):
            value = stack([panel.image for group in value.panels() for panel in group if panel.is_output])
            return value if model is None else value[:, : model.input_size[0]]
        return None if value is None else read_images(value, model)

    def check(self, value: Any, context: InputContext) -> Tensor | None:
        if value is None:
            return None
        start, count = check_images(value, context), image_count(context.inputs)
        images = context.inputs.get("images")
        if images is not None and start.shape[1:] != images.shape[1:]:
            expected, actual = tuple(images.shape[1:]), tuple(start.shape[1:])
            raise InputError(f"start images must have the images' shape {expected}, not {actual}")
        if count is None:
            return start
        if len(start) not in (1, count):
            raise InputError(f"needs one image to start from, or {count}, not {len(start)}")
        return start.expand(count, -1, -1, -1).contiguous()

    def sample(self, request: SampleRequest) -> Tensor | None:
        return IMAGES.sample(request) if request.required else None


START = StartRole()
