"""``Region``: the evidence for a class of a segmentation, over a part of each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, ModelError
from .objectives import AbsentObjective, Objective

if TYPE_CHECKING:
    from ..models import Model


@dataclass(eq=False)
class Region(Objective):
    """The mean logit of a segmentation's class over a region: S = mean_{p in R} z_c(p).

    The region is where the class is predicted for the images themselves, fixed at the first evaluation; or
    ``point`` (x, y), one pixel; or ``mask``, (H, W) or (N, H, W) bool; or, with ``everywhere``, all pixels.

    An attack succeeds where the mean of z_c - max_{k != c} z_k over the region is negative (of one logit per
    pixel, the mean of z).
    """

    index: int
    point: tuple[int, int] | None = None
    mask: Tensor | None = None
    everywhere: bool = False
    name: str = ""
    _predicted: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.point is not None) + (self.mask is not None) + self.everywhere > 1:
            raise InputError("a region is a point, a mask or everywhere, not several of them")
        if self.mask is not None and (self.mask.dtype != torch.bool or self.mask.ndim not in (2, 3)):
            raise InputError(
                f"the mask of a region must be bool (H, W) or (N, H, W), not {self.mask.dtype} "
                f"{tuple(self.mask.shape)}"
            )

    def score(self, values: Tensor) -> Tensor:
        logits = _segmentation_logits(values, self.index)
        return _mean_over(logits[:, self.index], self._mask(logits))

    def evaluate(self, model: Model, images: Tensor) -> Tensor:
        logits = _segmentation_logits(self._at_image_size(model, images), self.index)
        return _mean_over(logits[:, self.index], self._mask(logits, model))

    def margin(self, model: Model, images: Tensor) -> Tensor:
        logits = _segmentation_logits(self._at_image_size(model, images), self.index)
        own = logits[:, self.index]
        if logits.shape[1] > 1:
            others = torch.cat([logits[:, : self.index], logits[:, self.index + 1 :]], 1)
            own = own - others.amax(1)
        return _mean_over(own, self._mask(logits, model))

    def select(self, rows: Sequence[int]) -> Region:
        mask = self.mask[rows] if self.mask is not None and self.mask.ndim == 3 else self.mask
        predicted = None if self._predicted is None else self._predicted[rows]
        return Region(self.index, self.point, mask, self.everywhere, self.name, predicted)

    def resolve(self, model: Model, images: Tensor) -> Region:
        with torch.no_grad():
            self.evaluate(model, images)
        return self

    def unresolved(self) -> Region:
        return replace(self, _predicted=None)

    @property
    def is_identified(self) -> bool:
        return self.mask is None

    def _at_image_size(self, model: Model, images: Tensor) -> Tensor:
        """The logits (N, K, H, W), enlarged to the images where the network's are smaller (SegFormer)."""
        logits = model.outputs(images)
        if logits.ndim == 4 and logits.shape[2:] != images.shape[2:]:
            logits = F.interpolate(logits, images.shape[2:], mode="bilinear")
        return logits

    def _mask(self, logits: Tensor, model: Model | None = None) -> Tensor:
        """The region, (N, H, W) bool."""
        count, _, height, width = logits.shape
        if self.everywhere:
            return logits.new_ones(count, height, width, dtype=torch.bool)
        if self.point is not None:
            x, y = self.point
            if not (0 <= x < width and 0 <= y < height):
                raise InputError(f"the point {x},{y} (x, y) is outside the image of {width}x{height} pixels")
            mask = logits.new_zeros(count, height, width, dtype=torch.bool)
            mask[:, y, x] = True
            return mask
        if self.mask is not None:
            if self.mask.shape[-2:] != (height, width) or len(self.mask.expand(count, -1, -1)) != count:
                raise InputError(
                    f"the mask {tuple(self.mask.shape)} does not fit {count} images of {height}x{width}"
                )
            if not self.mask.flatten(-2).any(-1).all():
                raise InputError("a mask of a region is empty")
            return self.mask.to(logits.device).expand(count, -1, -1)
        if self._predicted is None:
            self._predicted = self._predict(logits, model)
        if len(self._predicted) != count:
            raise InputError(f"the region is of {len(self._predicted)} images, not {count}")
        return self._predicted

    def _predict(self, logits: Tensor, model: Model | None) -> Tensor:
        """Where the class is predicted; AbsentObjective, naming the predicted classes, where it is not."""
        if logits.shape[1] == 1:
            mask = logits.detach()[:, 0] > 0
        else:
            classes = logits.detach().argmax(1)
            mask = classes == self.index
        for number, present in enumerate(mask.flatten(1).any(1).tolist()):
            if not present:
                own = self.name or (model.class_name(self.index) if model else f"class {self.index}")
                what = f"{own} is predicted at no pixel of image {number}"
                choice = f"all pixels: 'region:{self.name or self.index}@all'"
                if logits.shape[1] == 1:
                    raise AbsentObjective(f"{what}. Choose {choice}")
                shares = classes[number].flatten().bincount() / classes[number].numel()
                largest = shares.argsort(descending=True)[: min(5, int((shares > 0).sum()))].tolist()
                names = [model.class_name(index) if model else f"class {index}" for index in largest]
                parts = zip(names, shares[largest].tolist(), strict=True)
                listed = ", ".join(f"{name} ({share:.0%})" for name, share in parts)
                raise AbsentObjective(f"{what}; predicted there: {listed}. Choose one of these, or {choice}")
        return mask

    def __str__(self) -> str:
        where = "@all" if self.everywhere else ""
        where = f"@{self.point[0]},{self.point[1]}" if self.point is not None else where
        return f"region:{self.name or self.index}{'@mask' if self.mask is not None else where}"


def _segmentation_logits(values: Tensor, index: int) -> Tensor:
    if values.ndim != 4:
        raise ModelError(
            f"a region needs a segmentation's logits (N, K, H, W), and the output is {tuple(values.shape)}"
        )
    if not 0 <= index < values.shape[1]:
        raise InputError(f"class {index} does not exist: the segmentation has {values.shape[1]} classes")
    return values


def _mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) the mean of each image's values (N, H, W) inside its mask."""
    weights = mask.to(values)
    return (values * weights).sum((1, 2)) / weights.sum((1, 2))
