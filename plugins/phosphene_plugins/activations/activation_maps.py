"""Activation maps: what a layer's channels answer, and where."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, hookimpl, load_model, method
from phosphene.errors import InputError, ModelError
from phosphene.images import min_max, symmetric
from phosphene.results import ActivationMaps
from phosphene.roles import Images, LayerName, Model
from phosphene.spec import Cost, UnitRange, size

#: Modules that act on every value by itself, so that what they are given has the places they give.
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Softplus, nn.Tanh,
)  # fmt: skip


def _oracle() -> None:
    """Filters that pick one colour answer with that colour: its picture, min-max scaled, is the map."""
    convolution = nn.Conv2d(3, 3, 1, bias=False)
    with torch.no_grad():
        convolution.weight[:, :, 0, 0] = torch.eye(3) - 0.5 * torch.eye(3)[[1, 2, 0]]
    layers = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(192, 2))
    model = load_model(layers, input_size=(3, 8, 8))
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = images - 0.5 * images[:, [1, 2, 0]]
    low, high = before.amin((2, 3), keepdim=True), before.amax((2, 3), keepdim=True)
    scaled = activation_maps(model, images, layer="1", pre_activation=True).scaled
    assert torch.allclose(scaled, (before - low) / (high - low), atol=1e-6)
    assert torch.allclose(activation_maps(model, images, layer="1").maps, before.relu())


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
    quick={"channels": [0, 1]},
)
def activation_maps(
    model: Model,
    images: Images,
    *,
    layer: Annotated[
        LayerName | None, Field(description="whose answers; an activation half-way up unless told")
    ] = None,
    channels: Annotated[
        Annotated[list[int], Field(min_length=1)] | None, Field(description="which channels; all unless told")
    ] = None,
    scale: Annotated[
        Literal["each", "shared", "signed"],
        Field(description="each map from 0 to 1, an image's maps by one scale, or zero in the middle"),
    ] = "each",
    pre_activation: Annotated[bool, Field(description="what the activation is given, not gives")] = False,
    overlay: Annotated[bool, Field(description="lay the maps over the image")] = False,
) -> ActivationMaps:
    """Show what a layer's channels answer to each place of an image.

    A'_c = (A_c - min A_c) / (max A_c - min A_c)

    A constant map becomes zeros. ``scale="shared"`` takes one minimum and maximum over all the
    channels shown of an image, so that weak answers look weak and nearly empty maps empty;
    ``"signed"`` keeps zero in the middle, A_c / (2 max |A|) + 1/2 over the same channels, so that what
    excites and what inhibits are told apart. ``pre_activation`` shows what the
    activation module ``layer`` is given: a ReLU's input still has its negative answers. ``layer``:
    the last activation at the middle one of the model's resolutions unless told. ``channels``:
    their numbers; all unless told, of which the picture shows the strongest of each image.
    ``overlay`` lays the maps over the image. InputError for a channel that is not there; ModelError
    for a layer without places, or where nothing stands before the activation.
    """
    layer = layer if layer is not None else _middle_activation(model)
    count = model.map_shape(layer)[0]
    chosen = range(count) if channels is None else channels
    for channel in chosen:
        if not 0 <= channel < count:
            raise InputError(f"layer {layer!r} has {count} channels, so there is no number {channel}")
    if pre_activation and not isinstance(model.layers[layer], ACTIVATIONS):
        raise ModelError(_nothing_before(model, layer))
    features = model.input_of(images, layer) if pre_activation else model.features(images, layer)
    maps = model.maps(features, images)[:, list(chosen)]
    return ActivationMaps(
        images=images,
        maps=maps,
        scaled=_scaled(maps, scale),
        channels=tuple(chosen),
        layer=layer,
        layout="overlay" if overlay else "map",
        signed=scale == "signed",
    )


def _scaled(maps: Tensor, scale: Literal["each", "shared", "signed"]) -> Tensor:
    if scale == "signed":  # all channels of an image as one tall map
        return symmetric(maps.flatten(1, 2)).view_as(maps)
    return min_max(maps, (1, 2, 3) if scale == "shared" else (2, 3))


def _activations(model: Model) -> dict[str, int]:
    """The activation modules with maps, in the order they run, and how many places each has."""
    found = {}
    for name in model.structure.layers:
        if isinstance(model.layers[name], ACTIVATIONS):
            try:
                _, height, width = model.map_shape(name)
            except ModelError:  # it acts on a vector, in a head or a gate
                continue
            if height * width > 1:
                found[name] = height * width
    return found


def _middle_activation(model: Model) -> str:
    stages = list({places: name for name, places in _activations(model).items()}.values())
    stages = stages or list(model.stages)  # functional activations have no name
    return stages[(len(stages) - 1) // 2]


def _nothing_before(model: Model, layer: str) -> str:
    names = list(_activations(model))
    inside = [n for n in names if n.startswith(f"{layer}.")]
    kind = type(model.layers[layer]).__name__
    near = ", ".join(repr(n) for n in (inside or names)[-3:]) or "this model has none with maps"
    return f"layer {layer!r} is a {kind}, not an activation, so nothing stands before it; name one: {near}"


@hookimpl
def phosphene_methods():
    return [activation_maps]
