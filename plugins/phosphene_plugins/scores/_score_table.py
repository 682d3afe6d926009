"""The table of scores: what was measured, how surely, and how it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from phosphene import Dataset, Model, Result
from phosphene.images import colorize
from phosphene.results import Panel

from ._evaluate_maps import Measure, Pool, Source, Table, Target, baselines, from_method, score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class Scores(Result):
    """How well maps do: a row for each method and baseline, a column for each score, for every model.

    ``values`` and their standard ``errors`` (models, rows, columns) are means over the first ``counts``
    pictures, ``each`` (models, rows, columns, P) what they are means of; nothing is known where the count
    is 0. ``higher`` tells of each column whether more is better. Of the first pictures, ``images``
    (E, C, H, W), there are the objects' ``masks`` and ``maps`` (models, rows, E, H, W).
    """

    models: tuple[str, ...]
    names: tuple[str, ...]
    columns: tuple[str, ...]
    higher: tuple[bool, ...]
    values: Tensor
    errors: Tensor
    counts: Tensor
    each: Tensor
    images: Tensor
    masks: Tensor | None
    maps: Tensor

    @classmethod
    def of(
        cls,
        table: Table,
        models: Sequence[str],
        sources: Sequence[Source],
        measures: Sequence[Measure],
        **rest: Any,
    ) -> Self:
        """The result of what was measured."""
        values, errors = means(table.each, table.counts)
        return cls(
            models=tuple(models),
            names=tuple(source.name for source in sources),
            columns=tuple(column for measure in measures for column in measure.columns),
            higher=tuple(up for measure in measures for up in measure.higher),
            values=values,
            errors=errors,
            counts=table.counts,
            each=table.each,
            images=table.images,
            masks=table.masks,
            maps=table.maps,
            **rest,
        )

    def value(self, name: str, column: str, model: str | None = None) -> float | None:
        """One cell's mean; None where it is not known."""
        where = (self.models.index(model) if model else 0, self.names.index(name), self.columns.index(column))
        return float(self.values[where]) if self.counts[where] else None

    def lines(self) -> list[str]:
        """The table in words, as Markdown writes one."""
        cells = [["", *(f"{column} {arrow}" for _, column, arrow in self._heads())]]
        cells += [[self._row_title(r), *(self._text(r, *place) for place in self._places())]
                  for r in range(len(self.names))]  # fmt: skip
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        padded = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in cells]
        padded.insert(1, ["-" * width for width in widths])
        return [f"| {' | '.join(row)} |" for row in padded]

    def panels(self) -> list[list[Panel]]:
        groups = []
        for m, model in enumerate(self.models):
            for e, image in enumerate(self.images):
                shown = zip(self.names, self.drawn(m, e), strict=True)
                groups.append([Panel(image, model), *(Panel(picture, name) for name, picture in shown)])
        return groups

    def drawn(self, m: int, e: int) -> Tensor:
        """A model's maps of a picture, (rows, 3, H, W), each by its own scale."""
        maps = self.maps[m, :, e]
        # A few pixels far above the rest would leave the picture black.
        tops = maps.flatten(1).float().quantile(0.99, dim=1).clamp(min=1e-30)
        return colorize(maps / tops[:, None, None], "inferno")

    def figure(self) -> Figure:
        from matplotlib.figure import Figure

        pictures = len(self.models) * len(self.images)
        columns = len(list(self._places()))
        width = max(2.2 + 1.15 * columns, 1.05 * (1 + len(self.names)))
        heads = 1 if len(self.models) == 1 else 2
        table_height, side = 0.28 * (len(self.names) + heads), width / (1 + len(self.names))
        figure = Figure(figsize=(width, table_height + pictures * (side + 0.24) + 0.1), dpi=110)
        top, *below = figure.subfigures(
            1 + pictures, 1, height_ratios=[table_height] + [side + 0.24] * pictures, squeeze=False
        )[:, 0]
        self._draw_table(top.add_axes((0, 0, 1, 1)))
        for row, strip in enumerate(below):
            self._draw_maps(strip, *divmod(row, len(self.images)), titles=row == 0)
        return figure

    def _places(self) -> list[tuple[int, int]]:
        """Column and model of each column that is drawn: the models side by side."""
        return [(c, m) for c in range(len(self.columns)) for m in range(len(self.models))]

    def _heads(self) -> list[tuple[str, str, str]]:
        """Model, name and arrow of each column that is drawn."""
        several = len(self.models) > 1
        return [
            (self.models[m], self.columns[c] + (f", {_short(self.models[m])}" if several else ""), arrow)
            for c, m in self._places()
            for arrow in ["↑" if self.higher[c] else "↓"]
        ]

    def _row_title(self, r: int) -> str:
        """A row's name, and on how many pictures it stands where these are fewer than the most."""
        count = int(self.counts[:, r].max())
        return self.names[r] + (f" (n={count})" if 0 < count < int(self.counts.max()) else "")

    def _text(self, r: int, c: int, m: int) -> str:
        where = (m, r, c)
        if not self.counts[where]:
            return "–"
        error = f" ±{self.errors[where]:.3f}" if self.counts[where] > 1 else ""
        return f"{self.values[where]:.3f}{error}"

    def _draw_table(self, axis: Axes) -> None:
        """Names, and in every cell a bar as long as the value, the better the greener."""
        from matplotlib import colormaps
        from matplotlib.patches import Rectangle

        places, rows = self._places(), len(self.names)
        left = 2.2 / 1.15  # of the names, in units of a column
        axis.set_xlim(-left, len(places))
        several = len(self.models) > 1
        axis.set_ylim(rows, -2 if several else -1)
        axis.set_axis_off()
        for x, ((c, m), (model, _, arrow)) in enumerate(zip(places, self._heads(), strict=True)):
            if m == 0:
                middle = x + len(self.models) / 2
                name = f"{self.columns[c]} {arrow}"
                height = -1.35 if several else -0.5
                axis.text(middle, height, name, ha="center", va="center", size=8, weight="bold")
            if several:
                axis.text(x + 0.5, -0.5, _short(model), ha="center", va="center", size=7, color="0.35")
            known = self.counts[:, :, c] > 0
            values = self.values[:, :, c]
            low, high = (float(f(values[known])) if known.any() else 0.0 for f in (torch.min, torch.max))
            for r in range(rows):
                text = self._text(r, c, m)
                if known[m, r]:
                    value = float(values[m, r])
                    place = (value - low) / (high - low) if high > low else 0.5
                    colour = colormaps["RdYlGn"](0.15 + 0.7 * (place if self.higher[c] else 1 - place))
                    length = 0.94 * max(0.0, value) / max(abs(high), abs(low), 1e-9)
                    axis.add_patch(Rectangle((x + 0.03, r + 0.1), 0.94, 0.8, color="0.95"))
                    axis.add_patch(Rectangle((x + 0.03, r + 0.1), length, 0.8, color=colour, alpha=0.75))
                axis.text(x + 0.5, r + 0.52, text, ha="center", va="center", size=7)
        for r in range(rows):
            axis.text(-left + 0.06, r + 0.52, self._row_title(r), ha="left", va="center", size=8)

    def _draw_maps(self, strip: Any, m: int, e: int, *, titles: bool) -> None:
        """A picture, the object's outline in it, and its maps."""
        pictures = [Panel(self.images[e]).image, *self.drawn(m, e)]
        model = _short(self.models[m]) if len(self.models) > 1 else ""
        names = [model, *self.names]
        axes = strip.subplots(1, len(pictures), squeeze=False)[0]
        strip.subplots_adjust(0.005, 0.01, 0.995, 0.86, wspace=0.04)
        for axis, picture, name in zip(axes, pictures, names, strict=True):
            axis.set_axis_off()
            axis.imshow(picture.permute(1, 2, 0).float().cpu().numpy())
            if self.masks is not None and not self.masks[e].all() and self.masks[e].any():
                axis.contour(self.masks[e].float().cpu().numpy(), [0.5], colors="white", linewidths=0.6)
            if titles or name == model:
                axis.set_title(name.replace("_", " "), fontsize=6.5, pad=2)


def scored(
    model: Model, dataset: Dataset, measure: Measure, *, method: str, params: Mapping[str, Any],
    target: Target, pictures: int, budget: int, seed: int | None,
) -> Scores:  # fmt: skip
    """One method's maps on one model, beside the baselines, by one measure."""
    assert seed is not None
    pool = Pool(model, dataset, pictures, target, needs_masks=measure.needs_masks)
    sources = [from_method(method, params, seed), *baselines(pool.count, seed)]
    table = score([model], pool, sources, [measure], budget=budget, examples=3)
    return Scores.of(table, [model.name], sources, [measure])


def means(each: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the first ``counts`` of the last axis, and their standard errors; 0 where none is known."""
    known = torch.arange(each.shape[-1], device=each.device) < counts[..., None]
    values = torch.where(known, each, 0).sum(-1) / counts.clamp(min=1)
    squares = torch.where(known, each - values[..., None], 0).square().sum(-1)
    return values, (squares / (counts * (counts - 1)).clamp(min=1)).sqrt()


def _short(model: str) -> str:
    """A model's name without the scheme."""
    return model.rpartition(":")[2]
