"""First-layer filters: the weights of the first convolution as images."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from phosphene import Reference, hookimpl, load_model, method
from phosphene.errors import ModelError
from phosphene.images import min_max
from phosphene.results import FilterBank
from phosphene.roles import Model
from phosphene.spec import Cost, InvariantTo, ScalesWith, UnitRange

FIELDS = ("weights", "tiles")


def _oracle() -> None:
    """Evenly spaced weights become evenly spaced gray levels from 0 to 1, whatever their scale."""
    convolution = nn.Conv2d(3, 2, 2, bias=False)
    with torch.no_grad():
        convolution.weight[0] = torch.arange(12.0).view(3, 2, 2)
        convolution.weight[1] = 5 - 2 * torch.arange(12.0).view(3, 2, 2)
    layers = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(98, 2))
    model = load_model(layers, input_size=(3, 8, 8))
    rising = torch.arange(12.0).view(3, 2, 2) / 11
    bank = first_layer_filters(model)
    assert torch.allclose(bank.tiles, torch.stack([rising, 1 - rising]))
    assert torch.equal(bank.weights, convolution.weight) and bank.captions == ("0", "1")
    assert (bank.layer, bank.columns) == ("0", 8)
    # The weights of both filters are from -17 to 11.
    shared = first_layer_filters(model, scale="shared").tiles
    assert torch.allclose(shared, (convolution.weight + 17) / 28)
    # Other filters than those of color images are gray: one image each, or one per channel.
    for channels, captions, columns in ((1, ("0", "1"), 8), (2, ("0[0]", "0[1]", "1[0]", "1[1]"), 2)):
        gray = nn.Conv2d(channels, 2, 2)
        weight = torch.arange(8.0 * channels).view(2, channels, 2, 2)
        with torch.no_grad():
            gray.weight.copy_(weight)
        layers = nn.Sequential(nn.Identity(), gray, nn.Flatten(), nn.Linear(98, 2))
        bank = first_layer_filters(load_model(layers, input_size=(channels, 8, 8)))
        slices = (weight % (4 * channels) / (4 * channels - 1)).flatten(0, 1)
        assert torch.allclose(bank.tiles, slices[:, None].repeat(1, 3, 1, 1))
        assert (bank.layer, bank.captions, bank.columns) == ("1", captions, columns)


@method(
    family="filters",
    references=[
        Reference(
            key="krizhevsky2012",
            title="ImageNet Classification with Deep Convolutional Neural Networks",
            authors="Krizhevsky, Sutskever, Hinton",
            year=2012,
            url="https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks",
        )
    ],
    invariants=[UnitRange(field="tiles")],
    cost=Cost(),
    oracle=_oracle,
    relations=[InvariantTo("normalization", fields=FIELDS), ScalesWith("logits", power=0, fields=FIELDS)],
    demo={"model": "builtin:parts-resnet"},
)
def first_layer_filters(
    model: Model,
    *,
    scale: Annotated[
        Literal["each", "shared"],
        Field(description="scaling to [0, 1]: of each filter, or of all filters together"),
    ] = "each",
) -> FilterBank:
    """First-layer filters: the weights of the first convolution as images.

    tile_f = (W_f - min W_f) / (max W_f - min W_f)

    with the minimum and maximum over the filter's three color channels together, so that hues are
    preserved; a constant filter is black. ``scale="shared"`` uses one minimum and maximum for all filters, so
    that weak filters have little contrast. A patch embedding is such a convolution, too.

    Returns:
        ``weights`` (F, C, K, K). ``tiles`` (T, 3, K, K) in [0, 1]: F color images for C = 3, F gray ones
        for C = 1, else F x C gray slices. ``layer``: name of the convolution.

    Raises:
        ModelError: the model has no convolution.

    Example::
        from phosphene import run

        result = run("first_layer_filters")
        result.tiles.shape  # (24, 3, 3, 3)

    Source:
        Krizhevsky et al. 2012, section 6.1 and figure 3.
    """
    convolutions = [name for name in model.structure.layers if isinstance(model.layers[name], nn.Conv2d)]
    if not convolutions:
        raise ModelError(f"{model.name} has no convolution, so it has no filters to show")
    layer = convolutions[0]
    weights = model.layers[layer].get_parameter("weight").detach().clone()
    filters, channels = weights.shape[:2]
    tiles = min_max(weights, (0, 1, 2, 3) if scale == "shared" else (1, 2, 3))
    captions = [str(f) for f in range(filters)]
    if channels != 3:
        tiles = tiles.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)
    if channels not in (1, 3):
        captions = [f"{f}[{c}]" for f in range(filters) for c in range(channels)]
    return FilterBank(
        layer=layer,
        weights=weights,
        tiles=tiles,
        captions=tuple(captions),
        columns=channels if channels not in (1, 3) else 8,
    )


@hookimpl
def phosphene_methods():
    return [first_layer_filters]
