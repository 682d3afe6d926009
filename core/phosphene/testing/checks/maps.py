"""Checks of attribution maps that nobody has to declare: units of pixels, positions, numbers of samples."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
from torch import Tensor, nn

from ...errors import PhospheneError
from ...models import load_model
from ...results import AdversarialExamples
from ..cases import Case, properties_of
from ..observation import mean_rank_correlation
from ..symmetric_networks import relation_network
from .base import MAP_PER_PIXEL, register_check, result_of
from .relations import RelationCalls, maps_images_of_a_model, prose_of, text_of

if TYPE_CHECKING:
    from ...models import Model
    from .base import AnyMethod

#: What the name of a parameter contains that is a number of random samples.
_SAMPLE_WORDS = ("samples", "masks", "copies", "repeats", "draws")
#: Numbers of samples that are compared, and the largest ratio of the maps' spreads; 0.25 is expected.
_FEW, _MANY, _LARGEST_RATIO = 4, 64, 0.6


def _explains_layer_inputs(method: AnyMethod) -> str | None:
    if "relevance" in text_of(method):
        return "relevance is distributed over the first layer's inputs, which are normalized pixels"
    return None


@register_check(
    "method",
    "The map is that of the pixels, wherever the model normalizes them.",
    "images are pixels in [0, 1]: multiply by them, not by the normalized pixels",
    lambda method: maps_images_of_a_model(method) or _explains_layer_inputs(method),
    exemptible=True,
)
def explains_pixels(method: AnyMethod) -> None:
    def compare(calls: RelationCalls, images: str) -> None:
        # Dark images: a pixel and a normalized pixel have opposite signs.
        dark = {images: 0.05 + 0.15 * calls.inputs[images]}
        outside = calls(inputs=dark).maps
        inside = calls(inputs=dark, model=calls.normalized_inside()).maps
        if outside.shape == inside.shape:
            correlation = mean_rank_correlation(outside, inside)
            assert correlation > -0.3, (
                "of two models with equal logits, one of which normalizes inside its network, the maps have "
                f"rank correlation {correlation:.2f} on dark images\non relation_network({calls.network!r})"
            )

    _on_a_network(method, compare)


@register_check(
    "method",
    "The map does not depend on the order of the color channels.",
    "sums and maxima over the channels: an index that takes one of them",
    maps_images_of_a_model,
    exemptible=True,
)
def independent_of_the_channel_order(method: AnyMethod) -> None:
    order = [2, 0, 1]

    def compare(calls: RelationCalls, images: str) -> None:
        # Of a data set as well, with whose colors the images' may be replaced.
        inputs = calls.transformed(lambda values: values[:, order] if values.ndim == 4 else values)
        reordered = calls(inputs=inputs, model=_with_channels(calls.network, order)).maps
        correlation = mean_rank_correlation(calls.result.maps, reordered)
        assert correlation > 0.9, (
            "with the color channels of the images and of the model's first layer in another order, the map "
            f"has rank correlation {correlation:.2f} with the map before\n"
            f"on relation_network({calls.network!r})"
        )

    _on_a_network(method, compare)


def _on_a_network(method: AnyMethod, compare: Callable[[RelationCalls, str], None]) -> None:
    """Call ``compare`` with the calls on the first network that is not refused, and the input of images.

    Raises SkipTest where all networks are refused, and for a method that draws random numbers.
    """
    declared = method.spec.input("images")
    assert declared is not None
    refusals = []
    for network in ("gap", "flat"):
        try:
            calls = RelationCalls.start(method, network, Case().arguments(method))
            if calls.is_random:
                raise SkipTest("it draws random numbers")
            compare(calls, declared.name)
            return
        except PhospheneError as refusal:
            refusals.append(str(refusal))
    raise SkipTest(f"it refused the networks: {'; '.join(refusals)}")


def _with_channels(network: str, order: list[int]) -> Model:
    """The model of a relation network for images whose color channels are in another order."""
    model = relation_network(network).model
    first = next(part for part in model.module.modules() if isinstance(part, nn.Conv2d))
    with torch.no_grad():
        first.weight.copy_(first.weight[:, order].clone())
    model.mean, model.std = model.mean[order], model.std[order]
    return model


#: An image and its bright dots, at centers of units of ``_strided_model``, whose last map is 6x8.
_STRIDED_SIZE, _DOTS = (96, 128), ((32, 48), (64, 96), (48, 16))


@register_check(
    "method",
    "A map that is coarser than the image is enlarged around the pixels at which its units are centered.",
    "the result's centers: Attribution(..., centers=unit_centers(model, layer, images.shape[2:])), with "
    "unit_centers from phosphene",
    lambda method: maps_images_of_a_model(method) or (method.seed and "it draws random numbers"),
    exemptible=True,
    requires=MAP_PER_PIXEL,
)
def lies_where_the_units_are_centered(method: AnyMethod) -> None:
    for y, x in _DOTS:
        images = torch.zeros(1, 3, *_STRIDED_SIZE)
        images[:, :, y - 2 : y + 3, x - 2 : x + 3] = 1
        model = _strided_model()
        result = result_of(method, Case(count=1, size=_STRIDED_SIZE, target=0), model, images=images)
        if result is None or tuple(result.maps.shape[1:]) == _STRIDED_SIZE:
            raise SkipTest("its maps have a value for each pixel" if result else "it refused the network")
        shapes = [info.shape or () for info in model.structure.layers.values()]
        sides = {shape[1:] for shape in shapes if len(shape) == 3}
        if tuple(result.maps.shape[1:]) not in sides:
            raise SkipTest("its maps have the size of no layer")
        if _sizes_on(method, _strided_model(layers=3)) == tuple(result.maps.shape[1:]):
            raise SkipTest("its cells are those of a grid, not the units of a layer")
        heat = result.heat()[0]
        if float(heat.max() - heat.min()) < 1e-6:
            raise SkipTest("its map is constant")
        cells = result.maps[0].double()
        if int((cells > cells.max() - 1e-4 * (cells.max() - cells.min())).sum()) > 1:
            raise SkipTest("its map has the largest value at several positions")
        rows, columns = (heat == heat.max()).nonzero().double().mean(0).tolist()
        assert max(abs(rows - y), abs(columns - x)) <= 2, (
            f"the heat of a dot at {(y, x)}, where a unit of the last layer is centered, is largest at "
            f"({rows:g}, {columns:g})"
        )


def _sizes_on(method: AnyMethod, model: Model) -> tuple[int, ...] | None:
    """The size of the maps on a model; None where the method refuses it."""
    result = result_of(method, Case(count=1, size=_STRIDED_SIZE, target=0), model)
    return None if result is None else tuple(result.maps.shape[1:])


def _strided_model(layers: int = 4) -> Model:
    """Convolutions with stride 2 and padding 1: unit i of the last of four is centered at 16 i, and not at
    16 i + 7.5.
    """
    parts: list[nn.Module] = []
    for channels in (3, 4, 4, 4)[:layers]:
        layer = nn.Conv2d(channels, 4, 3, stride=2, padding=1, bias=False)
        nn.init.constant_(layer.weight, 0.05)
        with torch.no_grad():
            layer.weight[:, :, 1, 1] = 1
        parts += [layer, nn.ReLU()]
    head = nn.Linear(4, 2)
    nn.init.constant_(head.weight, 1)
    network = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    return load_model(network, input_size=(3, *_STRIDED_SIZE))


def _sample_parameters(method: AnyMethod) -> list[str]:
    """Parameters for a number of random samples whose bounds allow the numbers that are compared."""
    names = []
    for name, schema in properties_of(method.spec.params_schema).items():
        low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
        high = schema.get("maximum", schema.get("exclusiveMaximum", _MANY + 1) - 1)
        counted = any(name == word or name.endswith(f"_{word}") for word in _SAMPLE_WORDS)
        if counted and schema.get("type") == "integer" and low <= _FEW and high >= _MANY:
            names.append(name)
    return names


def _averages_no_samples(method: AnyMethod) -> str | None:
    if (reason := maps_images_of_a_model(method)) is not None:
        return reason
    if method.seed is None or not _sample_parameters(method):
        return "it has no seed or no number of samples"
    return None


@register_check(
    "method",
    "The maps of different seeds differ less when there are more samples.",
    "the mean over the samples: sum all of them, and draw each of them anew",
    _averages_no_samples,
    exemptible=True,
)
def samples_reduce_the_noise(method: AnyMethod) -> None:
    for name in _sample_parameters(method):
        few, many = (_spread(method, {name: count}) for count in (_FEW, _MANY))
        if few is None or many is None or few < 1e-6:
            continue
        assert many <= _LARGEST_RATIO * few, (
            f"with {name}={_FEW} the maps of five seeds have a standard deviation of {few:.3g} of their "
            f"norm, with {name}={_MANY} of {many:.3g}: a mean of independent samples has {few / 4:.3g}"
        )


def _spread(method: AnyMethod, params: dict[str, Any]) -> float | None:
    """The standard deviation over five seeds of maps of unit norm; None where the method refuses the case."""
    case, maps = Case(pictures="noise", count=1), []
    for seed in range(5):
        result = result_of(method, replace(case, params=params | {str(method.seed): seed}))
        if result is None:
            return None
        rows = result.maps.double().flatten(1)
        maps.append(rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12))
    return float(torch.stack(maps).std(0).norm())


@register_check(
    "method",
    "The size of a map does not grow with the number of samples: it is their mean.",
    "divide the sum over the samples by their number",
    lambda method: (
        _averages_no_samples(method)
        or ("its text calls the map a sum" if re.search(r"\bsums?\b(?! over)", prose_of(method)) else None)
    ),
    exemptible=True,
)
def samples_are_averaged(method: AnyMethod) -> None:
    for name in _sample_parameters(method):
        case = Case(pictures="noise", count=1)
        runs = [result_of(method, replace(case, params={name: count})) for count in (_FEW, _MANY)]
        if None in runs:
            continue
        few, many = (float(run.maps.double().norm()) for run in runs)
        assert many <= 0.5 * few * _MANY / _FEW, (
            f"with {name}={_MANY} the norm of the map is {many / few:.1f} times that with {name}={_FEW}"
        )


#: Words for pixels at the border that no window covers.
_UNCOVERED = (
    r"\bno window|not covered|uncovered|outside (of )?(all|every|the) windows?|windows? that fits? (in|whol)"
)


def _covered_sizes(method: AnyMethod) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Two sizes of tall and two of wide images, all of whose pixels have to be covered.

    Where the text says that windows cover only what they fit into, those are sizes that they fit exactly.
    """
    if not re.search(_UNCOVERED, " ".join(text_of(method).split())):
        return ((27, 21), (35, 22)), ((21, 27), (22, 35))
    params = method.validate(Case().arguments(method))
    window, stride = (
        next((v for n, v in params.items() if re.search(words, n) and isinstance(v, int)), 0)
        for words in (r"window|patch|kernel|side", r"stride|step")
    )
    if not 0 < window <= 64 or not 0 < stride <= 32:
        raise SkipTest("its text names pixels that no window covers")
    first, second, third = (window + n * stride for n in (1, 2, 3))
    return ((second, first), (third, first)), ((first, second), (first, third))


@register_check(
    "method",
    "A map with a value for each pixel has values up to the last row and the last column.",
    "loops over windows that end before the border, or run over one side for both",
    maps_images_of_a_model,
    exemptible=True,
    requires=MAP_PER_PIXEL,
)
def covers_the_image(method: AnyMethod) -> None:
    for sizes in _covered_sizes(method):
        empty: dict[str, list[bool]] = {"row": [], "column": []}
        for size in sizes:
            for network in ("functional", "gap"):  # patches may leave the last rows out
                case = Case(network, "noise", size=size, target=0 if method.spec.input("target") else None)
                result = result_of(method, case)
                if result is not None and result.maps.shape[1:] == size:
                    inside = bool(result.maps[:, : size[0] // 2, : size[1] // 2].any())
                    empty["row"].append(inside and not result.maps[:, -1].any())
                    empty["column"].append(inside and not result.maps[:, :, -1].any())
                    break
        for side, zeros in empty.items():
            assert len(zeros) < 2 or not all(zeros), (
                f"the last {side} of the map is zero for images of {sizes[0]} and of {sizes[1]} pixels"
            )


@register_check(
    "method",
    "A number for each image is the same for the transposed images, on a symmetric network.",
    "sums, sorts and means over the rows instead of all pixels",
    lambda method: (
        "it takes no images of a model"
        if not (method.spec.input("model") and method.spec.input("images"))
        else "it declares that its images depend on each other"
        if not method.spec.batch_independent
        else "an attack may end in another point where gradients are rounded"
        if issubclass(method.result, AdversarialExamples)
        else None
    ),
    exemptible=True,
)
def numbers_are_the_same_for_transposed_images(method: AnyMethod) -> None:
    for network in ("transpose-gap", "transpose-flat", "transpose-tokens"):
        try:
            calls = RelationCalls.start(method, network, Case().arguments(method))
            if calls.is_random:
                raise SkipTest("it draws random numbers")
            transposed = calls(inputs=calls.transformed(lambda tensor: tensor.mT.contiguous()))
        except PhospheneError:
            continue
        count = len(calls.setting.images)
        for name, value in calls.result.fields():
            if not isinstance(value, Tensor) or value.shape != (count,) or not value.is_floating_point():
                continue
            other, scale = getattr(transposed, name), float(value.abs().max().clamp(min=1e-6))
            difference = float((other - value).abs().max()) / scale
            assert difference < 2e-4, (
                f"{name} of the transposed images differs by {difference:.1%}\n"
                f"on relation_network({network!r})"
            )
        return
