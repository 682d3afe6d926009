"""``ReceptiveField`` and ``ReceptiveFields``: the pixels that units of a layer depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from phosphene.images import charts, colorize, enlarge, overlay, to_display
from phosphene.results import Panel, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class ReceptiveField(Result):
    """How much a unit of a layer depends on each pixel.

    ``field`` (H, W): the mean over images of the sum over color channels of absolute derivatives; ``box``:
    top, left, bottom and right of the theoretical receptive field, the last two exclusive; ``center``: the
    pixel (y, x) at which the unit is centered; ``radii`` (S,): radius in pixels around the center that holds
    each of the ``shares`` of the field's sum; ``position``: the unit (y, x) on the layer's map; ``image``
    (C, H, W): the first image.
    """

    shapes: ClassVar[Mapping[str, str]] = {"field": "H W", "radii": "S", "shares": "S"}

    field: Tensor
    box: tuple[int, int, int, int]
    center: tuple[float, float]
    radii: Tensor
    shares: tuple[float, ...]
    layer: str
    position: tuple[int, int]
    image: Tensor
    count: int

    def lines(self) -> list[str]:
        top, left, bottom, right = self.box
        pairs = zip(self.shares, self.radii.tolist(), strict=True)
        radii = ", ".join(f"{share:.0%} within {radius:.3g} pixels" for share, radius in pairs)
        size = f"theoretical {bottom - top}x{right - left}"
        return [
            f"{self.layer} at {self.position[0]}, {self.position[1]}: {radii}; {size}, {self.count} images"
        ]

    def _drawn(self) -> Tensor:
        """The field's square root, which shows small values as well, as an image (3, H, W)."""
        return colorize((self.field / self.field.max()).sqrt().float(), "magma")

    def panels(self) -> list[list[Panel]]:
        factor = max(1, 160 // max(self.field.shape))
        heat = (self.field / self.field.max()).sqrt().float()
        return [
            [
                Panel(self.image),
                Panel(enlarge(self._drawn(), factor), self.lines()[0], is_output=True),
                Panel(overlay(to_display(self.image), heat)),
            ]
        ]

    def draw(self) -> Figure:
        """The field and the first image, with the theoretical field as a frame and the radii as circles."""
        from matplotlib.patches import Circle, Rectangle

        figure = charts.new_figure(4.4)
        axes = cast(Any, figure.subplots(1, 2))
        top, left, bottom, right = self.box
        for part, image in zip(axes, (self._drawn(), to_display(self.image)), strict=True):
            charts.show_image(part, image)
            frame = (left - 0.5, top - 0.5), right - left, bottom - top
            part.add_patch(Rectangle(*frame, fill=False, color="white", linewidth=2))
            part.add_patch(Rectangle(*frame, fill=False, color="black", linewidth=1, linestyle=":"))
            for radius in self.radii.tolist():
                circle = self.center[1], self.center[0]
                part.add_patch(Circle(circle, radius, fill=False, color="white", linewidth=2))
                part.add_patch(Circle(circle, radius, fill=False, color="tab:red", linewidth=1))
        axes[0].set_title(
            self.lines()[0].replace(": ", ":\n").replace("; ", "\n"), fontsize=7, loc="left", color="0.3"
        )
        return figure


@dataclass(frozen=True, eq=False, kw_only=True)
class ReceptiveFields(Result):
    """Theoretical receptive fields of the central unit of several layers.

    ``boxes`` (L, 4): top, left, bottom and right in pixels, the last two exclusive; ``strides`` (L, 2):
    pixels between the centers of neighboring units, y and x; ``sizes``
    (L, 2): height and width of the layers' maps; ``size``: of the image.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "layers": "L",
        "boxes": "L edges",
        "strides": "L axes",
        "sizes": "L axes",
    }

    layers: tuple[str, ...]
    boxes: Tensor
    strides: Tensor
    sizes: Tensor
    size: tuple[int, int]

    def lines(self) -> list[str]:
        rows = zip(self.layers, self.boxes.tolist(), self.strides.tolist(), self.sizes.tolist(), strict=True)
        return [
            f"{layer}: {bottom - top}x{right - left} pixels, stride {strides[0]:g}x{strides[1]:g}, "
            f"map {size[0]}x{size[1]}"
            for layer, (top, left, bottom, right), strides, size in rows
        ]

    def panels(self) -> list[list[Panel]]:
        height, width = self.size
        image = torch.ones(3, height, width)
        for n, (top, left, bottom, right) in reversed(list(enumerate(self.boxes.tolist()))):
            image[:, top:bottom, left:right] = 0.25 + 0.65 * (n + 1) / len(self.layers)
        factor = max(1, 160 // max(self.size))
        return [[Panel(enlarge(image, factor), "receptive fields", is_output=True)]]

    def draw(self) -> Figure:
        """The fields as nested frames, the deepest layer's outside, beside a table."""
        from matplotlib import colormaps
        from matplotlib.patches import Rectangle

        figure = charts.new_figure(4.6)
        left_part, right_part = cast(Any, figure.subplots(1, 2))
        height, width = self.size
        left_part.set_xlim(-0.5, width - 0.5), left_part.set_ylim(height - 0.5, -0.5)
        left_part.set_aspect("equal")
        for n, (top, left, bottom, right) in reversed(list(enumerate(self.boxes.tolist()))):
            color = colormaps["viridis"](0.1 + 0.8 * n / max(1, len(self.layers) - 1))
            box = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, color=color)
            left_part.add_patch(box)
        left_part.tick_params(labelsize=7, colors="0.4")
        right_part.set_axis_off()
        for n, line in enumerate(self.lines()):
            color = colormaps["viridis"](0.1 + 0.8 * n / max(1, len(self.layers) - 1))
            y = 1 - (n + 0.5) / len(self.layers)
            right_part.text(0.06, y, charts.plain_label(line, 72), fontsize=7, va="center")
            right_part.add_patch(Rectangle((0, y - 0.012), 0.03, 0.024, color=color))
        return figure
