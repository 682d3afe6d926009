"""Perceptual content and style losses: features of a network, and their Gram matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from phosphene import InputError, Model, at_least_float32
from phosphene.optimize import gram_matrix, total_variation


class StyleTargets(NamedTuple):
    """Targets of the loss: content features (N, C, h, w), a Gram matrix (1 or N, C, C) per style layer."""

    content: Tensor
    style_grams: list[Tensor]


class StyleLoss:
    """Loss network: a model with the layer of the content loss and the layers of the style loss.

    Defaults: ``content_layer`` is the middle one of ``model.stages``, ``style_layers`` are all of them, and
    the weight of layer j, counted from the finest, is 3^-j.
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
            counts = f"{len(self.style_layers)} layers, {len(self.weights)} weights"
            raise InputError(f"the style loss needs at least one layer, and one weight for each: {counts}")

    @property
    def layers(self) -> list[str]:
        """The style layers, then the content layer."""
        return [*self.style_layers, self.content_layer]

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps (N, C, h, w) of ``layers``; the network is evaluated up to the last of them only."""
        features = zip(self.model.features_of(images, self.layers), self.layers, strict=True)
        # Sums over all features overflow in float16.
        return [at_least_float32(self.model.maps(values, images, layer)) for values, layer in features]

    @torch.no_grad()
    def content_features(self, images: Tensor) -> Tensor:
        """phi(I): feature maps (N, C, h, w) of the content layer."""
        features = self.model.features(images, self.content_layer)
        return at_least_float32(self.model.maps(features, images, self.content_layer))

    @torch.no_grad()
    def style_grams(self, styles: Tensor, blend_weights: Tensor) -> list[Tensor]:
        """Each style layer's Gram matrix (1, C, C): sum_s gamma_s G_j(I_s), with the styles' weights (S,).

        Styles are evaluated one at a time, in the memory of one.
        """
        grams = zip(
            *([gram_matrix(f) for f in self.features(style)[:-1]] for style in styles.split(1)), strict=True
        )
        return [
            torch.einsum("s,scd->cd", blend_weights.to(layer[0]), torch.cat(layer))[None] for layer in grams
        ]

    def style_loss(self, grams: Sequence[Tensor], target_grams: Sequence[Tensor]) -> Tensor:
        """sum_j w_j |G_j - G_js|_F^2 / |G_js|_F^2: (N,)."""
        terms = zip(self.weights, grams, target_grams, strict=True)
        return torch.stack([weight * relative_error(gram, target) for weight, gram, target in terms]).sum(0)


def relative_error(values: Tensor, target: Tensor) -> Tensor:
    """|values - target|^2 / |target|^2 of each row: (N,)."""
    difference = (values - target).square().flatten(1).sum(1)
    return difference / target.square().flatten(1).sum(1).clamp(min=1e-30)


def smoothness_loss(weight: float) -> Callable[[Tensor], Tensor] | None:
    """The weighted total variation per pixel (N,) of images (N, C, H, W); None where the weight is 0."""

    def smoothness(images: Tensor) -> Tensor:
        # equivalent mutants: every channel has the same number of pixels
        return weight * total_variation(images) / images[0, 0].numel()

    return smoothness if weight else None
