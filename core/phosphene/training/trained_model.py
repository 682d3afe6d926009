"""``TrainedModel``: a classifier that a method trained, with its weights, metrics and figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from ..errors import InputError, ModelError, PhospheneError
from ..images import charts
from ..images.color import resize
from ..models import (
    Model,
    SavedSettings,
    fill_weights,
    limit_parameters,
    load_saved_model,
    parameter_limit,
)
from ..parameter_text import read_document
from ..results import TrainedNetwork
from ..results.base import FindMethod
from ..torch_state import fork_random_state, random_lock
from .loop import TrainingHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class WeightsOnly(nn.Module):
    """Stands for a network that cannot be built from its folder: holds the weights and the reason.

    A forward pass raises ModelError with that reason.
    """

    def __init__(self, weights: Mapping[str, Tensor], reason: str) -> None:
        super().__init__()
        self.weights, self.reason = dict(weights), reason

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The weights as they were saved."""
        return self.weights

    def forward(self, *args: Any) -> Any:
        raise ModelError(
            f"{self.reason}; build the network and load the weights into it: "
            "load_model(module, weights=folder)"
        )


class _SavedConfig(SavedSettings):
    """The field ``config`` of a trained model: its source and how it prepares images."""

    source: dict[str, Any] | None
    name: str
    changes: dict[str, Any] | None
    crop_pct: Annotated[float, Field(gt=0, le=10)]
    crop_mode: str = "center"
    interpolation: str


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainedModel(TrainedNetwork):
    """A classifier that a method trained. ``model()`` returns it as a ``Model``.

    ``losses`` (steps,) is the loss of each step; ``curves`` has metrics in [0, 1] by name, each (M,), after
    ``evaluation_steps`` (M,) steps; ``note`` is a remark on the training. ``previews`` (P, C, H, W) are
    images with ``labels``; ``checkpoints`` are the weights after ``checkpoint_steps`` steps, if stored.

    The saved folder holds the weights and the source of the network. Where that is a name,
    ``load_model("trained:folder")`` builds the model; a network that was passed as an object must be built by
    the caller: ``load_model(module, weights=folder)``.
    """

    groups_per_row: ClassVar[int] = 9

    evaluation_steps: Tensor
    curves: dict[str, Tensor]
    #: The model that was trained from; None where a loaded result could not rebuild it.
    base: Model | None = field(default=None, repr=False, metadata={"saved": False})

    @classmethod
    def from_training(
        cls,
        method: str,
        trained: Model,
        base: Model,
        history: TrainingHistory,
        changes: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> TrainedModel:
        """The result of training ``trained``, a copy of ``base``.

        ``changes`` are the arguments of the method's ``network`` function, where it modified the
        architecture.
        """
        names = ("input_size", "classes", "crop_pct", "crop_mode", "interpolation", "mean", "std")
        config = {name: base.settings[name] for name in names} | {"changes": changes}
        return cls(
            network=trained.module,
            method=method,
            config={"source": base.source, "name": base.name, **config},
            losses=history.losses,
            evaluation_steps=history.evaluation_steps,
            curves=history.curves,
            checkpoints=history.checkpoints,
            checkpoint_steps=history.checkpoint_steps,
            base=base,
            **fields,
        )

    @classmethod
    def restore(cls, fields: dict[str, Any], find_method: FindMethod, **rest: Any) -> TrainedModel:
        """Rebuild the network from its source and load the saved weights into it.

        Where that is not possible ``network`` is a ``WeightsOnly``: the error is raised by ``model()``.
        """
        state = fields.pop("network")
        config = read_document(_SavedConfig, fields["config"], lambda path: "the field 'config'")
        try:
            with limit_parameters(parameter_limit(state)):
                base = _rebuild(config)
                if (change := find_method(fields["method"]).network) is not None:
                    base.module = _change(change, base.module, config.changes or {})
            if precisions := [t.dtype for t in state.values() if t.is_floating_point()]:
                base.module.to(dtype=precisions[0])
            # Assigned: weights of other precisions than the first one's are not rounded to it.
            fill_weights(base.module, state, "saved", config.name, assign=True)
        except PhospheneError as error:
            return cls(network=WeightsOnly(state, str(error)), **fields, **rest)
        return cls(network=base.module.requires_grad_(False), base=base, **fields, **rest)

    def model(self) -> Model:
        """The trained network as a ``Model``, with the classes and normalization of the original one.

        Raises ModelError for a result loaded from a folder that does not say how to build the network.
        """
        if self.base is None:
            self.network(None)  # raises the reason
        assert self.base is not None
        name = f"{self.method.partition('.')[2]} of {self.base.name}"
        model = Model(self.network, **self.base.settings | {"name": name})
        if self.uri is not None:
            model.name = f"trained:{self.uri}"
            model.source = {"uri": model.name}
        return model

    def lines(self) -> list[str]:
        """First and last value of loss and metrics, the note, and the previews."""
        ends = [f"{n}: {curve[0]:.0%} -> {curve[-1]:.0%}" for n, curve in self.curves.items() if len(curve)]
        loss, *rest = super().lines()
        return [loss, *ends, *rest]

    def draw(self) -> Figure:
        """The loss and the metrics over the steps, and the previews below."""
        groups = self.panels()[: 2 * self.groups_per_row]
        columns = min(self.groups_per_row, max(1, len(groups)))
        rows = -(-len(groups) // columns)
        figure = charts.new_figure(2.6 + 1.25 * rows)
        halves: Any = figure.subfigures(2, 1, height_ratios=[2.6, max(0.1, 1.25 * rows)])
        left, right = halves[0].subplots(1, 2)
        self._plot_losses(left)
        self._plot_curves(right)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        if rows:
            axes = halves[1].subplots(rows, columns, squeeze=False).flatten()
            for axis in axes:
                axis.set_axis_off()
            for axis, (panel, *_) in zip(axes, groups, strict=False):
                charts.show_image(axis, resize(panel.image, (96, 96)).clamp(0, 1), panel.title)
        return figure

    def _plot_losses(self, axes: Axes) -> None:
        """The loss of each step in gray, and its moving average."""
        losses = self.losses.cpu().double()
        window = max(1, len(losses) // 50)
        average = losses.unfold(0, window, 1).mean(1) if window > 1 else losses
        axes.plot(range(1, len(losses) + 1), losses, color="0.8", linewidth=1)
        marker = "o" if len(losses) == 1 else None
        axes.plot(range(window, len(losses) + 1), average, marker=marker, linewidth=2)
        axes.set(xlabel="step", ylabel="loss")

    def _plot_curves(self, axes: Axes) -> None:
        linewidth = 4.0  # only the first curve: one that coincides with it is still visible
        for name, curve in self.curves.items():
            steps, values = self.evaluation_steps.cpu(), curve.cpu().double()
            axes.plot(steps, values, label=name, marker="o", markersize=3, linewidth=linewidth)
            linewidth = 1.5
        axes.set(xlabel="step", ylabel="share of held-out images", ylim=(-0.03, 1.22))
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        if self.curves:
            axes.legend(fontsize=8, frameon=False, loc="upper center", ncols=3)
        if self.note:
            axes.set_title(self.note, fontsize=8, loc="left")


def _rebuild(config: _SavedConfig) -> Model:
    """The model that was trained from, with random weights. ModelError where its source is unknown."""
    if config.source is None:
        raise ModelError(
            f"the network ({config.name}) was passed as an object, and its folder does not contain its code"
        )
    options = {key: value for key, value in config.source.items() if key not in ("weights", "pretrained")}
    settings = {name: getattr(config, name) for name in SavedSettings.model_fields}
    with (
        random_lock,
        fork_random_state(),
    ):  # initializing the weights must not advance the caller's random state
        model = load_saved_model(options | settings)
    model.crop_pct, model.crop_mode = config.crop_pct, config.crop_mode
    model.interpolation = config.interpolation
    return model


def _change(change: Callable[..., nn.Module], network: nn.Module, changes: Mapping[str, Any]) -> nn.Module:
    """The network as the method's ``network`` function modified it before the training."""
    try:
        return change(network, **changes)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"the saved changes {dict(changes)!r:.200} do not fit the network: {error}"
        ) from error
