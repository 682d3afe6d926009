"""``Scores``: a table of metrics by method and model, with standard errors and example maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from phosphene import Dataset, Model, Result
from phosphene.images import colorize
from phosphene.results import Panel

from ._evaluate_maps import (
    Evaluation,
    EvaluationSet,
    MapSource,
    Metric,
    baseline_sources,
    evaluate_maps,
    method_source,
)
from ._parameters import TargetSource

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class Scores(Result):
    """Metrics of maps: a row for each method and baseline, a column for each metric, for every model.

    ``values`` (models, rows, columns) are means over the first ``counts`` images, with ``standard_errors``;
    ``image_values`` (models, rows, columns, P) are the values of every image. Where the count is 0 the metric
    is undefined. ``higher_is_better`` has an entry for each column. ``images`` (E, C, H, W), ``masks``
    (E, H, W) and ``maps`` (models, rows, E, H, W) are those of the first images.
    """

    models: tuple[str, ...]
    names: tuple[str, ...]
    columns: tuple[str, ...]
    higher_is_better: tuple[bool, ...]
    values: Tensor
    standard_errors: Tensor
    counts: Tensor
    image_values: Tensor
    images: Tensor
    masks: Tensor | None
    maps: Tensor

    @classmethod
    def from_evaluation(
        cls,
        evaluation: Evaluation,
        models: Sequence[str],
        sources: Sequence[MapSource],
        metrics: Sequence[Metric],
    ) -> Self:
        """The table of an evaluation of these models, sources and metrics."""
        values, standard_errors = means_and_errors(evaluation.values, evaluation.counts)
        return cls(
            models=tuple(models),
            names=tuple(source.name for source in sources),
            columns=tuple(column for metric in metrics for column in metric.columns),
            higher_is_better=tuple(higher for metric in metrics for higher in metric.higher_is_better),
            values=values,
            standard_errors=standard_errors,
            counts=evaluation.counts,
            image_values=evaluation.values,
            images=evaluation.images,
            masks=evaluation.masks,
            maps=evaluation.maps,
        )

    def value(self, name: str, column: str, model: str | None = None) -> float | None:
        """The mean of one cell; None where the metric is undefined."""
        cell = (self.models.index(model) if model else 0, self.names.index(name), self.columns.index(column))
        return float(self.values[cell]) if self.counts[cell] else None

    def table(self) -> dict[str, list[Any]]:
        """A row for each model, method and score: mean, standard error and number of images."""
        table: dict[str, list[Any]] = {}
        for m, model in enumerate(self.models):
            for r, name in enumerate(self.names):
                for c, column in enumerate(self.columns):
                    count = int(self.counts[m, r, c])
                    row = {
                        "model": model,
                        "method": name,
                        "score": column,
                        "mean": float(self.values[m, r, c]) if count else None,
                        "standard_error": float(self.standard_errors[m, r, c]) if count else None,
                        "images": count,
                        "higher_is_better": self.higher_is_better[c],
                    }
                    for key, value in row.items():
                        table.setdefault(key, []).append(value)
        return table

    def lines(self) -> list[str]:
        """The table in Markdown."""
        cells = [["", *(f"{column} {arrow}" for _, column, arrow in self._headers())]]
        for r in range(len(self.names)):
            cells.append([self._row_title(r), *(self._cell_text(r, c, m) for c, m in self._columns())])
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        padded = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in cells]
        padded.insert(1, ["-" * width for width in widths])
        return [f"| {' | '.join(row)} |" for row in padded]

    def panels(self) -> list[list[Panel]]:
        groups = []
        for m, model in enumerate(self.models):
            for e, image in enumerate(self.images):
                maps = zip(self.names, self.colored_maps(m, e), strict=True)
                groups.append([Panel(image, model), *(Panel(colored, name) for name, colored in maps)])
        return groups

    def colored_maps(self, m: int, e: int) -> Tensor:
        """A model's maps of an image in colors, (rows, 3, H, W), each scaled separately."""
        maps = self.maps[m, :, e]
        # The 99th percentile, not the maximum: a few extreme pixels would turn all others black.
        scales = maps.flatten(1).float().cpu().quantile(0.99, dim=1).clamp(min=1e-30).to(maps.device)
        return colorize(maps / scales[:, None, None], "inferno")

    def draw(self) -> Figure:
        from matplotlib.figure import Figure

        strips = len(self.models) * len(self.images)
        columns = len(self._columns())
        width = max(2.2 + 1.15 * columns, 1.05 * (1 + len(self.names)))
        header_rows = 1 if len(self.models) == 1 else 2
        table_height, side = 0.28 * (len(self.names) + header_rows), width / (1 + len(self.names))
        figure = Figure(figsize=(width, table_height + strips * (side + 0.24) + 0.1), dpi=110)
        table, *examples = figure.subfigures(
            1 + strips, 1, height_ratios=[table_height] + [side + 0.24] * strips, squeeze=False
        )[:, 0]
        self._draw_table(table.add_axes((0, 0, 1, 1)))
        for row, strip in enumerate(examples):
            self._draw_maps(strip, *divmod(row, len(self.images)), titles=row == 0)
        return figure

    def _columns(self) -> list[tuple[int, int]]:
        """Metric column and model of each column of the figure: the models side by side."""
        return [(c, m) for c in range(len(self.columns)) for m in range(len(self.models))]

    def _headers(self) -> list[tuple[str, str, str]]:
        """Model, name and arrow of each column of the figure."""
        several = len(self.models) > 1
        return [
            (self.models[m], self.columns[c] + (f", {_short_name(self.models[m])}" if several else ""), arrow)
            for c, m in self._columns()
            for arrow in ["↑" if self.higher_is_better[c] else "↓"]
        ]

    def _row_title(self, r: int) -> str:
        """A row's name, with the number of images where other rows have more."""
        count = int(self.counts[:, r].max())
        return self.names[r] + (f" (n={count})" if 0 < count < int(self.counts.max()) else "")

    def _cell_text(self, r: int, c: int, m: int) -> str:
        cell = (m, r, c)
        if not self.counts[cell]:
            return "–"
        error = f" ±{self.standard_errors[cell]:.3f}" if self.counts[cell] > 1 else ""
        return f"{self.values[cell]:.3f}{error}"

    def _draw_table(self, axis: Axes) -> None:
        """Row names, and in every cell a bar as long as the value, from red (worst) to green (best)."""
        from matplotlib import colormaps
        from matplotlib.patches import Rectangle

        columns, rows = self._columns(), len(self.names)
        left = 2.2 / 1.15  # width of the names, in columns
        axis.set_xlim(-left, len(columns))
        several = len(self.models) > 1
        axis.set_ylim(rows, -2 if several else -1)
        axis.set_axis_off()
        for x, ((c, m), (model, _, arrow)) in enumerate(zip(columns, self._headers(), strict=True)):
            if m == 0:
                middle = x + len(self.models) / 2
                name = f"{self.columns[c]} {arrow}"
                height = -1.35 if several else -0.5
                axis.text(middle, height, name, ha="center", va="center", size=8, weight="bold")
            if several:
                axis.text(x + 0.5, -0.5, _short_name(model), ha="center", va="center", size=7, color="0.35")
            defined = self.counts[:, :, c] > 0
            values = self.values[:, :, c]
            low, high = (float(f(values[defined])) if defined.any() else 0.0 for f in (torch.min, torch.max))
            for r in range(rows):
                text = self._cell_text(r, c, m)
                if defined[m, r]:
                    value = float(values[m, r])
                    fraction = (value - low) / (high - low) if high > low else 0.5
                    quality = fraction if self.higher_is_better[c] else 1 - fraction
                    color = colormaps["RdYlGn"](0.15 + 0.7 * quality)
                    length = 0.94 * max(0.0, value) / max(abs(high), abs(low), 1e-9)
                    axis.add_patch(Rectangle((x + 0.03, r + 0.1), 0.94, 0.8, color="0.95"))
                    axis.add_patch(Rectangle((x + 0.03, r + 0.1), length, 0.8, color=color, alpha=0.75))
                axis.text(x + 0.5, r + 0.52, text, ha="center", va="center", size=7)
        for r in range(rows):
            axis.text(-left + 0.06, r + 0.52, self._row_title(r), ha="left", va="center", size=8)

    def _draw_maps(self, strip: Any, m: int, e: int, *, titles: bool) -> None:
        """An image with the object's outline, and its maps."""
        strip_images = [Panel(self.images[e]).image, *self.colored_maps(m, e)]
        model = _short_name(self.models[m]) if len(self.models) > 1 else ""
        names = [model, *self.names]
        axes = strip.subplots(1, len(strip_images), squeeze=False)[0]
        strip.subplots_adjust(0.005, 0.01, 0.995, 0.86, wspace=0.04)
        for axis, strip_image, name in zip(axes, strip_images, names, strict=True):
            axis.set_axis_off()
            axis.imshow(strip_image.permute(1, 2, 0).float().cpu().numpy())
            if self.masks is not None and not self.masks[e].all() and self.masks[e].any():
                axis.contour(self.masks[e].float().cpu().numpy(), [0.5], colors="white", linewidths=0.6)
            if titles or name == model:
                axis.set_title(name.replace("_", " "), fontsize=6.5, pad=2)


def score_method(
    model: Model, dataset: Dataset, metric: Metric, *, method: str, params: Mapping[str, Any],
    target: TargetSource, max_images: int, budget: int, seed: int | None,
) -> Scores:  # fmt: skip
    """One metric of one method's maps on one model, beside the baselines."""
    assert seed is not None
    data = EvaluationSet(model, dataset, max_images, target, needs_masks=metric.needs_masks)
    sources = [method_source(method, params, seed), *baseline_sources(data.count, seed)]
    evaluation = evaluate_maps([model], data, sources, [metric], budget=budget, examples=3)
    return Scores.from_evaluation(evaluation, [model.name], sources, [metric])


def means_and_errors(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the first ``counts`` of the last axis, and their standard errors; 0 for a count of 0."""
    counted = torch.arange(values.shape[-1], device=values.device) < counts[..., None]
    averages = torch.where(counted, values, 0).sum(-1) / counts.clamp(min=1)
    squares = torch.where(counted, values - averages[..., None], 0).square().sum(-1)
    return averages, (squares / (counts * (counts - 1)).clamp(min=1)).sqrt()


def _short_name(model: str) -> str:
    """A model's name without the URI scheme."""
    return model.rpartition(":")[2]
