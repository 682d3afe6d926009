"""``TrainedModel``: a classifier that a method trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ModelError, PhospheneError
from ..images import charts
from ..images.color import resize
from ..models import Model, fill_weights, load_model
from ..results import TrainedNetwork
from ..results.base import FindMethod

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from .loop import TrainingHistory


class WeightsOnly(nn.Module):
    """In the place of a network that a folder alone cannot build: its weights, and the reason."""

    def __init__(self, weights: Mapping[str, Tensor], reason: str) -> None:
        super().__init__()
        self.weights, self.reason = dict(weights), reason

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The weights as they were saved."""
        return self.weights

    def forward(self, *args: Any) -> Any:
        raise ModelError(
            f"{self.reason}; build the network and give it the weights: load_model(module, weights=folder)"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainedModel(TrainedNetwork):
    """A classifier that a method trained: ``model()`` is a ``Model`` like any other.

    Beside ``losses`` (steps,) its course: ``curves`` of shares, each (M,), after ``measured`` (M,) steps;
    ``note`` is what should be known of it. ``previews`` (P, C, H, W) are pictures with ``labels``. Its folder
    holds the weights and where the network comes from. Was that a name, ``load_model("trained:folder")``
    needs no more; what was given as an object is built by its owner: ``load_model(module, weights=folder)``.
    """

    groups_per_row: ClassVar[int] = 9

    measured: Tensor
    curves: dict[str, Tensor]
    #: What it was trained from, while that is at hand.
    base: Model | None = field(default=None, repr=False, metadata={"saved": False})

    @classmethod
    def of(
        cls,
        method: str,
        trained: Model,
        base: Model,
        course: TrainingHistory,
        changes: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> TrainedModel:
        """The result of training ``trained``, a copy of ``base``.

        ``changes``, where its network is another, is what the method's ``network`` makes it of the old by.
        """
        words = ("input_size", "classes", "crop_pct", "interpolation", "mean", "std")
        config = {name: base.settings[name] for name in words} | {"changes": changes}
        return cls(
            network=trained.module,
            method=method,
            config={"source": base.source, "name": base.name, **config},
            losses=course.losses,
            measured=course.measured,
            curves=course.curves,
            base=base,
            **fields,
        )

    @classmethod
    def restore(cls, fields: dict[str, Any], find_method: FindMethod, **rest: Any) -> TrainedModel:
        """Rebuild the network from where it came from, and fill in its weights."""
        state, config = fields.pop("network"), dict(fields["config"])
        changes = config.pop("changes")
        try:
            base = _rebuild(**config)
            if (change := find_method(fields["method"]).network) is not None:
                base.module = change(base.module, **changes)
            base.module.to(dtype=next(t.dtype for t in state.values() if t.is_floating_point()))
            fill_weights(base.module, state, "saved", config["name"])
        except PhospheneError as error:  # its weights are whole: who asks for the model is told
            return cls(network=WeightsOnly(state, str(error)), **fields, **rest)
        return cls(network=base.module.requires_grad_(False), base=base, **fields, **rest)

    def model(self) -> Model:
        """The trained network with the classes and the normalisation of the one it was trained from.

        ModelError where it was loaded from a folder that does not say how to build it.
        """
        if self.base is None:
            self.network(None)  # which says why not
        assert self.base is not None
        name = f"{self.method.partition('.')[2]} of {self.base.name}"
        made = Model(self.network, **self.base.settings | {"name": name})
        if self.uri is not None:
            made.name = f"trained:{self.uri}"
            made.source = {"uri": made.name}
        return made

    def lines(self) -> list[str]:
        """The course in words, the note, and the pictures."""
        ends = [f"{n}: {curve[0]:.0%} -> {curve[-1]:.0%}" for n, curve in self.curves.items() if len(curve)]
        loss, *rest = super().lines()
        return [loss, *ends, *rest]

    def figure(self) -> Figure:
        """The loss and the shares over the steps, and below the pictures."""
        groups = self.panels()[: 2 * self.groups_per_row]
        columns = min(self.groups_per_row, max(1, len(groups)))
        rows = -(-len(groups) // columns)
        figure = charts.new_figure(2.6 + 1.25 * rows)
        halves: Any = figure.subfigures(2, 1, height_ratios=[2.6, max(0.1, 1.25 * rows)])
        left, right = halves[0].subplots(1, 2)
        losses = self.losses.double().cpu()
        window = max(1, len(losses) // 50)
        smooth = losses.unfold(0, window, 1).mean(1) if window > 1 else losses
        left.plot(range(1, len(losses) + 1), losses, color="0.8", linewidth=1)
        marker = "o" if len(losses) == 1 else None
        left.plot(range(window, len(losses) + 1), smooth, marker=marker, linewidth=2)
        left.set(xlabel="step", ylabel="loss")
        width = 4.0  # the first's, so that those which run along it show, too
        for name, curve in self.curves.items():
            steps, shares = self.measured.cpu(), curve.double().cpu()
            right.plot(steps, shares, label=name, marker="o", markersize=3, linewidth=width)
            width = 1.5
        right.set(xlabel="step", ylabel="share of pictures held out", ylim=(-0.03, 1.22))
        right.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        right.legend(fontsize=8, frameon=False, loc="upper center", ncols=3)
        if self.note:
            right.set_title(self.note, fontsize=8, loc="left")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        if rows:
            axes = halves[1].subplots(rows, columns, squeeze=False).flatten()
            for axis in axes:
                axis.set_axis_off()
            for axis, (panel, *_) in zip(axes, groups, strict=False):
                charts.show_image(axis, resize(panel.image, (96, 96)).clamp(0, 1), panel.title)
        return figure


def _rebuild(*, source: Mapping[str, Any] | None, name: str, **settings: Any) -> Model:
    """The model that a training began with, without its weights; ModelError where nobody can tell."""
    if source is None:
        raise ModelError(f"the network ({name}) was given as an object, and no folder holds its code")
    how = {key: settings.pop(key) for key in ("crop_pct", "interpolation")}
    bare = {key: value for key, value in source.items() if key not in ("uri", "weights", "pretrained")}
    with torch.random.fork_rng([]):  # its random beginning is nobody's loss
        model = load_model(source["uri"], **bare | settings)
    for key, value in how.items():
        setattr(model, key, value)
    return model
