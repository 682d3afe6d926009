"""``StyleSweep``, the result of ``style_sweep``: images stylized with several values of one parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from phosphene.results import Panel, Result


@dataclass(frozen=True, eq=False, kw_only=True)
class StyleSweep(Result):
    """Style transfer with V values of a parameter: ``images`` (N, 3, H, W), ``stylized`` (N, V, 3, H, W).

    Both are in [0, 1]; ``labels`` name the V values; ``losses`` (steps, N, V).
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "stylized")
    per_step: ClassVar[tuple[str, ...]] = ("losses",)

    images: Tensor
    stylized: Tensor
    labels: tuple[str, ...]
    losses: Tensor

    def panels(self) -> list[list[Panel]]:
        groups = []
        for image, variants in zip(self.images, self.stylized, strict=True):
            labeled = zip(variants, self.labels, strict=True)
            groups.append([Panel(image), *(Panel(v, label, is_output=True) for v, label in labeled)])
        return groups
