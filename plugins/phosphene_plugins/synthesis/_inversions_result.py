"""``Inversions``, the result of ``feature_inversion``: images reconstructed from the features of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from phosphene.results import Panel, Result


@dataclass(frozen=True, eq=False, kw_only=True)
class Inversions(Result):
    """Feature inversions: ``inversions`` (N, L, C, H, W) of ``images`` (N, C, H, W), in [0, 1].

    One for each of the ``layers``, with ``losses`` (steps, N, L); ``frames`` (F, N, C, H, L W), uint8, are
    the inversions of all layers side by side during the optimization, if requested.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "inversions": "N L C H W",
        "layers": "L",
        "losses": "steps N L",
    }

    per_image: ClassVar[tuple[str, ...]] = ("images", "inversions")
    per_step: ClassVar[tuple[str, ...]] = ("losses", "frames")

    images: Tensor
    inversions: Tensor
    layers: tuple[str, ...]
    losses: Tensor
    frames: Tensor | None = None

    def panels(self) -> list[list[Panel]]:
        """Per image: the image and its inversion from every layer."""
        groups = []
        final_losses = self.losses[-1].tolist()
        for image, inversions, losses in zip(self.images, self.inversions, final_losses, strict=True):
            group = [Panel(image, "image")]
            for inversion, layer, loss in zip(inversions, self.layers, losses, strict=True):
                group.append(Panel(inversion, f"{layer}, loss {loss:.2g}", is_output=True))
            groups.append(group)
        return groups

    def animation_frames(self) -> list[Tensor]:
        return [] if self.frames is None else [torch.cat(list(frame), -2) / 255 for frame in self.frames]
