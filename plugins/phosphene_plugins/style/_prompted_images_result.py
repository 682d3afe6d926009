"""``ImagePrompted``, the result of ``ip_adapter`` and ``instant_style``: images drawn from image prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from phosphene.results import Panel, Result


@dataclass(frozen=True, eq=False, kw_only=True)
class ImagePrompted(Result):
    """Images ``drawn`` (N, P, C, H', W') of P texts with each of N image prompts ``images`` (N, C, H, W).

    ``plain`` (N, P, C, H', W') are drawn from the same noise without the image prompt; all are in [0, 1].
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "drawn": "N P C h w",
        "plain": "N P C h w",
    }
    per_image: ClassVar[tuple[str, ...]] = ("images", "drawn", "plain")

    images: Tensor
    drawn: Tensor
    plain: Tensor
    prompts: tuple[str, ...]

    def panels(self) -> list[list[Panel]]:
        groups = []
        for image, drawn, plain in zip(self.images, self.drawn, self.plain, strict=True):
            names = [prompt or f"sample {n}" for n, prompt in enumerate(self.prompts)]
            panels = [Panel(image, "image prompt")]
            for name, without, prompted in zip(names, plain, drawn, strict=True):
                panels += [Panel(without, name), Panel(prompted, f"{name}, prompted", is_output=True)]
            groups.append(panels)
        return groups
