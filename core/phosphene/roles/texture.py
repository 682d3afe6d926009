"""The role ``texture``: a sample of a texture, at its own size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, TypeAlias

from torch import Tensor

from ..builtin.textures import TEXTURES, load_texture
from ..data.datasets import stack
from ..errors import UnknownName
from ..images.io import read_image
from ..spec.spec import Role
from .base import InputContext, InputRole, SampleRequest
from .images import as_list, bad_images, check_images

#: A texture sample: float (N, 3, H, W) in [0, 1].
Texture: TypeAlias = Annotated[Tensor, Role("texture")]


def read_texture(value: Any) -> Tensor:
    """An image (3, H, W) from a file, or a bundled texture by its name ("builtin:bricks")."""
    if isinstance(value, str) and value.startswith("builtin:"):
        name = value.removeprefix("builtin:")
        if name not in TEXTURES:
            raise UnknownName("bundled texture", name, TEXTURES)
        return load_texture(name)
    return read_image(value)


def read_textures(value: Any) -> Tensor:
    """One texture or several, (N, 3, H, W), at their own size, which must be the same for all."""
    return stack([read_texture(item) for item in as_list(value)])


class TextureRole(InputRole):
    """A texture; default: a bundled one."""

    name, value_type, per_image = "texture", Tensor, True
    default = f"builtin:{TEXTURES[0]}"
    metavar = "FILE"
    description = "texture sample (N, 3, H, W) in [0, 1]"
    help = f"image file, or builtin:bricks; repeatable (default: builtin:{TEXTURES[0]})"

    def read(self, value: Any, context: InputContext) -> Tensor:
        return read_textures(value)

    def check(self, value: Any, context: InputContext) -> Tensor:
        return check_images(value, context)

    def sample(self, request: SampleRequest) -> Tensor:
        return request.draw(request.count, 3).to(request.model.device, request.model.dtype)

    def bad_values(self, good: Tensor, context: InputContext) -> Iterator[tuple[str, Any]]:
        return bad_images(good, context)


TEXTURE = TextureRole()
