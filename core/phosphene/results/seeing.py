"""The results of looking into a model: maps, filters, activations, patches, neighbours, embeddings."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import charts
from ..images import colorize, enlarge, min_max, overlay, resize, symmetric, to_display
from .base import Panel, Result, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The most rows of thumbnails beside a chart.
_ROWS = 12


@dataclass(frozen=True, eq=False, kw_only=True)
class Attribution(Result):
    """How much each place of an image matters for a target.

    ``images`` (N, C, H, W) in [0, 1]; ``maps`` (N, h, w), raw: neither clipped nor normalised
    unless the method's parameters say so; ``targets`` what each map is about. ``more`` (N, M, h', w')
    are further maps of every image, each of the M ``more_names``: of several layers, of other classes.
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "maps", "targets", "more")
    abreast: ClassVar[int] = 4

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
        groups = [[Panel(image), Panel(picture, target, made=True)] for image, picture, target in drawn]
        if self.more is not None:
            for maps, name in zip(self.more.unbind(1), self.more_names, strict=True):
                for group, picture in zip(groups, self._drawn(maps), strict=True):
                    group.append(Panel(picture, name, made=True))
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


@dataclass(frozen=True, eq=False, kw_only=True)
class Segmentation(Result):
    """What of each image belongs to the object that a target is about.

    ``images`` (N, C, H, W) in [0, 1]; ``maps`` (N, H, W) what it was found by; ``masks`` (N, H, W) bool;
    ``targets`` what each is about; ``iou`` (N,) in [0, 1], intersection over union with the true mask,
    where that is known.
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "maps", "masks", "targets", "iou")
    abreast: ClassVar[int] = 2

    images: Tensor
    maps: Tensor
    masks: Tensor
    targets: tuple[str, ...]
    iou: Tensor | None = None

    def panels(self) -> list[list[Panel]]:
        attribution = Attribution(images=self.images, maps=self.maps, targets=self.targets, layout="map")
        groups = attribution.panels()
        inside = -F.max_pool2d(-self.masks[:, None].float(), 3, 1, 1)[:, 0] > 0.5
        for n, group in enumerate(groups):
            mask, image = self.masks[n], to_display(self.images[n])
            red = image.new_tensor([1.0, 0.0, 0.2])[:, None, None]
            found = "" if self.iou is None else f"IoU {self.iou[n]:.2f}"
            group.append(Panel(torch.where(mask & ~inside[n], red, image), found))
            group.append(Panel(torch.where(mask, image, 1), "cut out", made=True))
        return groups


@dataclass(frozen=True, eq=False, kw_only=True)
class FilterBank(Result):
    """Filters of a layer as they are learned.

    ``weights`` (F, C, K, K) as they are, ``tiles`` (T, 3, K, K) in [0, 1] to look at, ``captions``
    what each tile is, ``columns`` how many stand in a row.
    """

    layer: str
    weights: Tensor
    tiles: Tensor
    captions: tuple[str, ...]
    columns: int = 8

    def panels(self) -> list[list[Panel]]:
        from torchvision.utils import make_grid

        # Single weights are to be seen.
        side = max(12, min(66, 1320 // self.columns))
        tiles = enlarge(self.tiles, max(1, side // max(self.tiles.shape[2:])))
        size = "x".join(str(s) for s in self.weights.shape)
        picture = make_grid(tiles, self.columns, padding=3, pad_value=1)
        return [[Panel(picture, f"{self.layer}: {size}", made=True)]]


@dataclass(frozen=True, eq=False, kw_only=True)
class ActivationMaps(Result):
    """What chosen channels of a layer answer to images.

    ``images`` (N, C, H, W); ``maps`` (N, K, h, w) raw activations; ``scaled`` the same in [0, 1]
    for showing, with zero in the middle where they are ``signed``; ``channels`` their K numbers. Of
    more than nine, a figure shows each image's strongest; titles tell what a map ranges over, so that a
    map of nearly nothing is not taken for a strong one.
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "maps", "scaled")

    images: Tensor
    maps: Tensor
    scaled: Tensor
    channels: tuple[int, ...]
    layer: str
    layout: Literal["overlay", "map"] = "map"
    signed: bool = False

    def panels(self) -> list[list[Panel]]:
        groups = []
        for image, maps, scaled in zip(self.images, self.maps, self.scaled, strict=True):
            strongest = maps.flatten(1).amax(1).sort(descending=True, stable=True).indices[:9].tolist()
            group = [Panel(image, shortened(self.layer))]
            for k in strongest if len(maps) > 9 else range(len(maps)):
                shown = colorize(scaled[k], "RdBu_r" if self.signed else "viridis")
                if self.layout == "overlay":
                    shown = overlay(to_display(image), scaled[k])
                span = f"{float(maps[k].min()):.2g} to {float(maps[k].max()):.2g}"
                group.append(Panel(shown, f"channel {self.channels[k]}: {span}"))
            groups.append(group)
        return groups


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
            groups.append([Panel(self._place(i), f"in {shortened(self.ids[i])}") for i in entries])
        return groups

    def rows(self) -> list[list[Panel]]:
        groups = self.panels()
        if not self._crowded():
            return groups
        abreast = max(1, 1500 // groups[0][0].image.shape[2])
        starts = range(0, len(groups), abreast)
        return [[panel for (panel,) in groups[start : start + abreast]] for start in starts]

    def lines(self) -> list[str]:
        found: dict[int, list[str]] = {}
        for channel, score, name in zip(self.channels, self.scores.tolist(), self.ids, strict=True):
            found.setdefault(channel, []).append(f"{score:.2f} in {name}")
        return [f"{self.layer}[{channel}]: {', '.join(best)}" for channel, best in found.items()]

    def _crowded(self) -> bool:
        return len(set(self.channels)) > 12

    def _unit(self, entries: Sequence[int]) -> str:
        return f"{shortened(self.layer)}[{self.channels[entries[0]]}]"

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
        return Panel(torch.cat(rows, 1), f"{self._unit(entries)} {best:.2f} to {last:.2f}", made=True)

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


@dataclass(frozen=True, eq=False, kw_only=True)
class Neighbors(Result):
    """The nearest pictures of a data set in feature space, and beside them in raw pixels.

    ``images`` (N, C, H, W) the queries; ``indices``, ``distances`` (N, k), nearest first;
    ``neighbors`` (N, k, C, H, W). The same with ``pixel_`` for the comparison in pixel space.
    """

    images: Tensor
    neighbors: Tensor
    indices: Tensor
    distances: Tensor
    ids: tuple[tuple[str, ...], ...]
    pixel_neighbors: Tensor
    pixel_indices: Tensor
    pixel_distances: Tensor

    def panels(self) -> list[list[Panel]]:
        groups = []
        features, pixels = (self.neighbors, self.distances), (self.pixel_neighbors, self.pixel_distances)
        for n, image in enumerate(self.images):
            for what, (found, far) in (("features", features), ("pixels", pixels)):
                near = [Panel(f, f"{d:.2f}") for f, d in zip(found[n], far[n].tolist(), strict=True)]
                groups.append([Panel(image, f"by {what}"), *near])
        return groups


@dataclass(frozen=True, eq=False, kw_only=True)
class Embedding(Result):
    """Pictures of a data set as points of a feature space; row i of everything is the picture ``ids[i]``.

    ``features`` (N, D); ``thumbnails`` (N, 3, s, s) bytes; ``labels`` where they are known. ``points``
    (N, 2 or more) are where a picture lies on the ``axes``; ``clusters`` (N,) which one it is in, and
    ``centrality`` (N,) how far from its middle. ``numbers`` are scalars, by what was measured.
    ``layout`` says how it is drawn: a map; rows of every cluster; those far out on either axis.
    """

    ids: tuple[str, ...]
    features: Tensor
    thumbnails: Tensor
    labels: tuple[str, ...] | None = None
    points: Tensor | None = None
    axes: tuple[str, ...] = ()
    clusters: Tensor | None = None
    centrality: Tensor | None = None
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    layout: Literal["map", "clusters", "outliers"] = "map"

    def panels(self) -> list[list[Panel]]:
        return [[Panel(picture, title, made=True)] for title, picture in self._sheets()]

    def lines(self) -> list[str]:
        numbers = [f"{name}: {float(value):.4g}" for name, value in self.numbers.items()]
        size = f"{len(self.ids)} pictures, {self.features.shape[1]} features"
        return [", ".join([size, *numbers]), *(title for title, _ in self._sheets() if title)]

    def farthest(self, axis: int, most: int = 12) -> list[int]:
        """The rows that lie farthest out on an axis, the farthest first."""
        assert self.points is not None
        return self.points[:, axis].sort(descending=True, stable=True).indices[:most].tolist()

    def _sheets(self) -> list[tuple[str, Tensor]]:
        """What is to be seen of the thumbnails: titles and pictures (3, H, W)."""
        paint = None if self.labels is None else charts.colours(self.labels, len(self.ids))[0]
        if self.layout == "clusters":
            return self._cluster_rows()
        if self.layout == "outliers" and self.points is not None:
            sheets = []
            for axis, name in enumerate(self.axes):
                rows = self.farthest(axis)
                far = ", ".join(f"{shortened(self.ids[i])} ({self.points[i, axis]:.3g})" for i in rows[:1])
                sheets.append((f"by {name}: {far}", self._strip(rows, 6, None)))
            return sheets
        if self.points is None or self.points.shape[1] < 2:
            rows = charts.spread(len(self.ids), 100)
            return [("", self._strip(rows, math.ceil(math.sqrt(len(rows))), paint))]
        return [("", charts.sheet(self.thumbnails, self.points, paint))]

    def _strip(self, rows: list[int], columns: int, paint: Sequence[charts.Colour] | None) -> Tensor:
        frames = None if paint is None else [paint[i] for i in rows]
        return charts.strip(charts.framed(self.thumbnails[rows], frames), columns)

    def _cluster_names(self) -> tuple[str, ...]:
        assert self.clusters is not None
        return tuple(f"cluster {n}" for n in self.clusters.tolist())

    def _cluster_rows(self) -> list[tuple[str, Tensor]]:
        """Every cluster, the largest first: those in its middle, and what they are."""
        assert self.clusters is not None and self.centrality is not None
        paint = charts.colours(self._cluster_names(), len(self.ids))[0]
        sheets = []
        for cluster, size in Counter(self.clusters.tolist()).most_common():
            inside = (self.clusters == cluster).nonzero()[:, 0]
            rows = inside[self.centrality[inside].sort(stable=True).indices].tolist()
            title = f"cluster {cluster}: {size}"
            if self.labels is not None:
                name, most = Counter(self.labels[i] for i in rows).most_common(1)[0]
                title += f", {most / size:.0%} {name}"
            sheets.append((title, self._strip(rows[:10], 10, paint)))
        return sheets

    def figure(self) -> Figure:
        """The points beside their thumbnails; without points, how alike the pictures are."""
        sheets = self._sheets()[:_ROWS]
        figure = charts.page(max(4.8, 0.62 * len(sheets)))
        left, right = cast(Sequence[Any], figure.subfigures(1, 2, width_ratios=(1, 1.08)))
        chart = left.subplots()
        if self.points is None:
            self._draw_likeness(chart)
        else:
            self._draw_points(chart)
        numbers = [f"{name}: {float(value):.3g}" for name, value in self.numbers.items()]
        groups = [", ".join(numbers[start : start + 3]) for start in range(0, len(numbers), 3)]
        chart.set_title("\n".join(groups), fontsize=8, loc="left", color="0.3")
        for axes, (title, picture) in zip(
            right.subplots(len(sheets), squeeze=False)[:, 0], sheets, strict=True
        ):
            charts.show(axes, picture, title)
        return figure

    def _draw_points(self, chart: Any) -> None:
        assert self.points is not None
        labels = self.labels
        if self.layout == "clusters" and self.clusters is not None:
            labels = self._cluster_names()
        points = self.points if self.points.shape[1] > 1 else self.points.expand(-1, 2)
        charts.scatter(chart, points, *charts.colours(labels, len(points)))
        for name, label in zip(self.axes, (chart.set_xlabel, chart.set_ylabel), strict=False):
            label(name, fontsize=9)
        if self.layout == "outliers":
            for place in dict.fromkeys(n for axis in (0, 1) for n in self.farthest(axis, 3)):
                where = self.points[place, :2].tolist()
                chart.annotate(
                    shortened(self.ids[place]), where, (4, 3), textcoords="offset points", fontsize=7
                )
        elif not self.axes:
            chart.set_xticks([]), chart.set_yticks([])

    def _draw_likeness(self, chart: Any) -> None:
        """The cosine between every two pictures' features, their mean taken off, class by class."""
        rows = charts.spread(len(self.ids), 600)
        if self.labels is not None:
            rows.sort(key=lambda i: self.labels[i])  # type: ignore[index]
        features = self.features[rows].float().cpu()
        features = F.normalize(features - features.mean(0))
        image = chart.imshow(
            (features @ features.T).numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="antialiased"
        )
        chart.figure.colorbar(image, ax=chart, shrink=0.6, label="cosine of features", location="bottom")
        chart.set_xticks([]), chart.set_yticks([])
        if self.labels is not None:
            sizes = Counter(self.labels[i] for i in rows)
            ends = list(itertools.accumulate(sizes.values()))
            if len(ends) <= 20:
                middles = [end - size / 2 for end, size in zip(ends, sizes.values(), strict=True)]
                chart.set_yticks(middles, list(sizes), fontsize=8)
                for end in ends[:-1]:
                    chart.axhline(end - 0.5, color="0.2", linewidth=0.5)
                    chart.axvline(end - 0.5, color="0.2", linewidth=0.5)
