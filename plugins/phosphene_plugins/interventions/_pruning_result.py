"""``PruningCurves``: accuracy against the share of a layer's channels that are cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from phosphene.images import charts
from phosphene.results import Panel, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class PruningCurves(Result):
    """Accuracy of a model without a growing share of a layer's channels.

    ``counts`` (S): how many channels are cut at each step, from 0 to all; ``shares`` (S) of the channels.
    ``accuracy`` (S) without the first channels of ``order`` (C), and ``random_accuracy`` (R, S) without the
    first of R random orders. ``ranks`` (C): the quantity that ``order`` is sorted by, in that order: the
    fraction active, or the largest similarity to a channel that remains. ``dead``: how many channels are
    never active. ``count``: how many images the accuracy is of.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "counts": "S",
        "shares": "S",
        "accuracy": "S",
        "random_accuracy": "R S",
        "order": "C",
        "ranks": "C",
    }

    layer: str
    criterion: str
    order: tuple[int, ...]
    ranks: Tensor
    counts: tuple[int, ...]
    shares: Tensor
    accuracy: Tensor
    random_accuracy: Tensor
    dead: int
    count: int

    def removable(self, loss: float = 0.01) -> tuple[int, ...]:
        """The channels of the largest step up to which the accuracy falls by at most ``loss``."""
        step = 0
        while step + 1 < len(self.counts) and self.accuracy[step + 1] >= self.accuracy[0] - loss - 1e-9:
            step += 1
        return self.order[: self.counts[step]]

    def panels(self) -> list[list[Panel]]:
        heights = torch.linspace(1, 0, 64, device=self.accuracy.device)[:, None]
        curves = {self.criterion: self.accuracy, "random": self.random_accuracy.mean(0)}
        return [
            [Panel((heights <= values)[None].float() * 0.9, title, is_output=True)]
            for title, values in curves.items()
        ]

    def lines(self) -> list[str]:
        head = f"{self.layer}, {len(self.order)} channels, {self.dead} dead; accuracy of {self.count} images"
        steps = zip(self.counts, self.accuracy.tolist(), self.random_accuracy.mean(0).tolist(), strict=True)
        rows = [f"{count} cut: {own:.1%}, random channels {other:.1%}" for count, own, other in steps]
        return [head, *rows, f"at most 1 % lost: {len(self.removable())} channels"]

    def draw(self) -> Figure:
        """Accuracy by share cut, beside random channels; and what the channels are ranked by."""
        figure = charts.new_figure(3.6)
        left, right = cast(Any, figure.subplots(1, 2))
        shares, random = self.shares.cpu(), self.random_accuracy.cpu()
        left.plot(shares, self.accuracy.cpu(), marker="o", markersize=3, label=f"{self.criterion} first")
        left.plot(shares, random.mean(0), color="0.5", marker=".", label="random channels")
        left.fill_between(shares, random.amin(0), random.amax(0), color="0.5", alpha=0.25, linewidth=0)
        left.set_ylim(-0.02, 1.02)
        left.set_xlabel("share of channels cut", fontsize=8), left.set_ylabel("accuracy", fontsize=8)
        title = f"{self.layer}, {len(self.order)} channels, {self.count} images"
        left.set_title(charts.plain_label(title, 60), fontsize=8, loc="left", color="0.3")
        left.legend(fontsize=7, frameon=False)
        ranks = self.ranks.float().cpu()
        right.step(range(len(ranks)), ranks, where="mid", color="tab:blue")
        label = "fraction active" if self.criterion == "inactive" else "similarity to a remaining channel"
        right.set_ylabel(label, fontsize=8), right.set_xlabel("channels in the order of the cut", fontsize=8)
        for axes in (left, right):
            axes.tick_params(labelsize=7), axes.spines[["top", "right"]].set_visible(False)
        return figure
