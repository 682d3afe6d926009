"""The role ``sources``: for each image another one, whose activations replace the image's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor

from ..errors import InputError
from ..spec.spec import Role
from .base import InputContext, InputRole, SampleRequest
from .images import bad_images, check_images, read_images

#: An image for each image of the call, (N, C, H, W) in [0, 1], whose activations replace that image's.
Sources: TypeAlias = Annotated[Tensor, Role("sources")]


class SourcesRole(InputRole):
    """An image for each image, or one for all; default: a blank image of the image's mean color."""

    name, value_type, per_image = "sources", Tensor, True
    metavar = "FILE|FOLDER"
    description = "an image for each image, or one for all, whose activations replace the image's"
    help = "image whose activations replace the image's, one for all or one each (default: blank)"

    def read(self, value: Any, context: InputContext) -> Tensor:
        if value is not None:
            return read_images(value, context.model)
        images: Tensor = context.inputs["images"]
        return images.mean((2, 3), keepdim=True).expand_as(images)

    def check(self, value: Any, context: InputContext) -> Tensor:
        sources, images = check_images(value, context), context.inputs["images"]
        if sources.shape[1:] != images.shape[1:]:
            expected, actual = tuple(images.shape[1:]), tuple(sources.shape[1:])
            raise InputError(f"sources must have the images' shape {expected}, not {actual}")
        if len(sources) not in (1, len(images)):
            raise InputError(f"{len(images)} images need one source, or {len(images)}, not {len(sources)}")
        return sources.expand(len(images), -1, -1, -1).contiguous()

    def sample(self, request: SampleRequest) -> Tensor:
        """The images after those of the case."""
        count, model = request.count, request.model
        images = request.draw(2 * count, model.input_size[0]).to(model.device, model.dtype)
        return torch.cat([images[count:-1].flip(0), images[-1:]])

    def bad_values(self, good: Tensor, context: InputContext) -> Iterator[tuple[str, Any]]:
        yield from bad_images(good, context)
        if len(good) > 2:
            yield "too few sources", good[:-1]
        yield "sources of another size", good[:, :, :-1]


SOURCES = SourcesRole()
