"""``PartImportance``, the result of ``part_importance``: drops of the logit and sums of maps by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from phosphene import Result
from phosphene.images import colorize
from phosphene.images.charts import plain_label
from phosphene.results import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class PartImportance(Result):
    """The importance of objects' parts, measured by removing them and explained by maps, of N images.

    ``names`` are the method and the baselines, ``classes`` the class that each image's map explains,
    ``parts`` the names of its parts. ``drops`` (N, P) is the logit's drop without each part, ``sums``
    (names, N, P) each map's sum over it; both are 0 beyond an image's own parts. ``rank_correlation`` and
    ``top_part`` (names, N) compare them: Spearman's correlation, and whether the largest sum is the largest
    drop; ``chance`` (N,) is the latter's probability by chance. ``images`` (E, C, H, W), ``part_maps``
    (E, H, W), the number of each pixel's part from 1, and ``maps`` (names, E, H, W), raw, are those of the
    first images.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    parts: tuple[tuple[str, ...], ...]
    drops: Tensor
    sums: Tensor
    rank_correlation: Tensor
    top_part: Tensor
    chance: Tensor
    images: Tensor
    part_maps: Tensor
    maps: Tensor

    def class_importance(self) -> dict[str, dict[str, float]]:
        """The mean drop of each part of each class: {"cat": {"ears": 2.5, ...}, ...}."""
        collected: dict[str, dict[str, list[float]]] = {}
        for label, names, drops in zip(self.classes, self.parts, self.drops.tolist(), strict=True):
            of_class = collected.setdefault(label, {})
            for name, drop in zip(names, drops, strict=False):
                of_class.setdefault(name, []).append(drop)
        return {
            label: {name: sum(values) / len(values) for name, values in of_class.items()}
            for label, of_class in sorted(collected.items())
        }

    def table(self) -> dict[str, list[Any]]:
        """A row for each image and part: the drop of the logit, and the sum of each map."""
        cells = [(n, p) for n, names in enumerate(self.parts) for p in range(len(names))]
        table: dict[str, list[Any]] = {
            "image": [n for n, _ in cells],
            "class": [self.classes[n] for n, _ in cells],
            "part": [self.parts[n][p] for n, p in cells],
            "drop": [float(self.drops[cell]) for cell in cells],
        }
        for s, name in enumerate(self.names):
            table[name] = [float(self.sums[s, n, p]) for n, p in cells]
        return table

    def lines(self) -> list[str]:
        chance = float(self.chance.mean())
        return [
            f"{name}: rank correlation {float(rank.mean()):.3f}, most important part right in "
            f"{float(hits.mean()):.0%} of {len(hits)} images (by chance {chance:.0%})"
            for name, rank, hits in zip(self.names, self.rank_correlation, self.top_part, strict=True)
        ]

    def colored_maps(self) -> Tensor:
        """The positive part of the method's maps in colors, (E, 3, H, W), each scaled separately."""
        maps = self.maps[0].clamp(min=0)
        scales = maps.flatten(1).float().cpu().quantile(0.99, dim=1).clamp(min=1e-30).to(maps)
        return colorize(maps / scales[:, None, None], "inferno")

    def panels(self) -> list[list[Panel]]:
        pairs = zip(self.images, self.colored_maps(), self.classes, strict=False)
        return [[Panel(image, name), Panel(colored, self.names[0])] for image, colored, name in pairs]

    def draw(self) -> Figure:
        from matplotlib.figure import Figure

        rows, table_height = len(self.images), 0.24 * (1 + len(self.names))
        figure = Figure(figsize=(7.5, table_height + 1.75 * rows + 0.3), dpi=110)
        heights = [table_height + 0.3, *[1.75] * rows]
        table, *strips = figure.subfigures(1 + rows, 1, height_ratios=heights, squeeze=False)[:, 0]
        self._draw_table(table.add_axes((0, 0, 1, 1)))
        colored = self.colored_maps()
        for n, strip in enumerate(strips):
            axes = strip.subplots(1, 3, width_ratios=[1.55, 1.55, 3.4])
            strip.subplots_adjust(0.01, 0.12, 0.87, 0.88, wspace=0.06)
            for axis, image in zip(axes, (Panel(self.images[n]).image, colored[n]), strict=False):
                axis.imshow(image.permute(1, 2, 0).float().cpu().numpy())
                axis.set_axis_off()
                self._draw_outlines(axis, n)
            axes[0].set_title(plain_label(self.classes[n]), fontsize=8, pad=3)
            axes[1].set_title(plain_label(self.names[0].replace("_", " ")), fontsize=8, pad=3)
            self._draw_bars(axes[2], n)
        return figure

    def _draw_table(self, axis: Axes) -> None:
        axis.set_axis_off()
        axis.set_xlim(0, 1)
        axis.set_ylim(len(self.names) + 0.2, -1.4)
        axis.text(0.35, -0.8, "rank correlation", size=8, weight="bold", ha="center", va="center")
        axis.text(0.7, -0.8, "most important part right", size=8, weight="bold", ha="center", va="center")
        for row, name in enumerate(self.names):
            rank, hits = self.rank_correlation[row], self.top_part[row]
            error = f" ±{float(rank.std()) / len(rank) ** 0.5:.3f}" if len(rank) > 1 else ""
            chance = f" (by chance {float(self.chance.mean()):.0%})"
            axis.text(0.01, row, plain_label(name.replace("_", " ")), size=8, va="center")
            axis.text(0.35, row, f"{float(rank.mean()):.3f}{error}", size=8, ha="center", va="center")
            axis.text(0.7, row, f"{float(hits.mean()):.0%}{chance}", size=8, ha="center", va="center")

    def _draw_outlines(self, axis: Axes, n: int) -> None:
        height, width = self.part_maps[n].shape
        x, y = torch.arange(-1, width + 1), torch.arange(-1, height + 1)
        for number in range(1, 1 + len(self.parts[n])):
            # A border around the image closes the outlines of parts that reach its edge.
            mask = pad((self.part_maps[n] == number).float().cpu(), (1, 1, 1, 1))
            if mask.any():
                axis.contour(x.numpy(), y.numpy(), mask.numpy(), [0.5], colors="white", linewidths=0.5)

    def _draw_bars(self, axis: Axes, n: int) -> None:
        """Two bars for each part, the largest drop on top: the drop, and the map's sum in its scale."""
        count = len(self.parts[n])
        drops, sums = self.drops[n, :count].float().cpu(), self.sums[0, n, :count].float().cpu()
        order = drops.argsort()
        scale = float(drops.abs().max()) / max(float(sums.abs().max()), 1e-30)
        heights = torch.arange(count).numpy()
        scaled = (sums[order] * scale).numpy()
        axis.barh(
            heights + 0.2, drops[order].numpy(), 0.36, color="0.25", label="drop of the logit without it"
        )
        axis.barh(heights - 0.2, scaled, 0.36, color="C1", label="sum of the map, scaled")
        axis.set_yticks(heights.tolist(), [plain_label(self.parts[n][i]) for i in order.tolist()], fontsize=7)
        axis.yaxis.tick_right()
        axis.axvline(0, color="0.6", linewidth=0.8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "left", "right"]].set_visible(False)
        title = f"rank correlation {float(self.rank_correlation[0, n]):.2f}"
        axis.set_title(title, fontsize=8, pad=3)
        if n == 0:
            axis.legend(fontsize=6, frameon=False, loc="lower right")
