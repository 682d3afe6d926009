"""``TrainedNetwork``: a network that a method trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..registry.lookup import methods
from .base import Panel, Result, side_by_side_frames


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainedNetwork(Result):
    """A network that a method trained, ready for its partner that applies it.

    ``network`` is built by ``method`` (an id) from ``config``; ``losses`` (steps,) its training;
    ``labels`` name what it learned; ``previews`` (P, 3, H, W) show what it does; ``note`` is what should be
    known of it. ``frames`` (F, P, 3, h, w), bytes, are previews from its training, where that was asked for.
    """

    groups_per_row: ClassVar[int] = 6

    network: nn.Module
    method: str
    config: dict[str, Any]
    losses: Tensor
    labels: tuple[str, ...]
    previews: Tensor
    note: str = ""
    frames: Tensor | None = None

    @classmethod
    def restore(cls, fields: dict[str, Any], **rest: Any) -> TrainedNetwork:
        """Rebuild the network through the method that made it, and fill in its weights."""
        method = methods[fields["method"]]
        if method.network is None:
            raise InputError(f"{method.spec.name} trains no network")
        with torch.device("meta"):  # its own beginning would cost time and random numbers
            network = method.network(**fields["config"])
        network.load_state_dict(fields.pop("network"), assign=True)  # in the precision it was saved in
        return cls(network=network.eval(), **fields, **rest)

    def panels(self) -> list[list[Panel]]:
        return [[Panel(preview, name)] for preview, name in zip(self.previews, self.labels, strict=False)]

    def lines(self) -> list[str]:
        """How the loss fell, the note, and the previews."""
        losses = self.losses.tolist()
        fell = [f"loss: {losses[0]:.3g} -> {losses[-1]:.3g} in {len(losses)} steps"] if losses else []
        return [*fell, *filter(None, [self.note]), *super().lines()]

    def animation_frames(self) -> list[Tensor]:
        return side_by_side_frames(self.frames)
