"""``LogitLens``: the logits that a model's head computes behind each block, drawn by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from phosphene.images import charts
from phosphene.results import Panel, Result, shorten_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Classes that are drawn for an image.
_DRAWN = 5


@dataclass(frozen=True, eq=False, kw_only=True)
class LogitLens(Result):
    """The logits of the tokens behind each of L blocks.

    ``images`` (N, C, H, W); ``logits`` (N, L, K), the last of which are the model's own; ``probabilities``
    (N, L, K), their softmax, or the sigmoid of each where several classes can be present. ``layers`` (L): the
    blocks; ``classes`` (K): the names of the classes.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "logits": "N L K",
        "probabilities": "N L K",
        "layers": "L",
        "classes": "K",
    }
    per_image: ClassVar[tuple[str, ...]] = ("images", "logits", "probabilities")

    images: Tensor
    logits: Tensor
    probabilities: Tensor
    layers: tuple[str, ...]
    classes: tuple[str, ...]

    def predictions(self) -> list[list[str]]:
        """The class of the largest logit of each image behind each block."""
        return [[self.classes[k] for k in row] for row in self.logits.argmax(2).tolist()]

    def panels(self) -> list[list[Panel]]:
        groups = []
        for image, names in zip(self.images, self.predictions(), strict=True):
            changes = [name for n, name in enumerate(names) if n == 0 or name != names[n - 1]]
            groups.append([Panel(image, " → ".join(shorten_title(name, 16) for name in changes[-4:]))])
        return groups

    def draw(self) -> Figure:
        from matplotlib.figure import Figure

        count, side = len(self.images), 2.2
        width = side + max(3.5, 0.4 * len(self.layers) + 1.5)
        figure = Figure(figsize=(width, side * count + 0.7), dpi=110, layout="constrained")
        grid = figure.subplots(count, 2, squeeze=False, width_ratios=(1, 2))
        steps = list(range(len(self.layers)))
        for (panel,), (picture, axes), values in zip(
            self.panels(), grid, self.probabilities.float().cpu(), strict=True
        ):
            picture.imshow(panel.image.permute(1, 2, 0).float().cpu().numpy())
            picture.set_axis_off()
            for k in values.amax(0).sort(descending=True, stable=True).indices[:_DRAWN].tolist():
                axes.plot(
                    steps, values[:, k], marker=".", lw=1, label=charts.plain_label(self.classes[k], 20)
                )
            axes.set_ylim(-0.02, 1.02), axes.set_xticks(steps, [""] * len(steps))
            (
                axes.set_ylabel("probability", fontsize=7),
                axes.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)),
            )
            axes.tick_params(labelsize=6), axes.spines[["top", "right"]].set_visible(False)
        names = [charts.plain_label(name, 24) for name in self.layers]
        grid[-1, 1].set_xticks(steps, names, rotation=90, fontsize=6)
        return figure
