"""``Stylization``: stylized images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Panel, Result, side_by_side_frames


@dataclass(frozen=True, eq=False, kw_only=True)
class Stylization(Result):
    """Stylized images: ``images`` and ``stylized`` (N, 3, H, W) in [0, 1], ``style`` the name of the style.

    ``sources`` (S, 3, H', W') are the style images, where there are any. Methods that optimize pixels also
    return ``losses`` (steps, N), and ``frames`` (F, N, 3, H, W), bytes, where they were requested.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "stylized": "N C H W",
        "sources": "S C h w",
        "losses": "steps N",
        "frames": "F N C p q",
    }

    per_image: ClassVar[tuple[str, ...]] = ("images", "stylized")
    per_step: ClassVar[tuple[str, ...]] = ("losses", "frames")
    groups_per_row: ClassVar[int] = 2

    images: Tensor
    stylized: Tensor
    style: str
    sources: Tensor | None = None
    losses: Tensor | None = None
    frames: Tensor | None = None

    def panels(self) -> list[list[Panel]]:
        styles = [] if self.sources is None else list(self.sources)
        titles = ["style"] if len(styles) == 1 else [f"style {n}" for n in range(len(styles))]
        style_panels = [Panel(style, title) for style, title in zip(styles, titles, strict=True)]
        return [
            [Panel(image), *style_panels, Panel(stylized, self.style, is_output=True)]
            for image, stylized in zip(self.images, self.stylized, strict=True)
        ]

    def animation_frames(self) -> list[Tensor]:
        return side_by_side_frames(self.frames)
