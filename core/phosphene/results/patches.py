"""``Patches``: image patches that activate channels most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images.color import Centers, enlarge, resize, to_display
from .base import Panel, Result, shorten_title


@dataclass(frozen=True, eq=False, kw_only=True)
class Patches(Result):
    """M image patches of a data set that activate channels of a layer most.

    Patch i has a channel, ``scores[i]`` (M,), the activation, ``positions[i]`` (M, 2), its unit's y and x on
    the layer's map of ``map_size``, ``boxes[i]`` (M, 4), the unit's receptive field clipped at the image's
    border (top, left, bottom, right; the last two exclusive), and the id of its image, which is
    ``images[image_indices[i]]`` of (P, C, H, W). ``gradients`` (M, C, h, w): guided gradient of the unit
    with respect to its box, from the upper left corner on, padded with zeros. ``centers`` are the pixels at
    which the map's rows and columns are centered (None: cells share the image equally). With more than
    twelve channels, figures show the patches without their images.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "channels": "M",
        "scores": "M",
        "images": "P C H W",
        "image_indices": "M",
        "positions": "M 2",
        "map_size": "2",
        "boxes": "M 4",
        "ids": "M",
        "gradients": "M C h w",
    }

    layer: str
    channels: tuple[int, ...]
    scores: Tensor
    images: Tensor
    image_indices: Tensor
    positions: Tensor
    map_size: tuple[int, int]
    boxes: Tensor
    ids: tuple[str, ...]
    gradients: Tensor | None = None
    centers: Centers | None = None

    def panels(self) -> list[list[Panel]]:
        of_channel: dict[int, list[int]] = {}
        for i, channel in enumerate(self.channels):
            of_channel.setdefault(channel, []).append(i)
        if self._many_channels():
            return [[self._strip(entries)] for entries in of_channel.values()]
        drawings = [self._patches] if self.gradients is None else [self._patches, self._guided]
        groups = []
        for entries in of_channel.values():
            patches = [draw(entries) for draw in drawings]
            factor = max(1, 64 // max(patches[0].shape[2:]))
            titles = [f"{self.scores[i]:.2f}" for i in entries]
            titles[0] = f"{self._unit(entries)} {titles[0]}"
            groups.append([Panel(p, t) for p, t in zip(enlarge(patches[0], factor), titles, strict=True)])
            groups += [[Panel(p) for p in enlarge(more, factor)] for more in patches[1:]]
            groups.append([Panel(self._context(i), f"in {shorten_title(self.ids[i])}") for i in entries])
        return groups

    def rows(self) -> list[list[Panel]]:
        groups = self.panels()
        if not self._many_channels():
            return groups
        groups_per_row = max(1, 1500 // groups[0][0].image.shape[2])
        starts = range(0, len(groups), groups_per_row)
        return [[panel for (panel,) in groups[start : start + groups_per_row]] for start in starts]

    def lines(self) -> list[str]:
        patches: dict[int, list[str]] = {}
        for channel, score, name in zip(self.channels, self.scores.tolist(), self.ids, strict=True):
            patches.setdefault(channel, []).append(f"{score:.2f} in {name}")
        return [f"{self.layer}[{channel}]: {', '.join(best)}" for channel, best in patches.items()]

    def _many_channels(self) -> bool:
        return len(set(self.channels)) > 12

    def _unit(self, entries: Sequence[int]) -> str:
        return f"{shorten_title(self.layer)}[{self.channels[entries[0]]}]"

    def _strip(self, entries: Sequence[int]) -> Panel:
        """A channel's patches side by side at 48 pixels, guided gradients below them."""
        drawn = [self._patches(entries)] + ([] if self.gradients is None else [self._guided(entries)])
        sides = drawn[0].shape[2:]
        tile = (max(1, round(48 * sides[0] / max(sides))), max(1, round(48 * sides[1] / max(sides))))
        rows = []
        for patches in drawn:
            small = resize(patches, tile) if max(sides) > 48 else enlarge(patches, 48 // max(sides))
            rows.append(torch.cat(list(F.pad(small, (1, 1, 1, 1), value=1.0)), 2))
        best, last = float(self.scores[entries[0]]), float(self.scores[entries[-1]])
        return Panel(torch.cat(rows, 1), f"{self._unit(entries)} {best:.2f} to {last:.2f}", is_output=True)

    def _patches(self, entries: Sequence[int]) -> Tensor:
        """The patches of these entries, (n, 3, h, w)."""
        patches = []
        for i in entries:
            top, left, bottom, right = self.boxes[i].tolist()
            image = to_display(self.images[int(self.image_indices[i])])
            patches.append(self._framed(i, image[:, top:bottom, left:right]))
        return torch.stack(patches)

    def _guided(self, entries: Sequence[int]) -> Tensor:
        """The guided gradients of these entries, (n, 3, h, w), zero as gray."""
        assert self.gradients is not None
        patches = []
        for i in entries:
            top, left, bottom, right = self.boxes[i].tolist()
            gradient = self.gradients[i, :, : bottom - top, : right - left].float()
            # Scaled by the 99.5th percentile: a few outlier pixels would otherwise leave the image gray.
            scale = gradient.abs().flatten().sort().values[int(0.995 * (gradient.numel() - 1))]
            patches.append(
                self._framed(i, to_display((gradient / scale.clamp(min=1e-30) / 2 + 0.5).clamp(0, 1)))
            )
        return torch.stack(patches)

    def _framed(self, i: int, patch: Tensor) -> Tensor:
        """A clipped patch at its position in the full box; white beyond the image's border."""
        top, left, _, _ = self.boxes[i].tolist()
        height, width = (self.boxes[:, 2:] - self.boxes[:, :2]).amax(0).tolist()
        framed = patch.new_ones(3, height, width)
        y, x = (0 if top else height - patch.shape[1]), (0 if left else width - patch.shape[2])
        framed[:, y : y + patch.shape[1], x : x + patch.shape[2]] = patch
        return framed

    def _context(self, i: int) -> Tensor:
        """The image dimmed outside entry i's patch, or outside its cell if the patch is the full image."""
        image = to_display(self.images[int(self.image_indices[i])])
        top, left, bottom, right = self.boxes[i].tolist()
        height, width = image.shape[1:]
        if (top, left, bottom, right) == (0, 0, height, width):
            y, x = self.positions[i].tolist()
            top, bottom = self._cell(0, y, height)
            left, right = self._cell(1, x, width)
        dimmed = 0.35 * image + 0.3
        dimmed[:, top:bottom, left:right] = image[:, top:bottom, left:right]
        return dimmed

    def _cell(self, axis: int, position: int, side: int) -> tuple[int, int]:
        """First and last pixel (exclusive) of a position of the map: its share of the side, centered."""
        count = self.map_size[axis]
        first, last = position * side // count, -(-(position + 1) * side // count)
        if self.centers is None:
            return first, last
        shift = round(float(self.centers[axis][position]) - ((position + 0.5) * side / count - 0.5))
        return max(0, first + shift), min(side, last + shift)
