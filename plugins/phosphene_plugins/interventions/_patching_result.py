"""``PatchingEffects``: the change of a score by each replaced part of several layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor

from phosphene import UnknownName
from phosphene.images import charts, colorize, to_display
from phosphene.results import Panel, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The most images in the figure, and channels of each layer.
MAX_IMAGES, MAX_CHANNELS = 6, 10


@dataclass(frozen=True, eq=False, kw_only=True)
class PatchingEffects(Result):
    """The change of a target's score where parts of an image's activations are those of another image.

    ``effects`` (N, L, U): for each of L ``layers`` its parts in a row, filled up with zeros; ``of_layer``
    returns those of one layer. ``sizes``: of each layer (h, w) blocks of positions, or (C,) channels.
    ``layer_effects`` (N, L): of the entire layer; ``token_effects`` (N, L): of all tokens without a position
    in the image, such as a class token, 0 where there are none. ``scores`` and ``source_scores`` (N) of the
    ``images`` and of the ``sources`` (N, C, H, W).
    """

    per_image: ClassVar[tuple[str, ...]] = (
        *("images", "sources", "targets", "scores", "source_scores"),
        *("effects", "layer_effects", "token_effects"),
    )
    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "sources": "N C H W",
        "targets": "N",
        "scores": "N",
        "source_scores": "N",
        "layers": "L",
        "sizes": "L",
        "effects": "N L U",
        "layer_effects": "N L",
        "token_effects": "N L",
    }

    images: Tensor
    sources: Tensor
    targets: tuple[str, ...]
    scores: Tensor
    source_scores: Tensor
    layers: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    effects: Tensor
    layer_effects: Tensor
    token_effects: Tensor

    def of_layer(self, layer: str) -> Tensor:
        """The effects of one layer: (N, h, w) by block of positions, or (N, C) by channel.

        Raises UnknownName for a layer that is not among these.
        """
        if layer not in self.layers:
            raise UnknownName("layer", layer, self.layers, "this result")
        row = self.layers.index(layer)
        size = self.sizes[row]
        return self.effects[:, row, : math.prod(size)].unflatten(1, size)

    def panels(self) -> list[list[Panel]]:
        groups = []
        for n, image in enumerate(self.images):
            row = [
                Panel(image, f"{self.targets[n].partition(',')[0]} {float(self.scores[n]):.3g}"),
                Panel(self.sources[n], f"source {float(self.source_scores[n]):.3g}"),
            ]
            # One scale for all layers, so that their effects can be compared.
            largest = float(self.effects[n].abs().max()) or 1.0
            for number, layer in enumerate(self.layers):
                effect = self.of_layer(layer)[n] / largest / 2 + 0.5
                title = f"{layer}, all: {float(self.layer_effects[n, number]):+.2g}"
                if self.token_effects[n, number] != 0:
                    title += f", tokens: {float(self.token_effects[n, number]):+.2g}"
                row.append(Panel(self._effect_image(image, effect), title, is_output=True))
            groups.append(row)
        return groups

    def _effect_image(self, image: Tensor, effect: Tensor) -> Tensor:
        """Effects in [0, 1], 1/2 for none: blocks over the image, or channels in order of their effect."""
        height, width = image.shape[1:]
        if effect.ndim == 1:
            effect = effect.sort(descending=True).values[None]
            return F.interpolate(colorize(effect, "RdBu_r")[None], (height, width))[0]
        blocks = F.interpolate(effect[None, None].float(), (height, width))[0, 0]
        gray = to_display(image).mean(0, keepdim=True)
        return 0.35 * gray + 0.65 * colorize(blocks, "RdBu_r").to(gray)

    def lines(self) -> list[str]:
        lines = []
        for n, target in enumerate(self.targets):
            scores = f"{float(self.scores[n]):.3g}, source {float(self.source_scores[n]):.3g}"
            lines.append(f"{n:03d}  {target}: {scores}")
            for number, layer in enumerate(self.layers):
                effects = self.of_layer(layer)[n]
                best = int(effects.abs().flatten().argmax())
                part = f"channel {best}" if effects.ndim == 1 else f"block {divmod(best, effects.shape[1])}"
                value = float(effects.flatten()[best])
                entire = float(self.layer_effects[n, number])
                lines.append(f"     {layer}: {entire:+.3g} in all, most by {part}: {value:+.3g}")
        return lines

    def draw(self) -> Figure:
        """Each image, its source, and the effects in each layer: maps, or the channels of largest effect."""
        count = min(len(self.images), MAX_IMAGES)
        columns = 2 + len(self.layers)
        figure = charts.new_figure(1.0 + 1.6 * count)
        grid = cast(Any, figure.subplots(count, columns, squeeze=False))
        of_channels = len(self.sizes[0]) == 1
        for n, panels in enumerate(self.panels()[:count]):
            for number, (axes, panel) in enumerate(zip(grid[n], panels, strict=True)):
                if of_channels and number > 1:
                    self._draw_channels(axes, n, number - 2)
                else:
                    charts.show_image(axes, panel.image)
                most = 24 if columns < 7 else 150 // columns
                title = "\n".join(charts.plain_label(line, most) for line in panel.title.split(", ", 1))
                axes.set_title(title, fontsize=7, loc="left")
        if not of_channels:
            from matplotlib.cm import ScalarMappable
            from matplotlib.colors import Normalize

            scale = ScalarMappable(Normalize(-1, 1), "RdBu_r")
            bar = figure.colorbar(scale, ax=list(grid[:, -1]), shrink=0.7, ticks=[-1, 0, 1])
            bar.set_label("effect / largest", fontsize=7)
            bar.ax.tick_params(labelsize=7)
        return figure

    def _draw_channels(self, axes: Any, n: int, number: int) -> None:
        """The channels of largest effect on image ``n``, on one scale for all layers."""
        effects = self.of_layer(self.layers[number])[n]
        order = effects.abs().sort(descending=True, stable=True).indices[:MAX_CHANNELS]
        values = effects[order].float().cpu()
        colors = ["tab:red" if value > 0 else "tab:blue" for value in values.tolist()]
        axes.barh(range(len(order)), values.tolist(), color=colors)
        axes.set_yticks(range(len(order)), [str(channel) for channel in order.tolist()], fontsize=6)
        low, high = (float(v) for v in self.effects[n].aminmax())
        axes.set_xlim(1.05 * min(low, 0) - 1e-12, 1.05 * max(high, 0) + 1e-12)
        axes.invert_yaxis(), axes.axvline(0, color="0.4", linewidth=0.8)
        axes.tick_params(axis="x", labelsize=6), axes.spines[["top", "right"]].set_visible(False)
