"""``AugmentedViews``, the result of ``style_augmentation``: views of images in random styles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from phosphene.results import Panel, Result


@dataclass(frozen=True, eq=False, kw_only=True)
class AugmentedViews(Result):
    """Images in random styles: ``images`` (N, 3, H, W) and V ``views`` of each, (N, V, 3, H, W), in [0, 1].

    ``strength`` (N, V) is the weight b of the stylized image in each view, 0 where the view is the image
    itself; ``blend_weights`` (N, V, S) are the weights of the S styles in each view, ``style_names`` their
    names.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
    }

    per_image: ClassVar[tuple[str, ...]] = ("images", "views", "strength", "blend_weights")

    images: Tensor
    views: Tensor
    strength: Tensor
    blend_weights: Tensor
    style_names: tuple[str, ...]

    def panels(self) -> list[list[Panel]]:
        groups = []
        for image, views, strengths, weights in zip(
            self.images, self.views, self.strength, self.blend_weights, strict=True
        ):
            titles = [
                f"{b:.0%} {self._style_name(w)}" if b else "unchanged"
                for b, w in zip(strengths, weights, strict=True)
            ]
            panels = [Panel(view, title, is_output=True) for view, title in zip(views, titles, strict=True)]
            groups.append([Panel(image, "image"), *panels])
        return groups

    def _style_name(self, weights: Tensor) -> str:
        """The name of the style with the largest of the weights (S,), plus " and others" for a blend."""
        largest = int(weights.argmax())
        return self.style_names[largest] + (" and others" if weights[largest] < 1 else "")
