"""``panel``: several results of the same images side by side, methods by images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from ..errors import InputError, type_name, value_repr
from ..images.charts import plain_label, show_text_literally
from ..images.map_style import map_style
from ..torch_state import cpu_by_default
from .base import Panel, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Inches of a panel's longer side, of the heading and the row titles, and between panels.
_SIDE, _HEADING, _GAP = 1.4, 0.3, 0.06


@cpu_by_default()
def panel(
    results: Sequence[Result] | Mapping[str, Result],
    *,
    cmap: str | None = None,
    alpha: float | None = None,
    titles: Sequence[str] | None = None,
    row_titles: Sequence[str] | Literal[False] | None = None,
    dpi: float = 200,
) -> Figure:
    """A figure with a row for each image and a column for each result, the images in the first column.

    Args:
        results: results of the same images, such as maps of several methods; the keys of a mapping are the
            columns' titles.
        cmap: matplotlib's name of the color map of maps.
        alpha: opacity of maps that are laid over images, 0 to 1; default: 1/2, less below a quarter of the
            largest value, and 0 at 0.
        titles: the columns' titles; default: the methods' names.
        row_titles: a title for each image, such as its class; default: the first result's titles, where all
            results have the same; False for none.
        dpi: dots per inch.

    Raises:
        InputError: no results, results of different images or without one output per image, or another
            number of titles.

    Example::
        from phosphene import run
        from phosphene.results import panel, write_figure

        results = [run(name, images="builtin:scenes/2") for name in ("saliency", "grad_cam")]
        write_figure(panel(results, row_titles=["a", "b"]), "methods.pdf")
    """
    from matplotlib.figure import Figure

    named = dict(results) if isinstance(results, Mapping) else None
    listed = list(results.values()) if isinstance(results, Mapping) else list(results)
    if not listed:
        raise InputError("a panel needs one result or more")
    for number, result in enumerate(listed):
        if not isinstance(result, Result):
            raise InputError(f"result {number} is {type_name(result)}, not a Result")
    if titles is None:
        titles = list(named) if named is not None else [_method_name(result) for result in listed]
    if len(titles) != len(listed):
        raise InputError(f"{len(listed)} results need one title each, not {len(titles)}")
    with map_style(cmap, alpha):
        columns = [_images_and_outputs(result, number) for number, result in enumerate(listed)]
    first = columns[0]
    for number, column in enumerate(columns):
        images = [image for image, _ in column]
        same = len(column) == len(first) and all(
            image.image.shape == other.image.shape and bool((image.image == other.image).all())
            for image, (other, _) in zip(images, first, strict=False)
        )
        if not same:
            raise InputError(f"the images of result {number} are not those of result 0")
    rows = [[image, *(column[n][1] for column in columns)] for n, (image, _) in enumerate(first)]
    names = _row_titles(rows, row_titles)
    _, height, width = rows[0][0].image.shape
    scale, margin = _SIDE / max(height, width), _HEADING * any(names)
    cell_width, cell_height = scale * width + _GAP, scale * height + _GAP
    total_width, total_height = margin + cell_width * len(rows[0]), _HEADING + cell_height * len(rows)
    figure = Figure(figsize=(total_width, total_height), dpi=dpi)
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    figure.subplots_adjust(
        left=margin / total_width,
        bottom=_GAP / total_height,
        right=1 - _GAP / total_width,
        top=1 - _HEADING / total_height,
        wspace=_GAP / (scale * width),
        hspace=_GAP / (scale * height),
    )
    for row, row_axes, name in zip(rows, axes, names, strict=True):
        for item, axis in zip(row, row_axes, strict=True):
            pixels = item.image.permute(1, 2, 0).float().cpu().numpy()
            axis.imshow(pixels, interpolation="nearest" if max(pixels.shape) < 128 else "antialiased")
            axis.set_xticks([]), axis.set_yticks([]), axis.spines[:].set_visible(False)
        row_axes[0].set_ylabel(plain_label(name, 18), fontsize=7)
    for axis, title in zip(axes[0], ("image", *titles), strict=True):
        axis.set_title(plain_label(title, 18), fontsize=8, pad=3)
    show_text_literally(figure)
    return figure


def _method_name(result: Result) -> str:
    return result.provenance.method.rpartition(".")[2] if result.provenance else type(result).__name__


def _images_and_outputs(result: Result, number: int) -> list[tuple[Panel, Panel]]:
    """The input image and the first output of each group of panels."""
    pairs = []
    for group in result.panels():
        inputs, outputs = ([p for p in group if p.is_output is output] for output in (False, True))
        if not inputs or not outputs:
            raise InputError(
                f"result {number}, {type_name(result)}, has no output beside each image: "
                "panel() is for maps, adversarial examples and changed images"
            )
        pairs.append((inputs[0], outputs[0]))
    return pairs


def _row_titles(rows: list[list[Panel]], chosen: Sequence[str] | Literal[False] | None) -> list[str]:
    if chosen is False:
        return [""] * len(rows)
    if chosen is None:
        same = all(len({item.title for item in row[1:]}) == 1 for row in rows)
        return [row[1].title if same else "" for row in rows]
    if isinstance(chosen, str) or len(chosen) != len(rows):
        raise InputError(f"row_titles need a text for each of {len(rows)} images, not {value_repr(chosen)}")
    return list(chosen)
