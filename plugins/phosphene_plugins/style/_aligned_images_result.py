"""``AlignedImages``, the result of ``style_aligned``: images drawn in the style of a reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from phosphene.results import Panel, Result


@dataclass(frozen=True, eq=False, kw_only=True)
class AlignedImages(Result):
    """Images ``aligned`` (N, P, C, H, W) of P prompts with each of N references ``images`` (N, C, H, W).

    ``plain`` (N, P, C, H, W) are drawn from the same noise without the reference; all are in [0, 1].
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "aligned": "N P C H W",
        "plain": "N P C H W",
    }
    per_image: ClassVar[tuple[str, ...]] = ("images", "aligned", "plain")

    images: Tensor
    aligned: Tensor
    plain: Tensor
    prompts: tuple[str, ...]

    def panels(self) -> list[list[Panel]]:
        groups = []
        for reference, aligned, plain in zip(self.images, self.aligned, self.plain, strict=True):
            names = [prompt or f"sample {n}" for n, prompt in enumerate(self.prompts)]
            panels = [Panel(reference, "reference")]
            for name, own, shared in zip(names, plain, aligned, strict=True):
                panels += [Panel(own, name), Panel(shared, f"{name}, aligned", is_output=True)]
            groups.append(panels)
        return groups
