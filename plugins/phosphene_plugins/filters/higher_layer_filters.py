"""Higher-layer filters: convolution weights as gray slices, one per input channel."""

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from phosphene import Reference, hookimpl, load_model, method
from phosphene.errors import ModelError
from phosphene.images import min_max
from phosphene.results import FilterBank
from phosphene.roles import LayerName, Model
from phosphene.spec import Cost, InvariantTo, ScalesWith, UnitRange

FIELDS = ("weights", "tiles")


def _oracle() -> None:
    """The slices of a filter share one scale: for weights 0 to 7, slice c is 4c/7 to (4c + 3)/7."""
    convolution = nn.Conv2d(2, 1, 2)
    with torch.no_grad():
        convolution.weight.copy_(torch.arange(8.0).view(1, 2, 2, 2))
    layers = nn.Sequential(nn.Conv2d(3, 2, 3), convolution, nn.Flatten(), nn.Linear(25, 2))
    bank = higher_layer_filters(load_model(layers, input_size=(3, 8, 8)))
    assert (bank.layer, bank.columns, bank.captions) == ("1", 2, ("0[0]", "0[1]"))
    assert torch.allclose(bank.tiles, torch.arange(8.0).view(2, 1, 2, 2).expand(-1, 3, -1, -1) / 7)
    assert bank.tiles.shape == (2, 3, 2, 2)
    # The second convolution larger than 1 x 1; with only such ones the second.
    fourth = nn.Conv2d(4, 5, 1)
    deep = nn.Sequential(
        *(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 1), nn.Sequential(nn.Conv2d(2, 4, (2, 1)), nn.ReLU())),
        *(nn.Sequential(nn.ReLU()), fourth, nn.Flatten(), nn.Linear(150, 2)),
    )
    deep[6].spare = nn.Identity()  # never called
    model = load_model(deep, input_size=(3, 8, 8))
    assert higher_layer_filters(model).layer == "2.0"
    assert higher_layer_filters(model).weights.shape == (4, 2, 2, 1)
    bank = higher_layer_filters(model, layer="4", filters=3, slices=2)
    assert torch.equal(bank.weights, fourth.weight[:3, :2]) and bank.captions[3] == "1[1]"
    small = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 9, 1), nn.Flatten(), nn.Linear(576, 2))
    bank = higher_layer_filters(load_model(small, input_size=(3, 8, 8)))
    assert bank.layer == "1" and len(bank.weights) == 8
    assert not bank.weights.requires_grad
    # A refusal names the convolutions inside a layer, or the three that are nearest.
    four = nn.Sequential(
        nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(4))), nn.Flatten(), nn.Linear(192, 2)
    )
    nested = load_model(four, input_size=(3, 8, 8))
    for refused, layer, near in (
        *((model, "2", "'2.0'"), (model, "3", "'1', '2.0', '4'"), (model, "6", "'1', '2.0', '4'")),
        (model, "6.spare", "'1', '2.0', '4'"),
        (nested, "0", "'0.0', '0.1', '0.2'"),
    ):
        message = ""
        try:
            higher_layer_filters(refused, layer=layer)
        except ModelError as error:
            message = str(error)
        assert message.endswith(f"near it: {near}")


@method(
    family="filters",
    references=[
        Reference(
            key="karpathy2014",
            title="ConvNetJS: Deep Learning in your browser",
            authors="Karpathy",
            year=2014,
            url="https://cs.stanford.edu/people/karpathy/convnetjs/demo/cifar10.html",
        )
    ],
    invariants=[UnitRange(field="tiles")],
    cost=Cost(),
    oracle=_oracle,
    relations=[InvariantTo("normalization", fields=FIELDS), ScalesWith("logits", power=0, fields=FIELDS)],
    demo={"filters": 8, "slices": 24},
)
def higher_layer_filters(
    model: Model,
    *,
    layer: Annotated[
        LayerName | None,
        Field(description="layer with filters; default: the second convolution larger than 1 x 1"),
    ] = None,
    filters: Annotated[int, Field(ge=1, description="number of filters, from the first")] = 8,
    slices: Annotated[int, Field(ge=1, description="number of slices per filter, from the first")] = 16,
) -> FilterBank:
    """Filters of a higher convolution as rows of gray slices, one slice per input channel.

    slice_fc = (W_fc - min W_f) / (max W_f - min W_f)

    The slices of a filter share one scale, so that the input channels with large weights stand out. In a
    grouped convolution, the slices are the input channels of the filter's own group.

    Returns:
        ``weights`` (F, C, K, K): the first ``filters`` filters and their first ``slices`` input channels.
        ``tiles`` (F C, 3, K, K): gray images in [0, 1], filter by filter. ``layer``: name of the layer.

    Raises:
        ModelError: the layer has no weights of shape (F, C, K, K); the message names the nearest
            convolutions.

    Example::
        from phosphene import run

        result = run("higher_layer_filters", layer="features.5", filters=4, slices=8)
        result.tiles.shape  # (32, 3, 3, 3)

    Source:
        Karpathy 2014, the weights of the second and third convolution in the demo.
    """
    layer = layer if layer is not None else _second_convolution(model)
    weight = getattr(model.layers[layer], "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 4:
        kind = type(model.layers[layer]).__name__
        near = ", ".join(repr(n) for n in _nearest_convolutions(model, layer)) or "this model has none"
        raise ModelError(f"layer {layer!r} ({kind}) has no 2-D filters; convolutions near it: {near}")
    weights = weight[:filters, :slices].clone()
    rows, columns = weights.shape[:2]
    tiles = min_max(weights, (1, 2, 3)).flatten(0, 1)
    return FilterBank(
        layer=layer,
        weights=weights,
        tiles=tiles[:, None].repeat(1, 3, 1, 1),
        captions=tuple(f"{f}[{c}]" for f in range(rows) for c in range(columns)),
        columns=columns,
    )


def _convolutions(model: Model) -> list[str]:
    """The names of all convolutions in execution order."""
    return [n for n in model.structure.layers if isinstance(model.layers[n], nn.Conv2d)]


def _second_convolution(model: Model) -> str:
    higher = _convolutions(model)[1:]
    large = [n for n in higher if model.layers[n].get_parameter("weight").shape[2:].numel() > 1]
    if not higher:
        raise ModelError(f"{model.name} has no second convolution; first_layer_filters shows the first")
    return (large or higher)[0]


def _nearest_convolutions(model: Model, layer: str) -> list[str]:
    """Up to three convolutions: those inside the layer, else those nearest in execution order."""
    names = _convolutions(model)
    inside = [n for n in names if n.startswith(f"{layer}.")]
    order = {name: i for i, name in enumerate(model.structure.layers)}
    position = order.get(layer, len(order))
    nearest = sorted(names, key=lambda name: abs(order[name] - position))[:3]
    return inside[:3] or sorted(nearest, key=order.__getitem__)


@hookimpl
def phosphene_methods():
    return [higher_layer_filters]
