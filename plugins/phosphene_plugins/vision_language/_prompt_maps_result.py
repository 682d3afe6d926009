"""``PromptMaps``: an image drawn from a prompt, with a map for every word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from phosphene import InputError
from phosphene.images import overlay, to_display
from phosphene.results import Panel, Result


@dataclass(frozen=True, eq=False, kw_only=True)
class PromptMaps(Result):
    """An image (C, H, W) in [0, 1] drawn from ``prompt``, with ``maps`` (W, H, W') of its ``words``.

    ``maps``: the mean attention of each pixel to each word, raw; a figure divides each by its maximum,
    and leaves out the words that no pixel attends to.
    """

    shapes: ClassVar[Mapping[str, str]] = {"image": "C H w", "maps": "W H w", "words": "W"}
    groups_per_row: ClassVar[int] = 6

    image: Tensor
    maps: Tensor
    words: tuple[str, ...]
    prompt: str

    def masks(self, threshold: float = 0.4) -> Tensor:
        """Where each word's map is at least ``threshold`` times its maximum: booleans (W, H, W').

        A map of zeros has an empty mask. Raises InputError for a threshold outside (0, 1].
        """
        if not 0 < threshold <= 1:
            raise InputError(f"a threshold of masks is in (0, 1], a share of the maximum, not {threshold}")
        largest = self.maps.amax((1, 2), keepdim=True)
        return (self.maps >= threshold * largest) & (largest > 0)

    def lines(self) -> list[str]:
        areas = self.masks().float().mean((1, 2)).tolist()
        means = self.maps.mean((1, 2)).tolist()
        return [
            self.prompt,
            *(
                f"{word}: mean attention {mean:.3g}, over 40% of its maximum in {area:.0%} of the image"
                for word, mean, area in zip(self.words, means, areas, strict=True)
            ),
        ]

    def table(self) -> dict[str, list[Any]]:
        """A row for each word."""
        return {
            "word": list(self.words),
            "mean": self.maps.mean((1, 2)).tolist(),
            "maximum": self.maps.amax((1, 2)).tolist(),
            "area": self.masks().float().mean((1, 2)).tolist(),
        }

    def panels(self) -> list[list[Panel]]:
        """The image, and over it the map of each word with attention, divided by the map's maximum."""
        display = to_display(self.image)
        groups = [[Panel(display, "image", is_output=True)]]
        for word, heat in zip(self.words, self.maps.float(), strict=True):
            if (largest := float(heat.max())) > 0:
                heat = heat / largest
                groups.append(
                    [Panel(overlay(display, heat), f"{word}, largest {largest:.2g}", is_output=True)]
                )
        return groups
