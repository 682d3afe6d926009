"""Scatter plots, thumbnails, image grids and literal text with matplotlib."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties


Color = tuple[float, float, float]


GRAY: Color = (0.62, 0.62, 0.62)


#: Number of classes with a color of their own; more cannot be distinguished by eye.
_MAX_COLORS = 10


#: Largest number of thumbnails in ``thumbnail_scatter``.
_MAX_THUMBNAILS = 400


#: Characters of a line of text in a figure, and its lines; the rest of a long name is cut off.
_MAX_CHARACTERS, _MAX_LINES = 72, 16

#: Characters of a tick's label.
_MAX_LABEL = 36


def new_figure(height: float = 4.6) -> Figure:
    """A figure 9 inches wide at 150 dpi, with constrained layout."""
    from matplotlib.figure import Figure

    return Figure(figsize=(9, height), dpi=150, layout="constrained")


def printable(text: str) -> str:
    """The text in one line, with a space for each character that is not printed, such as a tab or NUL."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def plain_label(text: str, most: int = 24) -> str:
    """A name as a label: lines of at most ``most`` characters that the font has."""
    from matplotlib.font_manager import FontProperties

    return "\n".join(_plain_line(line, FontProperties(), most) for line in text.split("\n")[:_MAX_LINES])


def show_text_literally(figure: Figure) -> None:
    """Draw every text of a figure as it is: "$5 to $10" is no formula.

    Characters that the font does not have are drawn as a square, which matplotlib would warn of; long lines
    are cut off. Numbers on a logarithmic axis are formulas of matplotlib's own and are left alone.
    """
    from matplotlib.axis import Axis
    from matplotlib.category import StrCategoryFormatter
    from matplotlib.text import Text
    from matplotlib.ticker import FixedFormatter, FuncFormatter

    axes: Any = [artist for artist in _drawn_artists(figure) if isinstance(artist, Axis)]
    for axis in axes:
        if isinstance(axis.get_major_formatter(), (FuncFormatter, FixedFormatter, StrCategoryFormatter)):
            labels = [label.get_text() for label in axis.get_ticklabels()]
            names = [plain_label(label, _MAX_LABEL) for label in labels]
            if names != labels:
                limits = axis.get_view_interval()
                axis.set_ticks(axis.get_ticklocs(), names)  # may widen the limits
                axis.set_view_interval(*limits, ignore=True)
    logarithmic = [axis for axis in axes if axis.get_scale() == "log"]
    ticks = [tick for axis in logarithmic for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())]
    formulas = {id(text) for tick in ticks for text in (tick.label1, tick.label2)}
    texts = [artist for artist in _drawn_artists(figure) if isinstance(artist, Text)]
    for text in texts:
        if id(text) in formulas:
            continue
        text.set_parse_math(False)
        lines = text.get_text().split("\n")[:_MAX_LINES]
        font = text.get_fontproperties()
        text.set_text("\n".join(_plain_line(line, font, _MAX_CHARACTERS) for line in lines))


def _drawn_artists(artist: Artist) -> Iterator[Artist]:
    """An artist and all inside it, without the ticks and labels of axes that are off."""
    from matplotlib.axes import Axes

    yield artist
    hidden = [artist.xaxis, artist.yaxis] if isinstance(artist, Axes) and not artist.axison else []
    for child in artist.get_children():
        if child not in hidden:
            yield from _drawn_artists(child)


def _plain_line(text: str, properties: FontProperties, most: int) -> str:
    """The text in one line, shortened, with a square for each character that no font of the family has."""
    line = printable(text)
    line = line if len(line) <= most else f"{line[: most - 1]}…"
    if line.isascii():
        return line
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = [get_font(findfont(FontProperties(family=[name]))) for name in properties.get_family()]
    return "".join(c if any(font.get_char_index(ord(c)) for font in fonts) else "□" for c in line)


def label_colors(labels: Sequence[str] | None, count: int) -> tuple[list[Color], dict[str, Color]]:
    """Colors of ``count`` points by their labels, and the legend: label -> color.

    The ten most frequent labels have a color each; all others are gray.
    """
    from matplotlib import colormaps

    if labels is None:
        return [colormaps["tab10"](0)[:3]] * count, {}
    frequent = [name for name, _ in Counter(sorted(labels)).most_common(_MAX_COLORS)]
    legend = {name: colormaps["tab10"](n)[:3] for n, name in enumerate(sorted(frequent))}
    if len(set(labels)) > _MAX_COLORS:
        legend["others"] = GRAY
    return [legend.get(name, GRAY) for name in labels], legend


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
    hide_axes(axes)


def hide_axes(axes: Axes) -> None:
    """Draw neither ticks nor frame; the position of the title, unlike ``set_axis_off``, needs no ticks."""
    axes.set_axis_off()
    axes.xaxis.set_visible(False)
    axes.yaxis.set_visible(False)


def frame_thumbnails(thumbnails: Tensor, colors: Sequence[Color] | None = None) -> Tensor:
    """Thumbnails (N, 3, s, s), uint8, as float images with a frame of the given colors, default white."""
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
