"""``Attribution``: attribution maps, one per image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images.color import colorize, min_max, overlay, symmetric, to_display
from .base import Panel, Result


@dataclass(frozen=True, eq=False, kw_only=True)
class Attribution(Result):
    """How much each place of an image matters for a target.

    ``images`` (N, C, H, W) in [0, 1]; ``maps`` (N, h, w), raw: neither clipped nor normalised
    unless the method's parameters say so; ``targets`` what each map is about. ``more`` (N, M, h', w')
    are further maps of every image, each of the M ``more_names``: of several layers, of other classes.
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "maps", "targets", "more")
    groups_per_row: ClassVar[int] = 4

    images: Tensor
    maps: Tensor
    targets: tuple[str, ...]
    more: Tensor | None = None
    more_names: tuple[str, ...] = ()
    #: "overlay" for maps coarser than the picture, "map" for ones that show better alone.
    layout: Literal["overlay", "map"] = "overlay"

    def heat(self) -> Tensor:
        """The maps at the images' size (bilinear), each scaled to [0, 1]: (N, H, W)."""
        return self._heat(self.maps)

    def _heat(self, maps: Tensor) -> Tensor:
        maps = maps.float()
        if maps.shape[1:] != self.images.shape[2:]:
            maps = F.interpolate(maps[:, None], self.images.shape[2:], mode="bilinear")[:, 0]
        # What speaks against the target is not heat, unless nothing speaks for it.
        return min_max(torch.where(maps.amax((1, 2), keepdim=True) > 0, maps.clamp(min=0), maps))

    def panels(self) -> list[list[Panel]]:
        drawn = zip(self.images, self._drawn(self.maps), self.targets, strict=True)
        groups = [[Panel(image), Panel(picture, target, is_output=True)] for image, picture, target in drawn]
        if self.more is not None:
            for maps, name in zip(self.more.unbind(1), self.more_names, strict=True):
                for group, picture in zip(groups, self._drawn(maps), strict=True):
                    group.append(Panel(picture, name, is_output=True))
        return groups

    def rows(self) -> list[list[Panel]]:
        return super().rows() if self.more is None else self.panels()

    def _drawn(self, maps: Tensor) -> list[Tensor]:
        if self.layout == "overlay":
            return [overlay(to_display(i), h) for i, h in zip(self.images, self._heat(maps), strict=True)]
        # A few pixels far above the rest would leave the picture black, or white.
        tops = maps.abs().flatten(1).float().quantile(0.99, dim=1).clamp(min=1e-30)
        tops = tops[:, None, None]
        if (maps < 0).any():
            return list(colorize(symmetric(maps.clamp(-tops, tops)), "RdBu_r"))
        return list(colorize(maps / tops, "inferno"))
