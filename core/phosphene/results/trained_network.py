"""``TrainedNetwork``: a network that a method trained."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models import fill_weights, limit_parameters, parameter_limit
from .base import FindMethod, Panel, Result, side_by_side_frames


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainedNetwork(Result):
    """A network that a method trained, for the method that applies it.

    ``network`` is built by ``method`` (an id) from ``config``; ``losses`` (steps,) is the training's loss;
    ``labels`` are the names of what it was trained for, such as its styles; ``previews`` (P, 3, H, W) are
    images that it produced; ``note`` is a remark on the training. ``frames`` (F, P, 3, h, w), uint8, are
    previews during the training, or None. ``checkpoints`` are the state dicts of the network after
    ``checkpoint_steps`` steps, where the training stored some.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "losses": "steps",
        "previews": "P C H W",
    }

    groups_per_row: ClassVar[int] = 6

    network: nn.Module
    method: str
    config: dict[str, Any]
    losses: Tensor
    labels: tuple[str, ...]
    previews: Tensor
    note: str = ""
    frames: Tensor | None = None
    checkpoints: tuple[dict[str, Tensor], ...] = ()
    checkpoint_steps: tuple[int, ...] = ()

    @classmethod
    def restore(cls, fields: dict[str, Any], find_method: FindMethod, **rest: Any) -> TrainedNetwork:
        """The result with its network, built by the method that trained it and filled with the weights."""
        method = find_method(fields["method"])
        if method.network is None:
            raise InputError(f"{method.spec.name} trains no network")
        state = fields.pop("network")
        # On the meta device: random initial weights would take time and advance the generator.
        with limit_parameters(parameter_limit(state)), torch.device("meta"):
            network = method.network(**fields["config"])
        fill_weights(network, state, "saved", f"the network of {method.spec.name}", assign=True)
        return cls(network=network.eval(), **fields, **rest)

    def export_network(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """The module that ``export`` writes and example inputs by name.

        ``images`` (N, C, H, W) in [0, 1]; a network with a second argument also takes the weights (N, S) of
        its ``labels``, under the argument's name. A type that calls its network otherwise overrides this.
        """
        names = list(inspect.signature(self.network.forward).parameters)
        generator = torch.Generator().manual_seed(0)
        weight = next(self.network.parameters(), torch.empty(0))
        inputs = {names[0]: torch.rand(2, 3, 64, 96, generator=generator).to(weight)}
        if len(names) > 1:
            count = max(1, len(self.labels))
            inputs[names[1]] = torch.full((2, count), 1 / count).to(weight)
        return self.network, inputs

    def panels(self) -> list[list[Panel]]:
        return [[Panel(preview, name)] for preview, name in zip(self.previews, self.labels, strict=False)]

    def lines(self) -> list[str]:
        """First and last loss, the note, and the previews' titles."""
        losses = self.losses.tolist()
        loss = [f"loss: {losses[0]:.3g} -> {losses[-1]:.3g} in {len(losses)} steps"] if losses else []
        return [*loss, *filter(None, [self.note]), *super().lines()]

    def animation_frames(self) -> list[Tensor]:
        return side_by_side_frames(self.frames)
