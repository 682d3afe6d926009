"""``Patches``: image patches that activate channels most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images.color import enlarge, resize, to_display
from .base import Panel, Result, shorten_title

#: The most rows of thumbnails beside a chart.
_ROWS = 12


@dataclass(frozen=True, eq=False, kw_only=True)
class Patches(Result):
    """Where in a data set a layer's channels answered most.

    Entry i is a place: ``channels`` and ``scores`` (M,), the whole picture ``images[sources[i]]`` of
    (P, C, H, W), the unit's y and x in ``places`` (M, 2) on the layer's map of the size ``grid``, its
    receptive field in ``boxes`` (M, 4) as top, left, bottom, right (exclusive), clipped at the border,
    and the picture's id in the data set. ``gradients`` (M, C, h, w): what guided backpropagation
    brought back from the unit to its box, from the upper left corner on, and zeros where the box is
    smaller. Of more than twelve channels, a figure shows the patches alone.
    """

    layer: str
    channels: tuple[int, ...]
    scores: Tensor
    images: Tensor
    sources: Tensor
    places: Tensor
    grid: tuple[int, int]
    boxes: Tensor
    ids: tuple[str, ...]
    gradients: Tensor | None = None

    def panels(self) -> list[list[Panel]]:
        of_channel: dict[int, list[int]] = {}
        for i, channel in enumerate(self.channels):
            of_channel.setdefault(channel, []).append(i)
        if self._crowded():
            return [[self._strip(entries)] for entries in of_channel.values()]
        layers = [self._patches] if self.gradients is None else [self._patches, self._guided]
        groups = []
        for entries in of_channel.values():
            pictures = [draw(entries) for draw in layers]
            factor = max(1, 64 // max(pictures[0].shape[2:]))
            titles = [f"{self.scores[i]:.2f}" for i in entries]
            titles[0] = f"{self._unit(entries)} {titles[0]}"
            groups.append([Panel(p, t) for p, t in zip(enlarge(pictures[0], factor), titles, strict=True)])
            groups += [[Panel(p) for p in enlarge(more, factor)] for more in pictures[1:]]
            groups.append([Panel(self._place(i), f"in {shorten_title(self.ids[i])}") for i in entries])
        return groups

    def rows(self) -> list[list[Panel]]:
        groups = self.panels()
        if not self._crowded():
            return groups
        groups_per_row = max(1, 1500 // groups[0][0].image.shape[2])
        starts = range(0, len(groups), groups_per_row)
        return [[panel for (panel,) in groups[start : start + groups_per_row]] for start in starts]

    def lines(self) -> list[str]:
        found: dict[int, list[str]] = {}
        for channel, score, name in zip(self.channels, self.scores.tolist(), self.ids, strict=True):
            found.setdefault(channel, []).append(f"{score:.2f} in {name}")
        return [f"{self.layer}[{channel}]: {', '.join(best)}" for channel, best in found.items()]

    def _crowded(self) -> bool:
        return len(set(self.channels)) > 12

    def _unit(self, entries: Sequence[int]) -> str:
        return f"{shorten_title(self.layer)}[{self.channels[entries[0]]}]"

    def _strip(self, entries: Sequence[int]) -> Panel:
        """A channel's patches side by side, guided ones below them, small enough for a page of channels."""
        drawn = [self._patches(entries)] + ([] if self.gradients is None else [self._guided(entries)])
        sides = drawn[0].shape[2:]
        tile = (max(1, round(48 * sides[0] / max(sides))), max(1, round(48 * sides[1] / max(sides))))
        rows = []
        for pictures in drawn:
            small = resize(pictures, tile) if max(sides) > 48 else enlarge(pictures, 48 // max(sides))
            rows.append(torch.cat(list(F.pad(small, (1, 1, 1, 1), value=1.0)), 2))
        best, last = float(self.scores[entries[0]]), float(self.scores[entries[-1]])
        return Panel(torch.cat(rows, 1), f"{self._unit(entries)} {best:.2f} to {last:.2f}", is_output=True)

    def _patches(self, entries: Sequence[int]) -> Tensor:
        """What these entries' units see, (n, 3, h, w)."""
        cut = []
        for i in entries:
            top, left, bottom, right = self.boxes[i].tolist()
            image = to_display(self.images[int(self.sources[i])])
            cut.append(self._framed(i, image[:, top:bottom, left:right]))
        return torch.stack(cut)

    def _guided(self, entries: Sequence[int]) -> Tensor:
        """Their guided gradients, (n, 3, h, w), zero as grey."""
        assert self.gradients is not None
        cut = []
        for i in entries:
            top, left, bottom, right = self.boxes[i].tolist()
            gradient = self.gradients[i, :, : bottom - top, : right - left].float()
            # A few pixels far above the rest would leave the picture grey.
            most = gradient.abs().flatten().sort().values[int(0.995 * (gradient.numel() - 1))]
            cut.append(self._framed(i, to_display((gradient / most.clamp(min=1e-30) / 2 + 0.5).clamp(0, 1))))
        return torch.stack(cut)

    def _framed(self, i: int, patch: Tensor) -> Tensor:
        """A clipped patch keeps its place: what lies beyond the picture's border stays white."""
        top, left, _, _ = self.boxes[i].tolist()
        height, width = (self.boxes[:, 2:] - self.boxes[:, :2]).amax(0).tolist()
        framed = patch.new_ones(3, height, width)
        y, x = (0 if top else height - patch.shape[1]), (0 if left else width - patch.shape[2])
        framed[:, y : y + patch.shape[1], x : x + patch.shape[2]] = patch
        return framed

    def _place(self, i: int) -> Tensor:
        """The picture dimmed around entry i's patch, or around its cell if the unit sees all."""
        image = to_display(self.images[int(self.sources[i])])
        top, left, bottom, right = self.boxes[i].tolist()
        height, width = image.shape[1:]
        if (top, left, bottom, right) == (0, 0, height, width):
            (y, x), (rows, columns) = self.places[i].tolist(), self.grid
            top, bottom = y * height // rows, -(-(y + 1) * height // rows)
            left, right = x * width // columns, -(-(x + 1) * width // columns)
        place = 0.35 * image + 0.3
        place[:, top:bottom, left:right] = image[:, top:bottom, left:right]
        return place
