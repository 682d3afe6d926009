"""``TrainingInfluence``: a value of every training image for each explained image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from phosphene import Model
from phosphene.data import Dataset
from phosphene.images import charts
from phosphene.results import Panel, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The most explained images, and proponents of each, in the figure.
MAX_IMAGES, MAX_COLUMNS = 6, 6


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingInfluence(Result):
    """The influence of M training images on the prediction of N images.

    ``values`` (N, M): positive for proponents, training images that speak for the explained class
    ``targets`` (N), negative for opponents. ``proponents`` and ``opponents`` (N, k): the indices of the
    training images of largest and of smallest value, the most extreme first; ``proponent_images`` and
    ``opponent_images`` (N, k, C, H, W). ``ids`` and ``classes`` (M) of the training images. ``measure``:
    the name of the value.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "targets": "N",
        "values": "N M",
        "proponents": "N k",
        "opponents": "N k",
        "proponent_images": "N k C H W",
        "opponent_images": "N k C H W",
        "ids": "M",
        "classes": "M",
    }

    images: Tensor
    targets: tuple[str, ...]
    values: Tensor
    proponents: Tensor
    opponents: Tensor
    proponent_images: Tensor
    opponent_images: Tensor
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    measure: str

    def panels(self) -> list[list[Panel]]:
        groups = []
        for n, image in enumerate(self.images):
            for side, indices, examples in (
                ("proponents", self.proponents, self.proponent_images),
                ("opponents", self.opponents, self.opponent_images),
            ):
                row = [Panel(image, f"{side} of {self.targets[n].partition(',')[0]}")]
                for index, example in zip(indices[n].tolist(), examples[n], strict=True):
                    row.append(Panel(example, self._title(n, index), is_output=True))
                groups.append(row)
        return groups

    def lines(self) -> list[str]:
        lines = [f"{self.measure} of {len(self.ids)} training images"]
        for n, target in enumerate(self.targets):
            for side, indices in (("proponents", self.proponents), ("opponents", self.opponents)):
                best = ", ".join(f"{self.ids[i]} {self._title(n, i)}" for i in indices[n].tolist())
                lines.append(f"{n:03d}  {target}, {side}: {best}")
        return lines

    def _title(self, row: int, index: int) -> str:
        value = float(self.values[row, index])
        number = f"{value:+.3g}" if abs(value) < 1000 else f"{value:+.0f}"
        return f"{number} {self.classes[index].partition(',')[0]}"

    def draw(self) -> Figure:
        """Each explained image, then its proponents and opponents with value and class."""
        count, k = min(len(self.images), MAX_IMAGES), min(self.proponents.shape[1], MAX_COLUMNS)
        figure = charts.new_figure(2.5 * count + 0.3)
        figure.suptitle(charts.plain_label(self.lines()[0], 100), fontsize=9, x=0.01, ha="left", color="0.3")
        grid = cast(Any, figure.subplots(2 * count, k + 1, squeeze=False))
        for axes in grid.flatten():
            axes.set_axis_off()
        rows = self.panels()
        for row, panels in enumerate(rows[: 2 * count]):
            color = "tab:blue" if row % 2 == 0 else "tab:red"
            for axes, panel in zip(grid[row], panels, strict=False):
                charts.show_image(axes, panel.image)
                axes.set_title(charts.plain_label(panel.title), fontsize=8, loc="left", color=color)
        return figure


def training_influence(
    model: Model,
    images: Tensor,
    labels: Tensor,
    dataset: Dataset,
    classes: Sequence[str],
    values: Tensor,
    k: int,
    measure: str,
) -> TrainingInfluence:
    """The result of values (N, M): its proponents and opponents; of equal values the first image counts."""
    k = min(k, len(dataset))
    values = values.to(model.device, model.dtype)
    proponents = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    opponents = values.sort(dim=1, stable=True).indices[:, :k]

    def read(indices: Tensor) -> Tensor:
        rows = indices.flatten().tolist()
        unique = sorted(set(rows))
        pixels = dict(zip(unique, dataset.read(unique).to(images), strict=True))
        return torch.stack([pixels[row] for row in rows]).unflatten(0, tuple(indices.shape))

    return TrainingInfluence(
        images=images,
        targets=tuple(model.class_name(int(label)) for label in labels),
        values=values,
        proponents=proponents,
        opponents=opponents,
        proponent_images=read(proponents),
        opponent_images=read(opponents),
        ids=tuple(dataset.id(i) for i in range(len(dataset))),
        classes=tuple(classes),
        measure=measure,
    )
