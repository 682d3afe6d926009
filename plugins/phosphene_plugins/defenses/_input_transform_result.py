"""``DefendedImages``: images before and after an input transform, with the model's predictions on both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from phosphene import Model, Result
from phosphene.results import Panel
from phosphene.spec import Equivariant, InvariantTo, Relation

#: From images (N, C, H, W) in [0, 1] to images of the same shape, each transformed independently.
Transform: TypeAlias = Callable[[Tensor], Tensor]

#: Of a filter that treats the image's axes and directions equally.
FLIPS: tuple[Relation, ...] = (Equivariant("hflip"), Equivariant("vflip"), Equivariant("transpose"))

#: Of every transform: images do not depend on each other, probabilities not on a constant in the logits.
INDEPENDENT: tuple[Relation, ...] = (
    InvariantTo("batch_order", fields=("transformed", "confidence_before", "confidence_after")),
    InvariantTo("logit_shift", fields=("confidence_before", "confidence_after")),
)


@dataclass(frozen=True, eq=False, kw_only=True)
class DefendedImages(Result):
    """Images, the images after a defense, and the predictions on both.

    ``images``, ``transformed`` (N, C, H, W) in [0, 1]; ``before``, ``after`` (N,) the classes predicted
    without and with the defense, ``confidence_before``, ``confidence_after`` (N,) their probabilities,
    ``names_before``, ``names_after`` their names.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "transformed": "N C H W",
        "before": "N",
        "after": "N",
        "confidence_before": "N",
        "confidence_after": "N",
        "names_before": "N",
        "names_after": "N",
    }

    per_image: ClassVar[tuple[str, ...]] = (
        *("images", "transformed", "before", "after", "confidence_before", "confidence_after"),
        *("names_before", "names_after"),
    )
    groups_per_row: ClassVar[int] = 2

    images: Tensor
    transformed: Tensor
    before: Tensor
    after: Tensor
    confidence_before: Tensor
    confidence_after: Tensor
    names_before: tuple[str, ...]
    names_after: tuple[str, ...]

    def panels(self) -> list[list[Panel]]:
        groups = []
        for n, (image, transformed) in enumerate(zip(self.images, self.transformed, strict=True)):
            before = f"{self.names_before[n]} {self.confidence_before[n]:.0%}"
            after = f"defended: {self.names_after[n]} {self.confidence_after[n]:.0%}"
            output = Panel(transformed, after, is_output=True)
            groups.append([Panel(image, before), output, Panel.difference(image, transformed)])
        return groups


def compare_predictions(model: Model, images: Tensor, transform: Transform) -> DefendedImages:
    """The model's predictions on the images and on the transformed images."""
    transformed = transform(images)
    fields: dict[str, Any] = {}
    for when, batch in (("before", images), ("after", transformed)):
        with torch.no_grad():
            fields[f"confidence_{when}"], fields[when] = model.probabilities(batch).max(1)
        fields[f"names_{when}"] = tuple(map(model.class_name, fields[when].tolist()))
    return DefendedImages(images=images, transformed=transformed, **fields)
