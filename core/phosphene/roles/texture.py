"""The role ``texture``: a sample of a texture, at its own size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, TypeAlias

from torch import Tensor

from ..builtin.textures import PAINTINGS, TEXTURES, load_painting, load_texture
from ..data.datasets import stack
from ..errors import UnknownName
from ..spec.spec import Role
from .base import InputContext, InputRole, SampleRequest
from .images import as_list, bad_images, check_images, read_items

#: A texture sample: float (N, 3, H, W) in [0, 1].
Texture: TypeAlias = Annotated[Tensor, Role("texture")]


def read_textures(value: Any) -> list[Tensor]:
    """The images (3, H, W) of files, Pillow images, arrays and tensors, and of textures by name.

    A bundled texture is ``builtin:bricks``, a painting ``builtin:night``. Each has its own size.
    """
    textures: list[Tensor] = []
    for item in as_list(value):
        if isinstance(item, str) and item.startswith("builtin:"):
            name = item.removeprefix("builtin:")
            if name not in (*TEXTURES, *PAINTINGS):
                raise UnknownName("bundled texture", name, (*TEXTURES, *PAINTINGS))
            textures.append(load_painting(name) if name in PAINTINGS else load_texture(name))
        else:
            textures += [image for batch in read_items([item]) for image in batch]
    return textures


class TextureRole(InputRole):
    """A texture; default: a bundled one."""

    name, value_type, per_image = "texture", Tensor, True
    default = f"builtin:{TEXTURES[0]}"
    metavar = "FILE"
    description = "texture sample (N, 3, H, W) in [0, 1]"
    help = f"image file, or builtin:bricks; repeatable (default: builtin:{TEXTURES[0]})"

    def read(self, value: Any, context: InputContext) -> Tensor:
        return stack(read_textures(value))

    def check(self, value: Any, context: InputContext) -> Tensor:
        return check_images(value, context)

    def sample(self, request: SampleRequest) -> Tensor:
        return request.draw(request.count, 3).to(request.model.device, request.model.dtype)

    def bad_values(self, good: Tensor, context: InputContext) -> Iterator[tuple[str, Any]]:
        return bad_images(good, context)


TEXTURE = TextureRole()
