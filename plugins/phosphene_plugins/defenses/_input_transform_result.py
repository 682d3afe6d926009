"""What a change of the pixels before a model does to its answers: what input transforms share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from phosphene import Model, Result
from phosphene.results import Panel

#: Pictures (N, C, H, W) in [0, 1] to pictures of the same shape, each for itself.
Change: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class DefendedImages(Result):
    """Images, what a defence makes of them, and what the model says of both.

    ``images``, ``transformed`` (N, C, H, W) in [0, 1]; ``before``, ``after`` (N,) the classes predicted
    without and with the defence, ``confidence_before``, ``confidence_after`` (N,) their probabilities,
    ``names_before``, ``names_after`` what they are called.
    """

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
            after = f"seen: {self.names_after[n]} {self.confidence_after[n]:.0%}"
            seen = Panel(transformed, after, is_output=True)
            groups.append([Panel(image, before), seen, Panel.difference(image, transformed)])
        return groups


def compared(model: Model, images: Tensor, change: Change) -> DefendedImages:
    """The model's answers to the images as they are and as ``change`` makes them."""
    transformed = change(images)
    said: dict[str, Any] = {}
    for when, pictures in (("before", images), ("after", transformed)):
        with torch.no_grad():
            said[f"confidence_{when}"], said[when] = model(pictures).softmax(1).max(1)
        said[f"names_{when}"] = tuple(map(model.class_name, said[when].tolist()))
    return DefendedImages(images=images, transformed=transformed, **said)
