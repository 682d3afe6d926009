"""The role ``styles``: style images, cropped to squares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, TypeAlias

from torch import Tensor

from ..builtin.textures import TEXTURES
from ..data.datasets import stack
from ..images.color import resize
from ..spec.spec import Role
from .base import InputContext, InputRole, SampleRequest
from .images import bad_images, check_images
from .texture import read_textures

#: Style images: float (S, 3, H, W) in [0, 1].
Styles: TypeAlias = Annotated[Tensor, Role("styles")]


class StylesRole(InputRole):
    """Style images; default: four bundled textures."""

    name, value_type, size_name = "styles", Tensor, "styles"
    default = [f"builtin:{name}" for name in TEXTURES[:4]]
    metavar = "FILE"
    description = "style images (S, 3, H, W) in [0, 1]"
    help = "style image file, or builtin:bricks; repeatable (default: four bundled textures)"

    def read(self, value: Any, context: InputContext) -> Tensor:
        """The styles' central squares, as high as the shorter side of the content images, or 128."""
        images = context.inputs.get("images")
        size = 128 if images is None else min(images.shape[2:])
        squares = []
        for style in read_textures(value):
            side = min(style.shape[1:])
            top, left = (style.shape[1] - side) // 2, (style.shape[2] - side) // 2
            squares.append(resize(style[:, top : top + side, left : left + side], (size, size)))
        return stack(squares)

    def check(self, value: Any, context: InputContext) -> Tensor:
        return check_images(value, context)

    def sample(self, request: SampleRequest) -> Tensor:
        return request.draw(request.count, 3).to(request.model.device, request.model.dtype)

    def bad_values(self, good: Tensor, context: InputContext) -> Iterator[tuple[str, Any]]:
        return bad_images(good, context)


STYLES = StylesRole()
