"""``Attribution``: attribution maps, one per image, and how other libraries display them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from ..errors import InputError
from ..images.color import Centers, colorize, enlarge_maps, min_max, overlay, symmetric, to_display
from .base import Panel, Result
from .conventions import Convention, check_convention, finish_maps, scale_maps


@dataclass(frozen=True, eq=False, kw_only=True)
class Attribution(Result):
    """How much each pixel or position of an image matters for a target.

    ``images`` (N, C, H, W) in [0, 1]; ``maps`` (N, h, w), raw: neither clipped nor scaled; ``targets`` the
    target of each map. ``more`` (N, M, h', w') are further maps of every image, one for each of the M
    ``more_names``: of other classes, or of several layers (then each scaled to [0, 1] and enlarged to the
    image). ``signed_maps`` are, for methods whose equation ends in a ReLU, the maps before it: (N, h, w) for
    each layer, at the layer's own size. ``convention`` is the display convention of ``maps``, None for raw
    maps; see ``as_convention``. ``centers`` are the pixels at which the rows (h,) and columns (w,) of the
    maps are centered, as ``phosphene.unit_centers`` computes them for a layer: 0, 32, 64, ... in a ResNet.
    None: cells that share the image equally. ``more`` of the same size has the same centers.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "maps": "N h w",
        "targets": "N",
        "more": "N M i j",
        "more_names": "M",
    }

    per_image: ClassVar[tuple[str, ...]] = ("images", "maps", "targets", "more")
    groups_per_row: ClassVar[int] = 4

    images: Tensor
    maps: Tensor
    targets: tuple[str, ...]
    more: Tensor | None = None
    more_names: tuple[str, ...] = ()
    signed_maps: tuple[Tensor, ...] = ()
    convention: str | None = None
    centers: Centers | None = None
    #: "overlay" for maps coarser than the image, "map" for ones that are clearer without it.
    layout: Literal["overlay", "map"] = "overlay"

    @classmethod
    def concatenate(cls, results: Sequence[Self]) -> Self:
        layers = zip(*(result.signed_maps for result in results), strict=True)
        signed_maps = tuple(torch.cat(maps) for maps in layers)
        return dataclasses.replace(super().concatenate(results), signed_maps=signed_maps)

    def select(self, rows: Sequence[int]) -> Self:
        signed_maps = tuple(maps[list(rows)] for maps in self.signed_maps)
        return dataclasses.replace(super().select(rows), signed_maps=signed_maps)

    def heat(self) -> Tensor:
        """The maps at the images' size, each scaled to [0, 1]: (N, H, W).

        Linear between the ``centers``, and constant beyond the outermost.
        """
        return self._heat(self.maps)

    def as_convention(self, convention: Convention) -> Self:
        """The result with ``maps`` and ``more`` scaled as another library displays them.

        "minmax": each map to [0, 1]. "pytorch-grad-cam": ReLU, each map to [0, 1] with 1e-7 in the divisor,
        enlarged to the image (bilinear) and scaled again. "torchcam": as "minmax", with 1e-8 in the divisor.
        "captum": the map before the method's final ReLU. "pair-saliency": ReLU, divided by the largest value.
        Several layers' maps are scaled, enlarged and averaged; pytorch-grad-cam scales the average again.
        The libraries enlarge maps as if cells shared the image equally, and so do their conventions: the
        result has no ``centers``, except by "minmax", which only scales.

        Returns:
            A result of the same type, with ``convention`` set. ``maps`` are (N, H, W) for "pytorch-grad-cam"
            and for several layers, else (N, h, w).

        Raises:
            UnknownName for a convention that does not exist, InputError for maps that follow one already.

        Example::
            from phosphene import run

            result = run("grad_cam", images="builtin:scenes/2")
            result.as_convention("pytorch-grad-cam").maps.shape  # (2, 64, 64)
        """
        check_convention(convention)
        if self.convention:
            raise InputError(f"maps are scaled by {self.convention!r} already: convert the raw result")
        size = self.images.shape[2:]
        if self.signed_maps and self.more is not None:
            if convention == "minmax":  # as they are
                return dataclasses.replace(self, convention=convention)
            layers = [maps if convention == "captum" else maps.relu() for maps in self.signed_maps]
            scaled = torch.stack([enlarge_maps(scale_maps(maps, convention), size) for maps in layers], 1)
            # The layers' maps have the image's size here, so finishing only scales their average again.
            average = finish_maps(scaled.mean(1), size, convention)
            return dataclasses.replace(self, maps=average, more=scaled, convention=convention, centers=None)

        def convert(maps: Tensor) -> Tensor:
            return finish_maps(scale_maps(maps, convention), size, convention)

        (unscaled,) = self.signed_maps if self.signed_maps and convention == "captum" else (self.maps,)
        more = None if self.more is None else torch.stack([*map(convert, self.more.unbind(1))], 1)
        centers = self.centers if convention == "minmax" else None
        return dataclasses.replace(
            self, maps=convert(unscaled), more=more, convention=convention, centers=centers
        )

    def _heat(self, maps: Tensor) -> Tensor:
        centers = self.centers if maps.shape[1:] == self.maps.shape[1:] else None
        maps = enlarge_maps(maps.float(), self.images.shape[2:], centers)
        # Evidence against the target is not heat, unless there is no evidence for it.
        return min_max(torch.where(maps.amax((1, 2), keepdim=True) > 0, maps.clamp(min=0), maps))

    def panels(self) -> list[list[Panel]]:
        groups = [[Panel(image)] for image in self.images]
        columns = [(self.maps, self.targets)]
        if self.more is not None:
            pairs = zip(self.more.unbind(1), self.more_names, strict=True)
            columns += [(maps, (name,) * len(groups)) for maps, name in pairs]
        for maps, names in columns:
            for group, drawn, raw, name in zip(groups, self._render_maps(maps), maps, names, strict=True):
                # Nothing else tells a map of zeros from one that failed.
                title = name if raw.any() else f"{name}, 0 everywhere"
                group.append(Panel(drawn, title, is_output=True))
        return groups

    def rows(self) -> list[list[Panel]]:
        return super().rows() if self.more is None else self.panels()

    def _render_maps(self, maps: Tensor) -> list[Tensor]:
        """Each map as an RGB image (3, H, W)."""
        if self.layout == "overlay":
            return [overlay(to_display(i), h) for i, h in zip(self.images, self._heat(maps), strict=True)]
        # The 99th percentile, not the maximum: a few extreme pixels would leave the image black or white.
        # On the CPU, because torch computes quantiles in double precision.
        tops = maps.abs().flatten(1).float().cpu().quantile(0.99, dim=1).clamp(min=1e-30)
        tops = tops[:, None, None].to(maps.device)
        if (maps < 0).any():
            return list(colorize(symmetric(maps.clamp(-tops, tops)), "RdBu_r"))
        return list(colorize(maps / tops, "inferno"))
