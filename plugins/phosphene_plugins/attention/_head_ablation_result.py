"""``HeadAblation``: the drop of a score without each head, drawn as layers by heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from phosphene.images import charts
from phosphene.results import Panel, Result

from ._tokens import layer_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadAblation(Result):
    """The drop of a target's score without each of M heads of all layers.

    ``images`` (N, C, H, W); ``scores`` (N), of the network as it is; ``drops`` (N, M), positive where the
    score is lower without the head. ``layers`` and ``heads`` (M): the layer and the number of each head;
    ``targets`` (N): the target of each image.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "scores": "N",
        "drops": "N M",
        "targets": "N",
        "layers": "M",
        "heads": "M",
    }
    per_image: ClassVar[tuple[str, ...]] = ("images", "scores", "drops", "targets")

    images: Tensor
    scores: Tensor
    drops: Tensor
    targets: tuple[str, ...]
    layers: tuple[str, ...]
    heads: tuple[int, ...]

    def most_important(self, count: int = 5) -> list[tuple[str, int, float]]:
        """The heads of largest mean drop: layer, number of the head, drop."""
        mean = self.drops.mean(0)
        order = mean.sort(descending=True, stable=True).indices[:count].tolist()
        return [(self.layers[n], self.heads[n], float(mean[n])) for n in order]

    def panels(self) -> list[list[Panel]]:
        groups = []
        for number, image in enumerate(self.images):
            n = int(self.drops[number].argmax())
            drop, score = float(self.drops[number, n]), float(self.scores[number])
            title = f"{self.targets[number]} {score:.3g}: {self.layers[n]} head {self.heads[n]} {-drop:+.3g}"
            groups.append([Panel(image, title)])
        return groups

    def draw(self) -> Figure:
        from matplotlib.figure import Figure

        rows, mean = layer_rows(self.layers), self.drops.float().cpu().mean(0)
        most = max(map(len, rows.values()))
        grid = torch.full((len(rows), most), torch.nan)
        for row, heads in enumerate(rows.values()):
            grid[row, : len(heads)] = mean[heads]
        largest = float(mean.abs().max()) or 1.0
        figure = Figure(
            figsize=(max(4.0, 0.4 * most + 3), max(2.2, 0.3 * len(rows) + 1)), dpi=110, layout="constrained"
        )
        axes = figure.subplots()
        image = axes.imshow(grid.numpy(), "RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
        axes.set_yticks(range(len(rows)), [charts.plain_label(name, 30) for name in rows], fontsize=6)
        axes.set_xticks(range(most))
        axes.set_xlabel("head", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        names = list(dict.fromkeys(self.targets))
        what = ", ".join(names) if len(names) < 4 else f"{len(names)} targets"
        axes.set_title(f"mean drop of the score of {charts.plain_label(what, 40)}", fontsize=8, loc="left")
        figure.colorbar(image).ax.tick_params(labelsize=7)
        return figure
