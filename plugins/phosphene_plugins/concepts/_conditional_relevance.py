"""Relevance at a layer: of its channels for a target, and of the pixels conditioned on channels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from phosphene import Model, ModelError, scores
from phosphene.targets import Objective

from ..attribution._lrp_layers import LayerRules
from ..attribution._lrp_propagation import AttentionRule, RelevancePropagation


@contextmanager
def layer_relevance(
    model: Model, rules: LayerRules, attention: AttentionRule, images: Tensor, target: Objective, layer: str
) -> Iterator[LayerRelevance]:
    """The relevance of a layer's output for a target; inside the block, that of pixels can be read."""
    sized = model.for_images(images)
    sized.structure  # noqa: B018  # recorded here: inside the block its passes would follow the rules
    propagation = RelevancePropagation(model, rules, attention, fold_tapped=False)
    with propagation.network(), propagation:
        yield LayerRelevance(propagation, sized, images, target, layer)


class LayerRelevance:
    """The relevance of a layer's output for a target, and its way down to the pixels; ``layer_relevance``.

    ``output`` is the layer's output, ``relevance`` of its shape its relevance, ``channel_axis`` the axis of
    its channels.
    """

    def __init__(
        self, propagation: RelevancePropagation, model: Model, images: Tensor, target: Objective, layer: str
    ) -> None:
        self._propagation = propagation
        self._pixels = images.detach().requires_grad_()
        with model.tap(layer) as tap:
            score = scores(model, self._pixels, target)
            self.output = tap[layer]
        propagation.check_score(score)
        gradient = None
        if self.output.requires_grad:
            (gradient,) = torch.autograd.grad(score.sum(), self.output, allow_unused=True)
        if gradient is None:
            raise ModelError(f"{target} has no relevance in layer {layer!r}: choose another layer")
        self._gradient = gradient
        self.relevance = self.output.detach() * gradient
        self.channel_axis = channel_axis(model, layer, self.output)

    def of_channels(self) -> Tensor:
        """The relevance (N, C) of each channel, summed over positions."""
        relevance = self.relevance.movedim(self.channel_axis, 1)
        return relevance.reshape(*relevance.shape[:2], -1).sum(2)

    def of_pixels(self, channels: Tensor) -> Tensor:
        """The relevance (N, H, W) of the pixels through one channel of each image, ``channels`` (N,)."""
        gradient = torch.zeros_like(self._gradient).movedim(self.channel_axis, 1)
        rows = torch.arange(len(channels), device=channels.device)
        gradient[rows, channels] = self._gradient.movedim(self.channel_axis, 1)[rows, channels]
        gradient = gradient.movedim(1, self.channel_axis)
        return self._propagation.read(self.output, self._pixels, gradient).sum(1)


def channel_axis(model: Model, layer: str, output: Tensor) -> int:
    """The axis of the channels in a layer's output. Raises ModelError where it is not known."""
    if output.ndim == 2:
        return 1
    layout = model.structure.layouts.get(model.layer_name(layer))
    if layout is None or not layout.fits(output):
        raise ModelError(
            f"layer {layer!r} has an output of shape {tuple(output.shape)}, whose axis of channels is not "
            "recorded: choose a layer with maps, tokens on the patch grid, or features (N, C)"
        )
    return layout.channel_axis
