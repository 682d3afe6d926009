"""Content and style of pictures, as a network sees them: its features, and their correlations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from phosphene import InputError, Model
from phosphene.optimize import gram_matrix


class Aim(NamedTuple):
    """What to look like: the content's maps (N, C, h, w), each style layer's Gram matrices (1 or N, C, C)."""

    content: Tensor
    grams: list[Tensor]


class Perception:
    """Where a model looks for content, and at which layers and with which weights for style.

    Left out, ``content_layer`` is the middle one of ``model.stages``, ``style_layers`` are all of them, and
    layer j, counted from the finest, weighs 3^-j.
    """

    def __init__(
        self,
        model: Model,
        content_layer: str | None = None,
        style_layers: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.model = model
        self.content_layer = content_layer or model.stages[(len(model.stages) - 1) // 2]
        self.style_layers = list(model.stages if style_layers is None else style_layers)
        self.weights = list(weights or (3.0**-depth for depth in range(len(self.style_layers))))
        if not self.style_layers or len(self.weights) != len(self.style_layers):
            told = f"{len(self.style_layers)} layers, {len(self.weights)} weights"
            raise InputError(f"style needs layers, and one weight for each: {told}")

    @property
    def layers(self) -> list[str]:
        """Every layer that is looked at: those of style, then that of content."""
        return [*self.style_layers, self.content_layer]

    def maps(self, images: Tensor) -> list[Tensor]:
        """What these layers give, (N, C, h, w) each; nothing above the highest runs."""
        return [self.model.maps(f, images) for f in self.model.features_of(images, self.layers)]

    @torch.no_grad()
    def content(self, images: Tensor) -> Tensor:
        """The maps (N, C, h, w) of what is in the images."""
        return self.model.maps(self.model.features(images, self.content_layer), images)

    @torch.no_grad()
    def style(self, styles: Tensor, shares: Tensor) -> list[Tensor]:
        """Each layer's Gram matrix (1, C, C), mixed by the shares (S,) of some styles, each seen alone."""
        grams = zip(
            *([gram_matrix(f) for f in self.maps(style)[:-1]] for style in styles.split(1)), strict=True
        )
        return [torch.einsum("s,scd->cd", shares, torch.cat(each))[None] for each in grams]

    def style_loss(self, grams: Sequence[Tensor], aim: Aim) -> Tensor:
        """sum_j w_j |G_j - G_js|_F^2 / |G_js|_F^2: (N,)."""
        terms = zip(self.weights, grams, aim.grams, strict=True)
        return torch.stack([w * relative(found, wanted) for w, found, wanted in terms]).sum(0)


def relative(found: Tensor, wanted: Tensor) -> Tensor:
    """|found - wanted|^2 / |wanted|^2 of each row: (N,)."""
    return (found - wanted).square().flatten(1).sum(1) / wanted.square().flatten(1).sum(1).clamp(min=1e-30)
