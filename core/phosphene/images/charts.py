"""Scatter plots, thumbnails and image grids with matplotlib."""

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


#: Number of classes with a colour of their own; more cannot be distinguished by eye.
_MAX_COLORS = 10


#: Largest number of thumbnails in ``thumbnail_scatter``.
_MAX_THUMBNAILS = 400


def new_figure(height: float = 4.6) -> Figure:
    """A figure 9 inches wide at 150 dpi, with constrained layout."""
    from matplotlib.figure import Figure

    return Figure(figsize=(9, height), dpi=150, layout="constrained")


def label_colors(labels: Sequence[str] | None, count: int) -> tuple[list[Color], dict[str, Color]]:
    """Colours of ``count`` points by their labels, and the legend: label -> colour.

    The ten most frequent labels have a colour each; all others are grey.
    """
    from matplotlib import colormaps

    if labels is None:
        return [colormaps["tab10"](0)[:3]] * count, {}
    frequent = [name for name, _ in Counter(sorted(labels)).most_common(_MAX_COLORS)]
    legend = {name: colormaps["tab10"](n)[:3] for n, name in enumerate(sorted(frequent))}
    if len(set(labels)) > _MAX_COLORS:
        legend["others"] = GREY
    return [legend.get(name, GREY) for name in labels], legend


def scatter(axes: Axes, points: Tensor, colors: Sequence[Color], legend: dict[str, Color]) -> None:
    """Scatter plot of points (N, 2), with the legend below unless it is empty."""
    x, y = points[:, :2].cpu().double().numpy().T
    size = min(36.0, max(3.0, 6000 / len(x)))
    axes.scatter(x, y, s=size, c=list(colors), alpha=0.8, linewidths=0)
    axes.tick_params(labelsize=7, colors="0.4")
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        marks = [axes.scatter([], [], s=24, color=color, label=name) for name, color in legend.items()]
        columns = min(4, len(marks))
        axes.legend(
            handles=marks, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=columns, fontsize=8,
            frameon=False, handletextpad=0.2, columnspacing=1.0,
        )  # fmt: skip


def show_image(axes: Axes, image: Tensor, title: str = "") -> None:
    """Show an image (3, H, W) with a title and without ticks."""
    axes.imshow(image.permute(1, 2, 0).float().cpu().numpy(), interpolation="antialiased")
    axes.set_title(title, fontsize=8, loc="left")
    axes.set_axis_off()


def frame_thumbnails(thumbnails: Tensor, colors: Sequence[Color] | None = None) -> Tensor:
    """Thumbnails (N, 3, s, s), uint8, as float images with a frame of the given colours, default white."""
    images = thumbnails.float().cpu() / 255
    width = max(2, images.shape[2] // 12)
    frames = torch.ones(len(images), 3) if colors is None else torch.tensor(list(colors), dtype=torch.float32)
    side = images.shape[2] + 2 * width
    framed = frames[:, :, None, None].repeat(1, 1, side, side)
    framed[:, :, width:-width, width:-width] = images
    return framed


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Images (N, 3, h, w) in a grid of ``columns``, filled up with white: (3, H, W)."""
    rows = max(1, math.ceil(len(images) / columns))
    blank = images.new_ones(rows * columns - len(images), *images.shape[1:])
    grid = torch.cat([images, blank]).unflatten(0, (rows, columns))
    return grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def evenly_spaced(count: int, limit: int) -> list[int]:
    """At most ``limit`` indices below ``count``, evenly spaced."""
    return sorted({n * count // min(count, limit) for n in range(min(count, limit))})


def thumbnail_scatter(thumbnails: Tensor, points: Tensor, colors: Sequence[Color] | None) -> Tensor:
    """Thumbnails (N, 3, s, s) on a grid, each near to its point: (3, H, W).

    Cells are the linear assignment of least squared distance between the grid and the ranks of the points
    (N, 2), so that dense clusters are spread out. Above 400 thumbnails an even selection is used.
    """
    from scipy.optimize import linear_sum_assignment

    indices = evenly_spaced(len(points), _MAX_THUMBNAILS)
    columns = math.ceil(math.sqrt(len(indices)))
    rows = math.ceil(len(indices) / columns)
    ranks = points[indices, :2].cpu().double().argsort(dim=0, stable=True).argsort(dim=0).numpy()
    positions = (ranks + 0.5) / len(indices)
    y, x = np.divmod(np.arange(rows * columns), columns)
    cells: NDArray[np.float64] = np.stack([(x + 0.5) / columns, 1 - (y + 0.5) / rows], 1)
    distances = np.square(positions[:, None] - cells[None]).sum(2)
    _, assigned_cells = linear_sum_assignment(distances)
    frame_colors = None if colors is None else [colors[i] for i in indices]
    images = frame_thumbnails(thumbnails[indices], frame_colors)
    grid = images.new_ones(rows * columns, *images.shape[1:])
    grid[torch.from_numpy(assigned_cells)] = images
    return image_grid(grid, columns)
