"""Activation maps: the feature maps of a layer's channels, scaled to [0, 1]."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, hookimpl, load_model, method, unit_centers
from phosphene.errors import ModelError
from phosphene.images import min_max, symmetric
from phosphene.results import ActivationMaps
from phosphene.roles import Images, LayerName, Model
from phosphene.spec import Cost, Equivariant, InvariantTo, ScalesWith, UnitRange, size

from ._channel_numbers import require_channels

#: Elementwise activation modules: their input is a map of the same size as their output.
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Softplus, nn.Tanh,
)  # fmt: skip


def _oracle() -> None:
    """For 1 x 1 filters that pick one color, the map is that color channel, min-max scaled."""
    convolution = nn.Conv2d(3, 3, 1, bias=False)
    with torch.no_grad():
        convolution.weight[:, :, 0, 0] = torch.eye(3) - 0.5 * torch.eye(3)[[1, 2, 0]]
    layers = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(192, 2))
    model = load_model(layers, input_size=(3, 8, 8), mean=[0.25] * 3, std=[0.5] * 3)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = (images - 0.25) / 0.5
    before = pixels - 0.5 * pixels[:, [1, 2, 0]]
    low, high = before.amin((2, 3), keepdim=True), before.amax((2, 3), keepdim=True)
    scaled = activation_maps(model, images, layer="1", pre_activation=True).scaled
    assert torch.allclose(scaled, (before - low) / (high - low), atol=1e-6)
    result = activation_maps(model, images, layer="1")
    assert torch.allclose(result.maps, before.relu()) and result.channels == (0, 1, 2)
    assert result.layout == "map" and not result.signed
    # Of channels 2 and 0 together: one minimum and maximum, or one largest absolute value, for each image.
    pair: Any = {"layer": "0", "channels": [2, 0], "overlay": True}
    before = before[:, [2, 0]]
    low, high = before.amin((1, 2, 3), keepdim=True), before.amax((1, 2, 3), keepdim=True)
    shared = activation_maps(model, images, scale="shared", **pair)
    assert torch.allclose(shared.scaled, (before - low) / (high - low), atol=1e-6)
    assert torch.allclose(shared.maps, before, atol=1e-6) and shared.channels == (2, 0)
    signed = activation_maps(model, images, scale="signed", **pair)
    assert torch.allclose(signed.scaled, before / torch.maximum(-low, high) / 2 + 0.5, atol=1e-6)
    assert signed.layout == "overlay" and signed.signed
    # Of the resolutions 8, 4 and 2 with activations the middle one, and there the last activation.
    sizes = nn.Sequential(
        *(nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.AdaptiveMaxPool2d(1), nn.ReLU(), nn.Flatten(), nn.Linear(3, 3), nn.ReLU()),
    )
    staged = load_model(sizes, input_size=(3, 8, 8))
    assert activation_maps(staged, images).layer == "4"
    message = ""
    try:
        activation_maps(staged, images, layer="2", pre_activation=True)
    except ModelError as error:
        message = str(error)
    assert message.endswith("name one: '3', '4', '6'")


@method(
    family="activations",
    references=[
        Reference(
            key="yosinski2015",
            title="Understanding Neural Networks Through Deep Visualization",
            authors="Yosinski, Clune, Nguyen, Fuchs, Lipson",
            year=2015,
            url="https://arxiv.org/abs/1506.06579",
        )
    ],
    invariants=[UnitRange(field="scaled")],
    cost=Cost(forward=size.images),
    oracle=_oracle,
    relations=[
        *(Equivariant(transform) for transform in ("hflip", "vflip", "transpose", "shift")),
        InvariantTo("batch_order"),
        InvariantTo("normalization"),
        ScalesWith("logits", power=0),
        ScalesWith("images", power=1, fields=("maps",)),
        ScalesWith("images", power=0, fields=("scaled",)),
    ],
    quick={"channels": [0, 1]},
    demo={"model": "builtin:parts-resnet", "images": "builtin:part-scenes/3"},
)
def activation_maps(
    model: Model,
    images: Images,
    *,
    layer: Annotated[
        LayerName | None,
        Field(description="layer to show; default: the last activation at the middle resolution"),
    ] = None,
    channels: Annotated[
        Annotated[list[int], Field(min_length=1)] | None, Field(description="channel numbers; default: all")
    ] = None,
    scale: Annotated[
        Literal["each", "shared", "signed"],
        Field(description="scaling to [0, 1]: of each map, of an image's maps together, or with zero at 1/2"),
    ] = "each",
    pre_activation: Annotated[
        bool, Field(description="show the input of the activation module instead of its output")
    ] = False,
    overlay: Annotated[bool, Field(description="draw the maps over the image")] = False,
) -> ActivationMaps:
    """Activation maps: the output of a layer's channels at each position of an image.

    A'_c = (A_c - min A_c) / (max A_c - min A_c)

    A constant map becomes zeros. ``scale="shared"`` uses one minimum and maximum over all selected channels
    of an image, so that weak maps stay weak; ``scale="signed"`` is A_c / (2 max |A|) + 1/2 with the maximum
    over the same channels, so that positive and negative activations are distinguishable.
    ``pre_activation`` shows the input of the activation module ``layer``: a ReLU's input still has its
    negative values.

    Returns:
        ``maps`` (N, K, h, w): the activations of K channels, ``scaled`` (N, K, h, w): the same in [0, 1].
        Figures show the nine channels of largest activation of each image,
        with ``overlay`` where the units are centered (``centers``).

    Raises:
        InputError: a channel that the layer does not have.
        ModelError: the layer's output is not a map, or ``pre_activation`` with a layer that is not an
            activation module.

    Example::
        from phosphene import run

        result = run("activation_maps", images="builtin:scenes/2", layer="features.8", channels=[0, 5])
        result.maps.shape  # (2, 2, 32, 32)

    Source:
        Yosinski et al. 2015, section 2.
    """
    layer = layer if layer is not None else _middle_activation(model)
    count = model.map_shape(layer)[0]
    selected = range(count) if channels is None else channels
    require_channels(selected, layer, count)
    if pre_activation and not isinstance(model.layers[layer], ACTIVATIONS):
        raise ModelError(_not_an_activation(model, layer))
    features = model.input_of(images, layer) if pre_activation else model.features(images, layer)
    # The input of a layer may have another layout than its output.
    maps = model.maps(features, images, None if pre_activation else layer)[:, list(selected)]
    return ActivationMaps(
        images=images,
        maps=maps,
        scaled=_scaled(maps, scale),
        channels=tuple(selected),
        layer=layer,
        layout="overlay" if overlay else "map",
        signed=scale == "signed",
        centers=unit_centers(model, layer, images.shape[2:]),
    )


def _scaled(maps: Tensor, scale: Literal["each", "shared", "signed"]) -> Tensor:
    if scale == "signed":  # one scale for all channels of an image: stacked into one tall map
        return symmetric(maps.flatten(1, 2)).view_as(maps)
    return min_max(maps, (1, 2, 3) if scale == "shared" else (2, 3))


def _activations(model: Model) -> dict[str, int]:
    """The activation modules whose output is a map, in execution order, and how many positions each has."""
    positions = {}
    for name in model.structure.layers:
        if isinstance(model.layers[name], ACTIVATIONS):
            try:
                _, height, width = model.map_shape(name)
            except ModelError:  # the module acts on a vector, in a head or a gate
                continue
            if height * width > 1:
                positions[name] = height * width
    return positions


def _middle_activation(model: Model) -> str:
    # Of the activations with the same number of positions, the last.
    stages = list({positions: name for name, positions in _activations(model).items()}.values())
    stages = stages or list(model.stages)  # functional activations have no module to name
    return stages[(len(stages) - 1) // 2]


def _not_an_activation(model: Model, layer: str) -> str:
    names = list(_activations(model))
    inside = [n for n in names if n.startswith(f"{layer}.")]
    kind = type(model.layers[layer]).__name__
    near = ", ".join(repr(n) for n in (inside or names)[-3:]) or "this model has none with maps"
    return f"layer {layer!r} is a {kind}, not an activation, so it has no pre-activation; name one: {near}"


@hookimpl
def phosphene_methods():
    return [activation_maps]
