"""Activation patching: a score with parts of a layer's activations replaced by another image's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Model as _Model
from phosphene import Reference, batch_size, hookimpl, load_model, method, progress_bar, scores
from phosphene.roles import Images, LayerName, Model, Sources, Target
from phosphene.spec import Agrees, Calls, Cost, InvariantTo, ScalesWith, either, length, maximum, param, size

from ..attention._oracle_networks import linear_transformer
from ._patching_result import PatchingEffects


def effects_of_a_linear_head() -> None:
    """Above the last convolution all is linear: a part's effect is its share of the head's products.

    Below it, the effect is that of the layers above on activations that are replaced by hand.
    """
    draw = torch.Generator().manual_seed(0)
    head = nn.Linear(5 * 12, 3)
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 2), nn.Flatten(), head)
    network = nn.Sequential(*layers).double()
    model = load_model(network, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], input_size=(3, 6, 7))
    images, sources = torch.rand(2, 2, 3, 6, 7, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        both = model(torch.cat([images, sources]))[:, 2]
        outputs = [[model.features(x, layer) for x in (images, sources)] for layer in ("1", "2")]
        result = activation_patching(model, images, sources, 2, layers=["1", "2"], grid=8)
        torch.testing.assert_close(torch.cat([result.scores, result.source_scores]), both)
        torch.testing.assert_close(result.layer_effects, (both[2:] - both[:2])[:, None].expand(-1, 2))
        assert result.sizes == ((4, 5), (3, 4)) and not result.token_effects.any()
        products = (outputs[1][1] - outputs[1][0]) * head.weight[2].view(5, 3, 4)
        torch.testing.assert_close(result.of_layer("2"), products.sum(1))
        for n, row, column in ((0, 0, 0), (1, 3, 4), (0, 2, 1)):
            replaced = outputs[0][0][n : n + 1].clone()
            replaced[:, :, row, column] = outputs[0][1][n, :, row, column]
            expected = network[2:](replaced)[0, 2] - both[n]
            torch.testing.assert_close(result.of_layer("1")[n, row, column], expected)
        # Blocks of 3 x 4 positions in a grid of 2: rows 0 and 1 to 2, columns 0 to 1 and 2 to 3.
        coarse = activation_patching(model, images, sources, 2, layers=["2"], grid=2).of_layer("2")
        cells = products.sum(1)
        torch.testing.assert_close(coarse[:, 0, 1], cells[:, :2, 2:].sum((1, 2)))
        torch.testing.assert_close(coarse[:, 1, 0], cells[:, 2:, :2].sum((1, 2)))
        result = activation_patching(model, images, sources, 2, layers=["1", "2"], unit="channel")
        torch.testing.assert_close(result.of_layer("2"), products.sum((2, 3)))
        replaced = outputs[0][0].clone()
        replaced[:, 3] = outputs[0][1][:, 3]
        torch.testing.assert_close(result.of_layer("1")[:, 3], network[2:](replaced)[:, 2] - both[:2])
        assert result.effects.shape == (2, 2, 5) and not result.effects[:, 0, 4].any()
        # A predicted target is the class of the unpatched image, in each of its patched passes.
        predicted = model(images).argmax(1)
        result = activation_patching(model, images, sources, None, layers=["2"], unit="channel")
        torch.testing.assert_close(result.scores, model(images).amax(1))
        weights = head.weight[predicted].view(2, 5, 12)
        change = (outputs[1][1] - outputs[1][0]).flatten(2)
        torch.testing.assert_close(result.of_layer("2"), (change * weights).sum(2))
        assert result.targets == tuple(f"class {n}" for n in predicted.tolist())
    _tokens_without_a_position_are_replaced_together()


@torch.no_grad()
def _tokens_without_a_position_are_replaced_together() -> None:
    """Of a transformer's layer, the class token of the source, and patches by their blocks."""
    network, model, images = linear_transformer(heads=(2, 1))
    sources = images.flip(0)
    result = activation_patching(model, images, sources, 1, layers=["blocks.0"], grid=2)
    first, last = network.layers
    tokens, others = (first(network.tokens(model.normalize(x))) for x in (images, sources))
    before = model(images)[:, 1]
    for rows, effect in (([0], result.token_effects[:, 0]), ([9, 10, 14, 15], result.effects[:, 0, 3])):
        patched = tokens.clone()
        patched[:, rows] = others[:, rows]
        torch.testing.assert_close(effect, network.head(last(patched)[:, 0])[:, 1] - before)


def score_differences(calls: Calls) -> Tensor:
    """S(source) - S(x) for each layer: what all of a layer's activations change where no path avoids it."""
    with torch.no_grad():
        change = calls.scores(calls.inputs["sources"]) - calls.scores(calls.inputs["images"])
    return change[:, None].expand(-1, len(calls.result.layers))


@method(
    family="interventions",
    references=[
        Reference(
            key="vig2020",
            title="Investigating Gender Bias in Language Models Using Causal Mediation Analysis",
            authors="Vig, Gehrmann, Belinkov, Qian, Nevo, Singer, Shieber",
            year=2020,
            url="https://arxiv.org/abs/2004.12265",
        ),
        Reference(
            key="meng2022",
            title="Locating and Editing Factual Associations in GPT",
            authors="Meng, Bau, Andonian, Belinkov",
            year=2022,
            url="https://arxiv.org/abs/2202.05262",
        ),
        Reference(
            key="zhang2024",
            title="Towards Best Practices of Activation Patching in Language Models: Metrics and Methods",
            authors="Zhang, Nanda",
            year=2024,
            url="https://arxiv.org/abs/2309.16042",
        ),
    ],
    relations=[
        Agrees(score_differences, fields=("layer_effects",)),
        ScalesWith("logits", power=1, fields=("effects", "layer_effects")),
        InvariantTo("logit_shift", fields=("effects", "layer_effects")),
        InvariantTo("normalization", fields=("effects", "layer_effects")),
        InvariantTo("batch_order", fields=("effects",)),
    ],
    cost=Cost(
        # Of each layer: its output, all of it, the tokens without a position, and its blocks or channels.
        forward=size.images
        * (
            2
            + length(either(param.layers, size.stages))
            * (3 + maximum(param.grid * param.grid, size.channels))
        )
    ),
    oracle=effects_of_a_linear_head,
    quick={"grid": 2},
    demo={"images": "builtin:scenes/4", "sources": "builtin:textures/1"},
)
def activation_patching(
    model: Model,
    images: Images,
    sources: Sources,
    target: Target = None,
    *,
    layers: Annotated[
        list[LayerName] | None,
        Field(min_length=1, description="layers to patch; default: the model's stages"),
    ] = None,
    unit: Annotated[
        Literal["position", "channel"],
        Field(description="what is replaced at a time: a block of positions, or a channel at all positions"),
    ] = "position",
    grid: Annotated[
        int, Field(ge=1, le=64, description="most blocks of positions along each side of a layer's map")
    ] = 8,
) -> PatchingEffects:
    """Activation patching: the change of a score by each part of a layer from another image.

    effect_p = S(x; A_p = A_p(source)) - S(x)

    One part at a time is replaced in one layer, and the layers above are computed from it: a block of
    positions with all its channels, or a channel at all positions. An effect near S(source) - S(x) means that
    the part carries what distinguishes the two images for the target; a positive one, that the source's part
    speaks for it. In a layer that no path avoids, replacing all of it gives S(source) exactly
    (``layer_effects``); around skip connections it gives the layer's part. Of a transformer's layer the class
    token and registers have no position; they are replaced together (``token_effects``).

    An image and its source should differ in what is studied alone, such as the object before the same
    background. By default the source is blank: all pixels have the image's mean color.

    Returns:
        ``effects`` (N, L, U); ``of_layer(name)`` (N, h, w) or (N, C); ``layer_effects`` and
        ``token_effects`` (N, L); ``scores`` and ``source_scores`` (N).

    Raises:
        InputError: sources of another size, or another number of them than one or one for each image.
        ModelError: a layer whose output is not a map.

    Example::
        from phosphene import run

        inputs = {"images": "builtin:scenes/2", "sources": "builtin:textures/1"}
        result = run("activation_patching", **inputs, layers=["features.15"], grid=4)
        result.of_layer("features.15").shape  # (2, 4, 4)

    Source:
        Vig et al. 2020, section 3; Meng et al. 2022, section 2.1; Zhang and Nanda 2024, section 2.
    """
    names = list(layers or model.stages)
    target = target.resolve(model, images)
    before, of_source = (_scores(model, x, target) for x in (images, sources))
    effects, entire, tokens = [], [], []
    sizes: list[tuple[int, ...]] = []
    for name in progress_bar(names, "layers", len(names)):
        rows = []
        for n in range(len(images)):
            own = target.select([n])
            # equivalent mutants: results are detached
            replaced = model.features(sources[n : n + 1], name).detach()
            parts, shape = _parts(model, replaced, images[n : n + 1], name, unit, grid)
            without_position = ~parts.any(0, keepdim=True)
            masks = torch.cat([torch.ones_like(without_position), without_position, parts])
            values = _patched_scores(model, images[n], own, name, replaced, masks) - before[n]
            # Replacing nothing changes the score by rounding alone.
            values[1] = values[1] if unit == "position" and without_position.any() else 0
            rows.append(values)
        changes = torch.stack(rows)
        sizes.append(shape)
        entire.append(changes[:, 0])
        tokens.append(changes[:, 1])
        effects.append(changes[:, 2:])
    width = max(part.shape[1] for part in effects)
    return PatchingEffects(
        images=images,
        sources=sources,
        targets=target.names(model, len(images)),
        scores=before,
        source_scores=of_source,
        layers=tuple(names),
        sizes=tuple(sizes),
        effects=torch.stack([nn.functional.pad(part, (0, width - part.shape[1])) for part in effects], 1),
        layer_effects=torch.stack(entire, 1),
        token_effects=torch.stack(tokens, 1),
    )


def _scores(model: _Model, images: Tensor, target: Target) -> Tensor:
    """The target's scores (N), in batches."""
    parts = torch.arange(len(images)).split(batch_size(model))
    # equivalent mutants: a tensor selects the same rows
    return torch.cat([scores(model, images[rows], target.select(rows.tolist())) for rows in parts])


def _parts(
    model: _Model, output: Tensor, image: Tensor, layer: str, unit: str, grid: int
) -> tuple[Tensor, tuple[int, ...]]:
    """Masks (U, ...) of the parts of a layer's output, and how they are arranged: (h, w) or (C,)."""
    # The position of each number of the map in the layer's output, whatever its layout.
    numbers = torch.arange(output.numel(), dtype=torch.float64, device="cpu").view(output.shape)
    positions = model.maps(numbers, image, layer)[0].long()
    channels, height, width = positions.shape
    if unit == "channel":
        label = torch.arange(channels)[:, None, None].expand_as(positions)
        shape: tuple[int, ...] = (channels,)
    else:
        rows, columns = min(grid, height), min(grid, width)
        row, column = torch.arange(height) * rows // height, torch.arange(width) * columns // width
        label = (row[:, None] * columns + column).expand_as(positions)
        shape = (rows, columns)
    part_of = torch.full((output.numel(),), -1)
    part_of[positions.flatten()] = label.flatten()
    count = int(label.max()) + 1
    return (part_of == torch.arange(count)[:, None]).view(count, *output.shape[1:]), shape


def _patched_scores(
    model: _Model, image: Tensor, target: Target, layer: str, replaced: Tensor, masks: Tensor
) -> Tensor:
    """The scores (U) of an image with the masked parts of a layer's output replaced."""
    values = []
    for some in masks.split(batch_size(model)):
        repeated = image.expand(len(some), -1, -1, -1)
        with model.tap(layer, replace=_replacement(some.to(replaced.device), replaced)):
            values.append(scores(model, repeated, target.select([0] * len(some))))
    return torch.cat(values)


def _replacement(masks: Tensor, replaced: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda output: torch.where(masks, replaced, output)


@hookimpl
def phosphene_methods():
    return [activation_patching]
