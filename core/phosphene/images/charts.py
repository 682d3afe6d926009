"""Scatter plots, thumbnails and image grids drawn with matplotlib."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Color = tuple[float, float, float]


GREY: Color = (0.62, 0.62, 0.62)


#: So many classes have a colour of their own; the eye tells no more apart.
_COLOURS = 10


#: The most thumbnails on a sheet.
_SHEET = 400


def new_figure(height: float = 4.6) -> Figure:
    """A figure as wide as a page, sharp at 900 pixels and at twice that."""
    from matplotlib.figure import Figure

    return Figure(figsize=(9, height), dpi=150, layout="constrained")


def label_colors(labels: Sequence[str] | None, count: int) -> tuple[list[Color], dict[str, Color]]:
    """A colour for each of ``count`` points, and what they mean: the most frequent classes have one each."""
    from matplotlib import colormaps

    if labels is None:
        return [colormaps["tab10"](0)[:3]] * count, {}
    frequent = [name for name, _ in Counter(sorted(labels)).most_common(_COLOURS)]
    meaning = {name: colormaps["tab10"](n)[:3] for n, name in enumerate(sorted(frequent))}
    if len(set(labels)) > _COLOURS:
        meaning["others"] = GREY
    return [meaning.get(name, GREY) for name in labels], meaning


def scatter(axes: Axes, points: Tensor, paint: Sequence[Color], meaning: dict[str, Color]) -> None:
    """Points (N, 2), with a legend below where the colours mean something."""
    x, y = points[:, :2].double().cpu().numpy().T
    size = min(36.0, max(3.0, 6000 / len(x)))
    axes.scatter(x, y, s=size, c=list(paint), alpha=0.8, linewidths=0)
    axes.tick_params(labelsize=7, colors="0.4")
    axes.spines[["top", "right"]].set_visible(False)
    if meaning:
        marks = [axes.scatter([], [], s=24, color=colour, label=name) for name, colour in meaning.items()]
        columns = min(4, len(marks))
        axes.legend(
            handles=marks, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=columns, fontsize=8,
            frameon=False, handletextpad=0.2, columnspacing=1.0,
        )  # fmt: skip


def show_image(axes: Axes, picture: Tensor, title: str = "") -> None:
    """A picture (3, H, W) without axes."""
    axes.imshow(picture.permute(1, 2, 0).float().cpu().numpy(), interpolation="antialiased")
    axes.set_title(title, fontsize=8, loc="left")
    axes.set_axis_off()


def frame_thumbnails(thumbnails: Tensor, paint: Sequence[Color] | None = None) -> Tensor:
    """Thumbnails (n, 3, s, s) of bytes as floats in frames, coloured or white."""
    pictures = thumbnails.float().cpu() / 255
    edge = max(2, pictures.shape[2] // 12)
    frames = torch.ones(len(pictures), 3) if paint is None else torch.tensor(list(paint), dtype=torch.float32)
    side = pictures.shape[2] + 2 * edge
    canvas = frames[:, :, None, None].repeat(1, 1, side, side)
    canvas[:, :, edge:-edge, edge:-edge] = pictures
    return canvas


def image_grid(pictures: Tensor, columns: int) -> Tensor:
    """Pictures (n, 3, h, w) side by side in rows of ``columns``, white where there are fewer: (3, H, W)."""
    rows = max(1, math.ceil(len(pictures) / columns))
    blank = pictures.new_ones(rows * columns - len(pictures), *pictures.shape[1:])
    grid = torch.cat([pictures, blank]).unflatten(0, (rows, columns))
    return grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most so many of ``count`` places, evenly spread."""
    return sorted({n * count // min(count, most) for n in range(min(count, most))})


def thumbnail_scatter(thumbnails: Tensor, points: Tensor, paint: Sequence[Color] | None) -> Tensor:
    """Thumbnails on a full grid, each as near to its point as they all can be: (3, H, W).

    Of very many an even choice is shown. The places are the linear assignment of least squared
    distance between the grid and the points' ranks, so that a dense heap is spread out.
    """
    from scipy.optimize import linear_sum_assignment

    chosen = evenly_spaced(len(points), _SHEET)
    columns = math.ceil(math.sqrt(len(chosen)))
    rows = math.ceil(len(chosen) / columns)
    ranks = points[chosen, :2].double().cpu().argsort(dim=0, stable=True).argsort(dim=0).numpy()
    places = (ranks + 0.5) / len(chosen)
    y, x = np.divmod(np.arange(rows * columns), columns)
    cells: NDArray[np.float64] = np.stack([(x + 0.5) / columns, 1 - (y + 0.5) / rows], 1)
    apart = np.square(places[:, None] - cells[None]).sum(2)
    _, taken = linear_sum_assignment(apart)
    pictures = frame_thumbnails(thumbnails[chosen], None if paint is None else [paint[i] for i in chosen])
    canvas = pictures.new_ones(rows * columns, *pictures.shape[1:])
    canvas[torch.from_numpy(taken)] = pictures
    return image_grid(canvas, columns)
