"""Neuron visualization by activation maximization: neurons, channels, layers and directions."""

import dataclasses
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from phosphene import InputError, batch_size, hookimpl, load_model, max_batch, method
from phosphene.results import Synthesis
from phosphene.roles import Frames, LayerName, Model, Seed, Start
from phosphene.spec import Cost, Monotone, PixelRange, ScalesWith, param, size

from ._activation_maximization import (
    MORDVINTSEV,
    OLAH,
    PENALTY_PASSES,
    SIMONYAN,
    YOSINSKI,
    ActivationMaximization,
    maximize_activation,
)
from ._relations import PLAIN, agrees_with_ascent, unit_ascent


def linear_neuron_has_its_closed_form() -> None:
    """For a neuron w.x of a convolution, max w.x - lambda ||I - m||^2 is m + w / (2 lambda) in its field."""
    conv = torch.nn.Conv2d(3, 2, 3, bias=False).double()
    weight = torch.linspace(-1, 1, 54, dtype=torch.float64).view(2, 3, 3, 3)
    with torch.no_grad():
        conv.weight.copy_(weight)
    model = load_model(torch.nn.Sequential(conv, torch.nn.ReLU()), input_size=(3, 5, 5))
    plain: Any = {"parametrization": "pixels", "optimizer": "sgd", "lr": 0.2, "start_noise": 0.0, **PLAIN}
    plain |= {"l2": 1.0, "steps": 40}
    result = neuron_visualization(model, layer="0", unit="neuron", channels=(1, 0), position=(1, 2), **plain)
    expected = torch.full((2, 3, 5, 5), 0.5, dtype=torch.float64)
    expected[:, :, 1:4, 2:5] += weight[[1, 0]] / 2
    assert (result.images - expected.clamp(0, 1)).abs().max() < 1e-6, "not at m + w / (2 lambda)"
    assert result.targets == ("0[1,1,2]", "0[0,1,2]") and result.scores.shape == (40, 2)
    # The neuron in the center by default; of a vector, maps of one pixel, the means are its entries.
    central = neuron_visualization(model, layer="0", unit="neuron", channels=(1, 0), **plain).images
    assert (central - expected.clamp(0, 1).roll(-1, 3)).abs().max() < 1e-6
    vector = load_model(torch.nn.Sequential(conv, torch.nn.Flatten()), input_size=(3, 3, 3))
    with max_batch(1):
        entries = neuron_visualization(vector, layer="1", channels=(1, 0), frames=2, **plain)
    assert (entries.images - (0.5 + weight[[1, 0]] / 2).clamp(0, 1)).abs().max() < 1e-6
    assert entries.targets == ("1[1]", "1[0]") and entries.frames is not None
    both = neuron_visualization(vector, layer="1", unit="direction", channels=(1, 0), **plain)
    assert (both.images - (0.5 + weight.sum(0) / 2).clamp(0, 1)).abs().max() < 1e-6
    assert both.targets == ("1: the direction",)
    pairs_are_weighted_means(vector, weight, plain)
    start = torch.full((1, 3, 3, 3), 0.4, dtype=torch.float64)
    one = neuron_visualization(vector, start, layer="1", channels=(0,), **plain | {"steps": 1}).images
    assert (one - (start + 0.2 * (weight[0] + 0.2)).clamp(0, 1)).abs().max() < 1e-9
    # The layer has channels 0 and 1 of 3x3 positions.
    cases: tuple[tuple[Any, dict[str, Any], str], ...] = (
        (model, {"channels": (0, 2)}, "channel 2"),
        (model, {"position": (3, 0)}, "position (3, 0)"), (model, {"position": (0, 3)}, "position (0, 3)"),
        (vector, {"position": (1, 0)}, "position (1, 0)"), (vector, {"position": (0, 1)}, "position (0, 1)"),
    )  # fmt: skip
    for network, outside, absent in cases:
        message = ""
        try:
            layer = "1" if network is vector else "0"
            neuron_visualization(network, layer=layer, **{"channels": (1,)} | outside, **plain)
        except InputError as error:
            message = str(error)
        assert message.endswith(f", no {absent}"), f"{absent} is accepted, or not named: {message}"


def pairs_are_weighted_means(vector: Any, weight: Tensor, plain: dict[str, Any]) -> None:
    """Of linear entries, the images of pairs have the pairs' mean weights; equal ones fill two cells."""
    options = plain | {"layer": "1", "unit": "pair", "channels": (1, 0)}
    for pair_weight, shares, layout, names in (
        (0.5, (0, 0.5, 1), [[0, 1], [1, 2]], ("1[1]", "1[1] + 1[0]", "1[0]")),
        (
            0.25, (0, 0.75, 0.25, 1), [[0, 1], [2, 3]],
            ("1[1]", "0.25 1[1] + 0.75 1[0]", "0.25 1[0] + 0.75 1[1]", "1[0]"),
        ),
    ):  # fmt: skip
        pairs = neuron_visualization(vector, **options, pair_weight=pair_weight)
        means = torch.stack([(1 - share) * weight[1] + share * weight[0] for share in shares])
        assert (pairs.images - (0.5 + means / 2).clamp(0, 1)).abs().max() < 1e-6
        assert pairs.layout is not None and pairs.layout.tolist() == layout and pairs.targets == names
        doubled = options | {"pair_weight": pair_weight, "variants": 2, "start_noise": 0.01}
        twice = neuron_visualization(vector, **doubled)
        assert (twice.images[::2] - pairs.images).abs().max() < 1e-3 and twice.layout is not None
        assert twice.layout.tolist() == [[v for n in row for v in (2 * n, 2 * n + 1)] for row in layout]


@method(
    family="synthesis",
    references=[
        YOSINSKI,
        SIMONYAN,
        OLAH,
        MORDVINTSEV,
    ],
    invariants=[PixelRange()],
    needs=["gradients"],
    cost=Cost(
        forward=size.channels * param.variants * ((1 + param.transparent + PENALTY_PASSES) * param.steps + 8),
        backward=size.channels * param.variants * ((1 + PENALTY_PASSES) * param.steps + 8),
    ),
    oracle=linear_neuron_has_its_closed_form,
    exempt={"parameters_matter": "pair_weight matters only for pairs"},
    relations=[
        agrees_with_ascent(unit_ascent),
        agrees_with_ascent(unit_ascent, seed=0),
        agrees_with_ascent(unit_ascent, unit="neuron", channels=(3, 1)),
        agrees_with_ascent(unit_ascent, unit="neuron", position=(1, 2), size=None),
        agrees_with_ascent(unit_ascent, unit="layer"),
        agrees_with_ascent(unit_ascent, unit="direction", channels=(2, 0), direction=[1.5, -0.5]),
        agrees_with_ascent(unit_ascent, unit="direction", channels=(2, 4)),
        ScalesWith("logits", power=0),
        Monotone(
            "steps",
            values=(2, 6, 12),
            measure="scores",
            where=PLAIN,
            networks=("gap",),
        ),
    ],
    quick={"steps": 4, "size": None, "channels": (0, 1)},
    demo={"model": "builtin:parts-resnet", "layer": "layer2", "steps": 150},
)
def neuron_visualization(
    model: Model,
    start: Start = None,
    *,
    layer: Annotated[
        LayerName | None, Field(description="layer of the units; default: the last one with feature maps")
    ] = None,
    unit: Annotated[
        Literal["neuron", "channel", "layer", "direction", "pair"],
        Field(description="kind of unit to maximize"),
    ] = "channel",
    channels: Annotated[
        tuple[NonNegativeInt, ...], Field(min_length=1, description="channel indices c, one image each")
    ] = (0, 1, 2, 3, 4),
    position: Annotated[
        tuple[NonNegativeInt, NonNegativeInt] | None,
        Field(description="position (y, x) of a neuron in the feature map; default: the center"),
    ] = None,
    direction: Annotated[
        list[float] | None, Field(description="weights v_c of the channels in a direction; default: all 1")
    ] = None,
    pair_weight: Annotated[
        float,
        Field(ge=0, le=1, description="weight of the first channel of a pair; the second has the rest"),
    ] = 0.5,
    params: ActivationMaximization = ActivationMaximization(start_noise=0.1),
    frames: Frames = 0,
    seed: Seed = None,
) -> Synthesis:
    """Neuron visualization by activation maximization: images for neurons, channels, layers or directions.

    I* = argmax_I S(I) - l2 ||I - m||^2 - total_variation TV(I)

    S = F_c(y, x) of a "neuron", mean F_c of a "channel", mean F^2 of a "layer", mean sum_c v_c F_c of a
    "direction", mean (w F_c + (1 - w) F_d) of a "pair" with ``pair_weight`` w, and F the feature maps at
    ``layer``

    The network is evaluated up to the layer only. Regularizers and optimizers are those of
    ``class_visualization``. The start is noise, because most ReLUs of a layer are closed on a uniform image;
    where the noise does not activate a unit, coarser noise is tried.

    The figure of all pairs is the grid of the channels' interactions: row c, column d, and the single
    channels on the diagonal. With a ``pair_weight`` of 1/2 a pair has one image, which is in two cells; with
    another one, the images of (c, d) and (d, c) lean towards the channel of their row.

    Returns:
        ``images`` (N, C, size, size) in [0, 1], one for each of the ``channels``, or one in all for a layer
        or a direction, or one for each pair of the channels, (0, 0), (0, 1), ... (1, 1), ..., for a
        ``pair_weight`` that is not 1/2 also (1, 0), ..., each with its ``variants`` in a row; ``scores``
        (steps, N), S at every step; ``alpha`` (N, size, size) if ``transparent``; of pairs ``layout``, the
        number of the image in each cell of the grid.

    Raises:
        InputError: channels, a position or a direction that the layer does not have.
        DivergenceError: the gradient is zero at the start; try another seed or more ``start_noise``.

    Example::
        from phosphene import run

        result = run("neuron_visualization", layer="relu4_1", channels=(3, 7), steps=5, seed=0)
        result.images.shape  # (2, 3, 64, 64)

    Source:
        Yosinski et al. 2015, section 3; Olah et al. 2017.
    """
    layer = layer or model.last_map
    depth, height, width = _map_shape(model, layer)
    y, x = position or (height // 2, width // 2)
    if max(channels) >= depth or y >= height or x >= width:
        absent = [channel for channel in channels if channel >= depth]
        what = f"channel {absent[0]}" if absent else f"position ({y}, {x})"
        raise InputError(f"layer {layer!r} has {depth} channels of {height}x{width}, no {what}")
    if direction is not None and len(direction) != len(channels):
        raise InputError(f"a direction needs {len(channels)} numbers, one per channel, not {len(direction)}")
    weights = torch.zeros(depth, device=model.device, dtype=model.dtype)
    weights[list(channels)] = weights.new_tensor(direction or [1.0] * len(channels))

    def score(images: Tensor, channel: Tensor) -> Tensor:
        maps = _feature_maps(model, images, layer)
        rows = torch.arange(len(images))
        match unit:
            case "neuron":
                return maps[rows, channel, y, x]
            case "channel":
                return maps[rows, channel].mean((1, 2))
            case "layer":
                return maps.square().mean((1, 2, 3))
            case "pair":
                first, second = maps[rows[:, None], channel].mean((2, 3)).unbind(1)
                return pair_weight * first + (1 - pair_weight) * second
        return torch.einsum("nchw,c->nhw", maps, weights).mean((1, 2))

    one_image = unit in ("layer", "direction")
    suffix = f",{y},{x}" if unit == "neuron" else ""
    results = []
    units = torch.tensor(channels[:1] if one_image else channels)
    layout = None
    if unit == "pair":
        cells = _grid_cells(len(channels), symmetric=pair_weight == 0.5)
        units = units[cells]
        layout = _grid_layout(cells, len(channels), params.variants)
    for batch in units.split(max(1, batch_size(model) // params.variants)):
        batch = batch.repeat_interleave(params.variants, 0)
        optimization = maximize_activation(
            model,
            partial(score, channel=batch),
            len(batch),
            start,
            params,
            layer=layer,
            frames=frames,
            seed=seed,
        )
        if unit == "pair":
            names = [_pair_name(layer, c, d, pair_weight) for c, d in batch.tolist()]
        else:
            names = [f"{layer}: the {unit}" if one_image else f"{layer}[{c}{suffix}]" for c in batch.tolist()]
        results.append(Synthesis(**optimization._asdict(), targets=tuple(names)))
    return dataclasses.replace(Synthesis.concatenate(results), layout=layout)


def _grid_cells(count: int, *, symmetric: bool) -> Tensor:
    """Rows and columns (P, 2) of the cells of a grid; of a symmetric one, those on and above the diagonal."""
    cells = torch.cartesian_prod(torch.arange(count), torch.arange(count)).view(-1, 2)
    return cells[cells[:, 0] <= cells[:, 1]] if symmetric else cells


def _grid_layout(cells: Tensor, count: int, variants: int) -> Tensor:
    """The number of the image in every cell (count, count * variants), variants side by side."""
    grid = torch.empty(count, count, dtype=torch.long)
    grid[cells[:, 1], cells[:, 0]] = torch.arange(len(cells))
    grid[cells[:, 0], cells[:, 1]] = torch.arange(len(cells))
    return (variants * grid[..., None] + torch.arange(variants)).flatten(1)


def _pair_name(layer: str, first: int, second: int, weight: float) -> str:
    if first == second:
        return f"{layer}[{first}]"
    if weight == 0.5:
        return f"{layer}[{first}] + {layer}[{second}]"
    return f"{weight:g} {layer}[{first}] + {1 - weight:g} {layer}[{second}]"


def _map_shape(model: Model, layer: str) -> tuple[int, int, int]:
    """Channels, height and width at a layer; a vector counts as maps of one pixel."""
    shape = model.structure.layers[layer].shape if layer in model.structure.layers else None
    return (*shape, 1, 1) if shape and len(shape) == 1 else model.map_shape(layer)


def _feature_maps(model: Model, images: Tensor, layer: str) -> Tensor:
    """Feature maps (N, C, H, W) at a layer; a vector as maps of one pixel."""
    features = model.features(images, layer)
    return model.maps(features, images, layer) if features.ndim > 2 else features[..., None, None]


@hookimpl
def phosphene_methods():
    return [neuron_visualization]
