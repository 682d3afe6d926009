"""The role ``masks``: the object's pixels in each image."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..data.bundled import SceneDataset
from ..errors import InputError
from ..images.decode import array_masks
from ..spec.spec import Role
from .base import InputContext, InputRole, SampleRequest, check_dense
from .images import read_images

#: The object in each image, bool (N, H, W), or None without masks. Default of ``run``: the ground
#: truth of the bundled scenes.
Masks: TypeAlias = Annotated[Tensor | None, Role("masks")]


class MasksRole(InputRole):
    """Mask images, white in the object."""

    name, value_type, per_image = "masks", Tensor, True
    metavar = "FILE"
    description = "the object's pixels in each image, bool (N, H, W), or None"
    help = "mask of each image, white in the object; repeatable (default: the bundled scenes' ground truth)"

    def read(self, value: Any, context: InputContext) -> Tensor | None:
        if isinstance(value, np.ndarray):
            return array_masks(value)
        if value is not None:
            return read_images(value, context.model).mean(1) > 0.5
        images = context.inputs["images"]
        for biased in (False, True):
            scenes, indices = SceneDataset(size=images.shape[2:], biased=biased), range(len(images))
            if torch.equal(images.cpu(), scenes.read(indices).to(images.dtype)):
                return scenes.masks(indices)
        return None

    def check(self, value: Any, context: InputContext) -> Tensor | None:
        if value is None:
            return None
        if not isinstance(value, Tensor) or value.dtype != torch.bool:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"masks must be a bool tensor (N, H, W), true in the object, not {kind}")
        check_dense(value, "masks")
        images = context.inputs["images"]
        expected = tuple(images[:, 0].shape)
        if tuple(value.shape) != expected:
            raise InputError(f"masks must have the images' shape {expected}, not {tuple(value.shape)}")
        return value.to(images.device)

    def sample(self, request: SampleRequest) -> Tensor | None:
        if not request.required:
            return None
        images: Tensor = request.inputs["images"]
        _, _, height, width = images.shape
        masks = torch.zeros(len(images), height, width, dtype=torch.bool, device=images.device)
        for n, mask in enumerate(masks):  # of other sizes, without symmetry
            mask[height // 4 : height // 2 + n % 4, width // 2 :] = True
        return masks


MASKS = MasksRole()
