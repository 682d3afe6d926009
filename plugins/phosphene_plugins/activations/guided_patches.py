"""Guided patches: what a channel answers most, and beside it the pixels that its unit answered."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Layer,
    Method,
    Reference,
    TensorDataset,
    batch_size,
    guided,
    hookimpl,
    input_gradient,
    load_model,
    method,
    progress_bar,
    rewrite_backward,
)
from phosphene.results import Patches
from phosphene.roles import Dataset, LayerName, Model
from phosphene.spec import Cost, either, minimum, param, size

from .top_patches import Channels, Count, PerImage, strongest


def only_positive_weights_of_active_units_pass() -> None:
    """Behind one ReLU, what comes back is w2 where it is positive and the unit below was active, times w1."""
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
    layers = nn.Sequential(first, nn.ReLU(), last, nn.Flatten(), nn.Linear(50, 2)).double()
    images = torch.rand(3, 3, 5, 5, dtype=torch.float64)
    found = guided_patches(load_model(layers, input_size=(3, 5, 5)), TensorDataset(images), layer="2", k=2)
    assert found.gradients is not None
    for i, (y, x) in enumerate(found.places.tolist()):
        active = first(images[int(found.ids[i])])[:, y, x] > 0
        passed = last.weight[found.channels[i], :, 0, 0].clamp(min=0) * active
        torch.testing.assert_close(found.gradients[i], (passed @ first.weight.flatten(1))[:, None, None])


@method(
    family="activations",
    references=[
        Reference(
            key="springenberg2015",
            title="Striving for Simplicity: The All Convolutional Net",
            authors="Springenberg, Dosovitskiy, Brox, Riedmiller",
            year=2015,
            url="https://arxiv.org/abs/1412.6806",
        )
    ],
    needs=["dataset", "gradients", "relu"],
    cost=Cost(
        forward=1
        + size.dataset
        + minimum(param.k, size.dataset * param.per_image) * either(size.channels, 6),
        backward=1 + minimum(param.k, size.dataset * param.per_image) * either(size.channels, 6),
    ),
    oracle=only_positive_weights_of_active_units_pass,
    quick={"k": 2, "channels": [0]},
    demo={"layer": "features.11", "k": 9},
)
def guided_patches(
    model: Model,
    dataset: Dataset,
    *,
    layer: Annotated[LayerName | None, Field(description="whose answers; the last map unless told")] = None,
    channels: Channels = None,
    k: Count = 9,
    per_image: PerImage = 1,
) -> Patches:
    """Show what a channel answers most in a data set, and by guided backpropagation which pixels made it.

    R^l = 1[f^l > 0] 1[R^(l+1) > 0] R^(l+1)  at every ReLU on the way from A_c[h, w](x) to x

    The patches are those of ``top_patches``: the k places with the largest answers, at most
    ``per_image`` of a picture, and what their units can see. ``gradients`` (M, C, h, w) is what comes
    back to each patch's pixels from its own unit, raw and signed; outside the patch nothing can.
    What all patches of a channel share is in their guided pictures; what only one of them has is not.
    A unit at the upper end of a ReLU6 has no gradient: name the layer below it. ModelError where no
    ReLU is at or below the layer, for the result would be the plain gradient, and for a layer without
    places; InputError for a channel that is not there.

    Source: Springenberg et al. 2015, section 3.4 and figure 3.
    """
    layer = layer if layer is not None else model.last_map
    # What has no ReLU on the way is refused before the work.
    blank = torch.full((1, *model.input_size), 0.5, dtype=model.dtype, device=model.device)
    _guided(model, blank, _Units(layer, torch.zeros(1, 3, dtype=torch.int64, device=model.device)))
    found = strongest(model, dataset, layer, channels, k, per_image)
    units = torch.cat([torch.tensor(found.channels)[:, None].to(found.places), found.places], 1)
    tops, lefts, bottoms, rights = found.boxes.T
    shape = (len(units), model.input_size[0], int((bottoms - tops).max()), int((rights - lefts).max()))
    gradients = torch.zeros(shape, dtype=model.dtype, device=model.device)
    for rows in progress_bar(torch.arange(len(units)).split(batch_size(model)), "guided patches"):
        pictures = found.images[found.sources[rows]]
        for i, gradient in zip(
            rows.tolist(), _guided(model, pictures, _Units(layer, units[rows])), strict=True
        ):
            top, left, bottom, right = found.boxes[i].tolist()
            gradients[i, :, : bottom - top, : right - left] = gradient[:, top:bottom, left:right]
    return replace(found, gradients=gradients)


@dataclass(frozen=True, eq=False)
class _Units(Layer):
    """A unit of its own for every image: ``units`` (N, 3), channel, y and x."""

    units: Tensor

    def score(self, values: Tensor) -> Tensor:
        channel, y, x = self.units.T
        return values[torch.arange(len(values), device=values.device), channel, y, x]


def _guided(model: Model, images: Tensor, units: _Units) -> Tensor:
    with rewrite_backward(guided):
        return input_gradient(model, images, units)


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [guided_patches]
