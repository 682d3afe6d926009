"""Guided patches: top patches of a channel, and the guided backpropagation of each patch's unit."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from phosphene import (
    Layer,
    Method,
    ModelError,
    Reference,
    TensorDataset,
    batch_size,
    guided,
    hookimpl,
    input_gradient,
    load_model,
    max_batch,
    method,
    progress_bar,
    rewrite_backward,
)
from phosphene.results import Patches
from phosphene.roles import Dataset, Model
from phosphene.spec import Agrees, Cost, InvariantTo, either, minimum, param, size

from ._relations import largest_activations, statistics_of_a_data_set
from .top_patches import Channels, Count, MapLayer, PerImage, top_patches


def _oracle() -> None:
    """Behind one ReLU, the guided gradient is max(w2, 0) times w1 where the unit below is active."""
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
    layers = nn.Sequential(first, nn.ReLU(), last, nn.Flatten(), nn.Linear(60, 2)).double()
    images = torch.rand(3, 3, 5, 6, dtype=torch.float64)
    model = load_model(layers, input_size=(3, 5, 6))
    with max_batch(3):
        result = guided_patches(model, TensorDataset(images), layer="2", channels=[1, 0], k=5, per_image=2)
    assert result.layer == "2" and result.channels == (1, 1, 1, 1, 1, 0, 0, 0, 0, 0)
    assert result.gradients is not None and len(result.gradients) == 10
    expected = torch.zeros(10, 3, 3, 3, dtype=torch.float64)
    for i, (y, x) in enumerate(result.positions.tolist()):
        below = first(images[int(result.ids[i])])
        torch.testing.assert_close(result.scores[i], last(below.relu())[result.channels[i], y, x])
        passed = last.weight[result.channels[i], :, 0, 0].clamp(min=0) * (below[:, y, x] > 0)
        kernel = torch.einsum("m,mchw->chw", passed.detach(), first.weight.detach())
        # The part of the kernel that lies inside the image, in the upper left corner.
        top, left, bottom, right = max(y - 1, 0), max(x - 1, 0), min(y + 2, 5), min(x + 2, 6)
        part = kernel[:, top - y + 1 : bottom - y + 1, left - x + 1 : right - x + 1]
        expected[i, :, : bottom - top, : right - left] = part
    torch.testing.assert_close(result.gradients, expected)
    assert 0 < result.gradients[:, :, 2].ne(0).any(1).any(1).sum() < 10, "no patch at the border"
    message = ""
    try:
        guided_patches(model, TensorDataset(images), layer="3")
    except ModelError as error:
        message = str(error)
    assert "is not a map" in message


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
    oracle=_oracle,
    relations=[
        Agrees(largest_activations, fields=("scores",), where={"k": 3}),
        *statistics_of_a_data_set("scores"),
        InvariantTo("normalization", fields=("gradients",)),
    ],
    quick={"k": 2, "channels": [0]},
    demo={"layer": "features.11", "k": 9},
)
def guided_patches(
    model: Model,
    dataset: Dataset,
    *,
    layer: MapLayer = None,
    channels: Channels = None,
    k: Count = 9,
    per_image: PerImage = 1,
) -> Patches:
    """Guided backpropagation of a channel's maximally activating patches in a data set.

    R^l = 1[f^l > 0] 1[R^(l+1) > 0] R^(l+1)  at every ReLU between A_c[h, w](x) and x

    The patches are those of ``top_patches``. What all patches of a channel have in common shows in their
    guided gradients; what only one patch has does not. A unit at the upper bound of a ReLU6 has gradient 0:
    choose the layer below it.

    Returns:
        The result of ``top_patches``, and ``gradients`` (M, C, h, w): the guided gradient of each patch's own
        unit with respect to the patch's pixels, signed, padded with zeros to the largest patch. Outside the
        patch the gradient is zero.

    Raises:
        InputError: a channel that the layer does not have.
        ModelError: the layer's output is not a map, or no ReLU is at or below the layer, so that the result
            would be the plain gradient.

    Example::
        from phosphene import run

        result = run("guided_patches", dataset="builtin:scenes/16", layer="features.11", channels=[3], k=4)
        result.gradients.shape  # (4, 3, 24, 24)

    Source:
        Springenberg et al. 2015, section 3.4 and figure 3.
    """
    layer = layer if layer is not None else model.last_map
    # A layer without a map, or without a ReLU below, is refused before the pass over the data set.
    model.map_shape(layer)
    # equivalent mutants: of an image of any color the same layers run
    blank = torch.full((1, *model.input_size), 0.5, dtype=model.dtype, device=model.device)
    # equivalent mutants: the gradient is not used
    _guided_gradient(model, blank, _Units(layer, torch.zeros(1, 3, dtype=torch.int64, device=model.device)))
    with torch.no_grad():
        top = top_patches.function(model, dataset, layer=layer, channels=channels, k=k, per_image=per_image)
    units = torch.cat([torch.tensor(top.channels)[:, None].to(top.positions), top.positions], 1)
    tops, lefts, bottoms, rights = top.boxes.T
    shape = (len(units), model.input_size[0], int((bottoms - tops).max()), int((rights - lefts).max()))
    gradients = torch.zeros(shape, dtype=model.dtype, device=model.device)
    for rows in progress_bar(torch.arange(len(units)).split(batch_size(model)), "guided patches"):
        images = top.images[top.image_indices[rows]]
        image_gradients = _guided_gradient(model, images, _Units(layer, units[rows]))
        for i, gradient in enumerate(image_gradients, int(rows[0])):
            y, x, bottom, right = map(int, top.boxes[i])
            gradients[i, :, : bottom - y, : right - x] = gradient[:, y:bottom, x:right]
    return replace(top, gradients=gradients)


@dataclass(frozen=True, eq=False)
class _Units(Layer):
    """Objective: one unit per image; ``units`` (N, 3) are its channel, y and x."""

    units: Tensor

    def score(self, values: Tensor) -> Tensor:
        channel, y, x = self.units.T
        return values[torch.arange(len(values), device=values.device), channel, y, x]


def _guided_gradient(model: Model, images: Tensor, units: _Units) -> Tensor:
    with rewrite_backward(guided):
        return input_gradient(model, images, units)


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [guided_patches]
