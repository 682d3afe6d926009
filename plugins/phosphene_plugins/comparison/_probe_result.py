"""``ProbeAccuracy``: how well the classes of a data set can be read from each layer of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor

from phosphene.images import charts, colorize, enlarge
from phosphene.results import Panel, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class ProbeAccuracy(Result):
    """Accuracy of a simple classifier of the features of each layer.

    ``accuracy`` (L,) on images that it was not fitted to, in the order of ``layers``; ``probability`` (L,)
    is the mean probability, or share of the votes, of the image's class on the same images.
    ``train_accuracy`` (L,): None for a classifier without training; ``confusion`` (K, K) of the best layer:
    counts of images by class (row) and prediction (column), in the order of ``classes``. ``chance``: the
    share of the most frequent class. ``count``: the number of images that the accuracy is of.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "accuracy": "L",
        "probability": "L",
        "layers": "L",
        "train_accuracy": "L",
        "confusion": "K K",
        "classes": "K",
    }

    layers: tuple[str, ...]
    accuracy: Tensor
    probability: Tensor
    classes: tuple[str, ...]
    confusion: Tensor
    chance: float
    count: int
    classifier: str
    train_accuracy: Tensor | None = None

    @property
    def best(self) -> str:
        """The layer of largest accuracy; of equal ones the first."""
        return self.layers[int(self.accuracy.argmax())]

    def panels(self) -> list[list[Panel]]:
        shares = self.confusion / self.confusion.sum(1, keepdim=True).clamp(min=1)
        matrix = enlarge(colorize(shares.float(), "viridis"), max(1, 160 // len(shares)))
        return [[Panel(matrix, f"{self.best}: {float(self.accuracy.max()):.1%}", is_output=True)]]

    def lines(self) -> list[str]:
        head = f"{self.classifier}: accuracy of {self.count} images, {self.chance:.1%} by chance"
        rows = [
            f"{name}: {value:.1%}" for name, value in zip(self.layers, self.accuracy.tolist(), strict=True)
        ]
        return [head, *rows]

    def draw(self) -> Figure:
        """Accuracy by layer, and the confusion matrix of the best layer."""
        figure = charts.new_figure(4.6)
        left, right = cast(Any, figure.subplots(1, 2))
        steps = range(len(self.layers))
        left.plot(steps, self.accuracy.tolist(), marker="o", label="held out")
        if self.train_accuracy is not None:
            left.plot(steps, self.train_accuracy.tolist(), marker=".", color="0.6", label="training")
        left.axhline(self.chance, color="0.4", linestyle=":", label="most frequent class")
        left.set_ylim(0, 1.02)
        left.set_ylabel("accuracy", fontsize=9)
        left.set_xticks(steps, [charts.plain_label(name) for name in self.layers], rotation=90, fontsize=7)
        left.set_title(charts.plain_label(self.classifier, 60), fontsize=8, loc="left", color="0.3")
        left.spines[["top", "right"]].set_visible(False)
        left.legend(fontsize=7, frameon=False, loc="lower right")
        shares = self.confusion / self.confusion.sum(1, keepdim=True).clamp(min=1)
        right.imshow(shares.float().cpu().numpy(), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        right.set_title(f"confusion, {charts.plain_label(self.best)}", fontsize=8, loc="left", color="0.3")
        names = [charts.plain_label(name, 16) for name in self.classes]
        if len(names) <= 24:
            right.set_yticks(range(len(names)), names, fontsize=7)
            right.set_xticks(range(len(names)), names, fontsize=7, rotation=90)
        right.set_ylabel("class", fontsize=8), right.set_xlabel("prediction", fontsize=8)
        return figure


def confusion_matrix(classes: Tensor, predictions: Tensor, count: int) -> Tensor:
    """Counts of images (count, count) by class and prediction."""
    return classes.new_zeros(count, count).index_put_(
        (classes, predictions), classes.new_ones(()), accumulate=True
    )
