"""The role ``image_adapter``: an image prompt adapter of a diffusion model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from phosphene import InputError
from phosphene.builtin.image_adapter import IMAGE_ADAPTER, load_bundled_image_adapter
from phosphene.errors import type_name
from phosphene.generative import ImageAdapter, load_image_adapter
from phosphene.roles import InputContext, InputRole, check_type
from phosphene.spec import Role

#: Keys and values of images for the attention layers of a diffusion model.
Adapter: TypeAlias = Annotated[ImageAdapter, Role("image_adapter")]


class ImageAdapterRole(InputRole):
    """An image prompt adapter, or its safetensors file; default: that of the bundled diffusion model."""

    name, value_type, default = "image_adapter", ImageAdapter, f"builtin:{IMAGE_ADAPTER}"
    metavar = "FILE"
    description = "image prompt adapter, an ``ImageAdapter``"
    help = f"safetensors file of an IP-Adapter (default: builtin:{IMAGE_ADAPTER})"

    def read(self, value: Any, context: InputContext) -> ImageAdapter:
        if value == self.default:
            return load_bundled_image_adapter()
        if not isinstance(value, (str, Path)):
            raise InputError(
                f"an image adapter is an ImageAdapter or a safetensors file, not {type_name(value)}"
            )
        return load_image_adapter(value)

    def check(self, value: Any, context: InputContext) -> ImageAdapter:
        adapter: ImageAdapter = check_type(value, ImageAdapter, "such as load_image_adapter(file)")
        return adapter

    def bad_values(self, good: Any, context: InputContext) -> Iterator[tuple[str, Any]]:
        yield "a name", "resnet18"
        yield "a number", 3


IMAGE_ADAPTER_ROLE = ImageAdapterRole()
