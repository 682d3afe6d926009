"""``Cascade``, the result of ``sanity_check``: maps while a network's weights are randomized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from phosphene import Result
from phosphene.images import colorize
from phosphene.images.charts import plain_label
from phosphene.results import Panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class Cascade(Result):
    """How maps change while a network's weights are randomized from the top down.

    ``name`` is the method, ``stages`` the lowest randomized layer of each stage; ``rank`` (rank correlation)
    and ``ssim`` (stages, N) are the similarity to the trained network's maps; ``images`` (E, C, H, W) the
    first images, ``maps`` (1 + stages, E, H, W) their maps, the trained network's first.
    """

    name: str
    stages: tuple[str, ...]
    rank: Tensor
    ssim: Tensor
    images: Tensor
    maps: Tensor

    def lines(self) -> list[str]:
        rows = zip(self.stages, self.rank.mean(1).tolist(), self.ssim.mean(1).tolist(), strict=True)
        return [
            f"down to {stage}: rank correlation {rank:.3f}, SSIM {ssim:.3f}" for stage, rank, ssim in rows
        ]

    def table(self) -> dict[str, list[Any]]:
        """A row for each stage and image: rank correlation and SSIM with the trained network's map."""
        cells = [(s, n) for s in range(len(self.stages)) for n in range(self.rank.shape[1])]
        return {
            "stage": [self.stages[s] for s, _ in cells],
            "image": [n for _, n in cells],
            "rank_correlation": [float(self.rank[cell]) for cell in cells],
            "ssim": [float(self.ssim[cell]) for cell in cells],
        }

    def panels(self) -> list[list[Panel]]:
        groups = []
        for image, maps in zip(self.images, self.maps.unbind(1), strict=True):
            scales = maps.flatten(1).float().cpu().quantile(0.99, dim=1).clamp(min=1e-30).to(maps.device)
            colored = zip(
                colorize(maps / scales[:, None, None], "inferno"), ("trained", *self.stages), strict=True
            )
            groups.append([Panel(image, self.name), *(Panel(picture, title) for picture, title in colored)])
        return groups

    def draw(self) -> Figure:
        from matplotlib.figure import Figure

        groups = self.panels()
        columns, side = len(groups[0]), 1.25
        figure = Figure(figsize=(max(6.5, side * columns), 2.4 + 1.4 * len(groups)), dpi=110)
        chart, *strips = figure.subfigures(
            1 + len(groups), 1, height_ratios=[2.4] + [1.4] * len(groups), squeeze=False
        )[:, 0]
        axis = chart.subplots()
        chart.subplots_adjust(0.08, 0.2, 0.98, 0.88)
        for name, values in (("rank correlation", self.rank), ("SSIM", self.ssim)):
            axis.plot([1.0, *values.mean(1).tolist()], marker="o", label=name)
        axis.set_xticks(range(1 + len(self.stages)), ["trained", *map(plain_label, self.stages)])
        axis.axhline(0, color="0.8", linewidth=0.8)
        axis.set_title(f"{self.name.replace('_', ' ')}: similarity to the trained network's maps", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        for strip, group in zip(strips, groups, strict=True):
            axes = strip.subplots(1, columns, squeeze=False)[0]
            strip.subplots_adjust(0.005, 0.01, 0.995, 0.86, wspace=0.04)
            for panel_axis, panel in zip(axes, group, strict=True):
                panel_axis.set_axis_off()
                panel_axis.imshow(panel.image.permute(1, 2, 0).float().cpu().numpy())
                panel_axis.set_title(panel.title, fontsize=6.5, pad=2)
        return figure
