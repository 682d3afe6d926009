"""The role ``guide``: images whose features guide DeepDream."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from torch import Tensor

from ..data.datasets import stack
from ..spec.spec import Role
from .base import InputContext, InputRole, SampleRequest
from .images import IMAGES, check_images
from .texture import read_textures

#: Guide images of any size, (G, C, H, W) in [0, 1], or None.
Guide: TypeAlias = Annotated[Tensor | None, Role("guide")]


class GuideRole(InputRole):
    """Guide images; default: none."""

    name, value_type = "guide", Tensor
    metavar = "FILE"
    description = "guide images (G, C, H, W) in [0, 1], or None"
    help = "guide image, or builtin:bricks; repeatable (default: none)"

    def read(self, value: Any, context: InputContext) -> Tensor | None:
        return None if value is None else stack(read_textures(value))

    def check(self, value: Any, context: InputContext) -> Tensor | None:
        return None if value is None else check_images(value, context)

    def sample(self, request: SampleRequest) -> Tensor | None:
        return IMAGES.sample(request)[:1] if request.required else None


GUIDE = GuideRole()
