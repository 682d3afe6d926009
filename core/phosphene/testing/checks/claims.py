"""Checks of what a method's text claims: signs, scores, layers, components, minimal and universal changes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.datasets import TensorDataset
from ...errors import PhospheneError
from ...results import AdversarialExamples, Embedding, FilterBank, Synthesis
from ...spec.invariants import Nonnegative
from ..candidates import larger_parameters
from ..cases import Case, properties_of
from ..linear_model import linear_model
from ..networks import redraw_weights
from ..observation import tensors_in
from ..symmetric_networks import relation_network
from .attacks import _attack, _radius, logits_of
from .base import register_check, result_of
from .relations import RelationCalls, maps_images_of_a_model, prose_of, text_of
from .work import accepted_case

if TYPE_CHECKING:
    from ...models import Model
    from .base import AnyMethod


def title_of(method: AnyMethod) -> str:
    """A method's name, title and summary in lower case: what it is, without how it is computed."""
    spec = method.spec
    return " ".join((spec.name.replace("_", " "), spec.title, spec.summary)).lower()


def _claims(pattern: str, text: str, *, but_not: str = r"(?!)") -> bool:
    return re.search(pattern, text) is not None and re.search(but_not, text) is None


# --- maps --------------------------------------------------------------------------------------------

#: Words for a map without negative values, and words for one that has some.
_NONNEGATIVE = (
    r"\b(m|l|map|maps|cam) ?= ?relu ?\(|\brelu of (the|its|this) (map|weighted|sum)|rectified|non-?negative"
    r"|absolute|magnitude|\|d\w*/d\w*\||\bm\w* ?= ?(max|sum|mean)?_?\w* ?\|"
)
_SIGNED = (
    r"\bsigned?\b|negative (value|evidence|part|contribution)|non-?negative (matrix|factor|weights)|against"
)


@register_check(
    "method",
    "A map that its text calls rectified, absolute or non-negative has no negative values.",
    "the ReLU or the absolute value at the end; declare Nonnegative",
    lambda method: (
        maps_images_of_a_model(method)
        or (
            "it declares that its maps are not negative"
            if any(isinstance(i, Nonnegative) and i.field == "maps" for i in method.spec.invariants)
            else None
            if _claims(_NONNEGATIVE, prose_of(method), but_not=_SIGNED)
            else "its text does not claim it"
        )
    ),
    exemptible=True,
)
def nonnegative_as_documented(method: AnyMethod) -> None:
    for network in ("gap", "flat"):
        if (calls := _calls(method, network)) is None:
            continue
        for target in (0, 1, 2):
            inputs = {i.name: target for i in method.spec.inputs if i.role == "target"}
            maps = calls(inputs=inputs).maps
            least, largest = float(maps.min()), float(maps.abs().max())
            assert least >= -1e-6 * largest, f"the least value is {least:.3g}, the largest {largest:.3g}"


def _calls(method: AnyMethod, network: str) -> RelationCalls | None:
    try:
        return RelationCalls.start(method, network, Case().arguments(method))
    except PhospheneError:
        return None


#: Words for a score that depends on the logits of other classes.
_OTHER_SCORES = (
    r"probab|softmax|confidence|cross-?entropy|log-?likelihood|\bloss\b|contrast|margin|difference"
)


@register_check(
    "method",
    "A map of the logit, as its text calls the score, does not depend on the logits of other classes.",
    "the score: scores(model, images, target) is the logit, a softmax also reads the other classes",
    lambda method: (
        maps_images_of_a_model(method)
        or (
            None
            if _claims(r"\blogits?\b", prose_of(method), but_not=_OTHER_SCORES)
            and method.spec.input("target")
            else "its text names no logit as its score"
        )
    ),
    exemptible=True,
)
def explains_the_logit_as_documented(method: AnyMethod) -> None:
    compared = 0
    for network in ("gap", "flat"):
        if (calls := _calls(method, network)) is None:
            continue
        compared += 1
        target = calls.setting.target
        assert target is not None
        again = calls(model=_with_other_logits(relation_network(network).model, target)).maps
        difference = float((again - calls.result.maps).norm() / calls.result.maps.norm().clamp(min=1e-12))
        assert difference < 1e-3, (
            f"with larger logits of the other classes the map of class {target} changes by {difference:.1%}\n"
            f"on relation_network({network!r})"
        )
    if not compared:
        raise SkipTest("it refused the networks gap and flat")


def _with_other_logits(model: Model, target: int) -> Model:
    """A model whose logits of all classes but one were made larger."""
    head = [part for part in model.module.modules() if isinstance(part, nn.Linear)][-1]
    with torch.no_grad():
        shift = torch.linspace(0.5, 2.0, head.out_features).to(head.bias)
        shift[target] = 0
        head.bias.add_(shift)
    return model


@register_check(
    "method",
    "An image that maximizes a logit, as its text says, does not depend on the logits of other classes.",
    "the objective: scores(model, images, target) is the logit, a softmax also reads the other classes",
    lambda method: (
        None
        if issubclass(method.result, Synthesis)
        and method.spec.input("model")
        and method.spec.input("target")
        and _claims(r"\blogits?\b", prose_of(method), but_not=_OTHER_SCORES)
        else "its text names no logit that it maximizes"
    ),
    exemptible=True,
)
def maximizes_the_logit_as_documented(method: AnyMethod) -> None:
    case = Case("gap", "noise", count=1, target=1)
    first = result_of(method, case)
    second = result_of(method, case, _with_other_logits(case.model(), 1))
    if first is None or second is None:
        raise SkipTest("it refused the network gap")
    difference = float((first.images - second.images).abs().max())
    assert difference < 1e-3, (
        f"with larger logits of the other classes the image for class 1 of 'gap' changes by up to "
        f"{difference:.3g}"
    )


#: Words for a map that is no linear function of the gradient's scale.
_POWERS = (
    r"squar|power|product|energy|\bnorm|log|softmax|probab|guided.*cam|entropy|exponent|sharpen|variance"
)


@register_check(
    "method",
    "A map grows as the gradient does, or as a power of it that its text names.",
    "an absolute value is not a square",
    lambda method: (
        maps_images_of_a_model(method)
        or (
            None
            if _claims(r"gradient", prose_of(method), but_not=_POWERS)
            else "its text names no gradient, or a power of it"
        )
    ),
    exemptible=True,
)
def grows_with_the_gradient(method: AnyMethod) -> None:
    for network in ("gap", "flat"):
        if (calls := _calls(method, network)) is None:
            continue
        scaled = calls(model=calls.rescaled(scale=1.5)).maps.double()
        maps = calls.result.maps.double()
        size = float(maps.norm())
        if size == 0 or float((scaled / scaled.norm() - maps / size).norm()) > 1e-3:
            continue  # the map is another one
        power = math.log(float(scaled.norm()) / size, 1.5)
        assert abs(power) < 0.05 or abs(power - 1) < 0.05, (
            f"with logits times 1.5 the map is 1.5^{power:.2f} times as large, a gradient 1.5 times"
            f"\non relation_network({network!r})"
        )


@register_check(
    "method",
    "The relevance of all pixels sums to the score of a network without biases.",
    "what every layer passes on: a rule distributes all the relevance of a unit over its inputs",
    lambda method: (
        maps_images_of_a_model(method)
        or (
            None
            if _claims(r"\blrp\b|relevance propagation|propagates? (the )?relevance", prose_of(method))
            else "it propagates no relevance"
        )
    ),
    exemptible=True,
)
def conserves_relevance(method: AnyMethod) -> None:
    if (calls := _calls(method, "homogeneous")) is None:
        raise SkipTest("it refused the network homogeneous")
    scores = calls.scores(calls.inputs["images"])
    ratios = calls.result.maps.double().flatten(1).sum(1) / scores
    worst = float(ratios[(ratios - 1).abs().argmax()])
    assert abs(worst - 1) < 0.02, (
        f"the map sums to {worst:.3f} times the score\non relation_network('homogeneous'), without biases"
    )


@register_check(
    "method",
    "A map that its text calls a mean of scores is the score where the image does not matter.",
    "divide by the sum of the weights at each pixel",
    lambda method: (
        maps_images_of_a_model(method)
        or (
            None
            if _claims(r"(mean|average|expected) (of the )?(scores?|logit|probability)", prose_of(method))
            else "its text names no mean of scores"
        )
    ),
    exemptible=True,
)
def means_of_a_constant_score_are_constant(method: AnyMethod) -> None:
    model = linear_model(torch.zeros(3, 3, 8, 8), bias=torch.tensor([1.0, 0.5, 0.2]))
    if (result := result_of(method, Case(size=(8, 8)), model)) is None:
        raise SkipTest("it refused a network that ignores its image")
    maps = result.maps.double()
    spread, size = float(maps.std()), float(maps.abs().max())
    assert spread <= 1e-3 * size, (
        f"the map of a network that ignores its image has values from {float(maps.min()):.3g} to {size:.3g}"
    )


# --- ranges ------------------------------------------------------------------------------------------

#: A field and the range that the text says its values lie in: "``maps`` (N, h, w), in [-1, 1]".
_RANGE = re.compile(
    r"``(\w+)``((?: and ``\w+``|, ``\w+``)*) ?(?:\([^)`]*\))?[^.;:`\[\]]*? in \[(-?[\d.]+), ?(-?[\d.]+)\]"
)


def _documented_ranges(method: AnyMethod) -> dict[str, tuple[float, float]]:
    """The range of each field of the result by the description's text."""
    returned = method.spec.description.partition("Returns:")[2].partition("\n\n")[0]
    ranges = {}
    for first, others, low, high in _RANGE.findall(" ".join(returned.split())):
        for name in (first, *re.findall(r"``(\w+)``", others)):
            if name in method.result.__dataclass_fields__:
                ranges[name] = (float(low), float(high))
    return ranges


@register_check(
    "method",
    "Values lie in the range that the text states for their field.",
    "a norm or a number of terms that is not divided by; or the text",
    lambda method: None if _documented_ranges(method) else "its text states no range of a field",
    exemptible=True,
)
def values_lie_in_the_documented_range(method: AnyMethod) -> None:
    for case in (Case(pictures="noise"), Case("functional"), Case("shapes-vgg"), Case("heads")):
        if (result := result_of(method, case)) is None:
            continue
        for name, (low, high) in _documented_ranges(method).items():
            values = getattr(result, name)
            if not isinstance(values, Tensor) or values.dtype == torch.uint8 or not values.numel():
                continue
            least, largest = float(values.min()), float(values.max())
            rounding = 1e-5 * (high - low)
            assert low - rounding <= least and largest <= high + rounding, (
                f"{name} has values from {least:.4g} to {largest:.4g} on {case.network!r}, and its text says "
                f"from {low:g} to {high:g}"
            )


@register_check(
    "method",
    "An area under a score, or its mean, is the score of a network that ignores its image.",
    "the number of intervals or points that a sum is divided by",
    lambda method: (
        None
        if method.spec.family == "scores"
        and _claims(r"\barea|integral|mean (of the )?(scores?|logit|probabilit)", prose_of(method))
        and {"model", "images", "target"} <= {declared.role for declared in method.spec.inputs}
        else "its text names no area under the score of a target"
    ),
    exemptible=True,
)
def areas_of_a_constant_score_are_that_score(method: AnyMethod) -> None:
    logits = torch.tensor([1.0, 0.6, 0.25])
    model = linear_model(torch.zeros(3, 3, 8, 8), bias=logits.tolist())
    if (result := result_of(method, Case(size=(8, 8), target=1), model)) is None:
        raise SkipTest("it refused a network that ignores its image")
    values = {n: v for n, v in result.fields() if isinstance(v, Tensor) and v.is_floating_point()}
    scores = {n: float(v.double().mean()) for n, v in values.items() if v.ndim <= 1}
    # As part of the score of the image, or after the least value is subtracted, it is 1 or 0.
    allowed = (float(logits[1]), float(logits.softmax(0)[1]), 0.0, 1.0)
    assert not scores or any(abs(v - a) < 1e-3 for v in scores.values() for a in allowed), (
        f"the score of every image is {allowed[0]:g} (probability {allowed[1]:.3f}), the result has "
        f"{', '.join(f'{name} = {value:.3f}' for name, value in scores.items())}"
    )


# --- layers ------------------------------------------------------------------------------------------


#: The last layer as a method's text names it.
_LAST_LAYER = r"\blast (spatial |convolutional )*(feature )?(layer|map|convolution|stage)\b"
_NOT_LAST = r"(second|next|third)[- ](to[- ])?(the )?last|last but|before (the )?last"


def _default_is_last(method: AnyMethod) -> list[str]:
    """The parameters for a layer whose default is, by its description or the method's, the last one."""
    names = []
    for name in method.layers:
        field = method.spec.params.model_fields[name]
        own = (field.description or "").lower()
        claimed = _claims(r"\blast\b", own) or (
            "default" not in own and _claims(_LAST_LAYER, text_of(method))
        )
        if field.default is None and claimed and not _claims(_NOT_LAST, own):
            names.append(name)
    return names


@register_check(
    "method",
    "The layer that is read without a name is the last one, as its text says.",
    "the default layer: an index into the layers that is one too small",
    lambda method: None if _default_is_last(method) else "its text names no last layer as the default",
    exemptible=True,
)
def reads_the_last_layer_as_documented(method: AnyMethod) -> None:
    for name in _default_is_last(method):
        case = Case("identities", "noise")
        if (usual := result_of(method, case)) is None:
            continue
        same = []
        for layer in ("conv1", "relu1", "conv2", "relu2"):
            for value in (layer, [layer]):
                named = result_of(method, replace(case, params={name: value}))
                if named is not None and _same_tensors(usual, named):
                    same.append(layer)
        assert not same or {"conv2", "relu2"} & {*same}, (
            f"without {name}= the result is that of {same[-1]!r}, which is not the last layer"
        )


def _same_tensors(first: Any, second: Any) -> bool:
    one, other = ([t for _, t in tensors_in(r)] for r in (first, second))
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )


@register_check(
    "method",
    "What its text calls the first layer is the first: the weights of others change nothing.",
    "the first of the model's convolutions, not the last",
    lambda method: (
        None
        if _claims(r"\bfirst[- ](layer|convolution)", prose_of(method))
        and not method.layers
        and [declared.role for declared in method.spec.inputs] == ["model"]
        else "its text names no first layer of a model alone"
    ),
    exemptible=True,
)
def reads_the_first_layer_as_documented(method: AnyMethod) -> None:
    for network in ("gap", "functional", "shapes-vgg"):
        case = Case(network)
        model = case.model()
        first = next((part for part in model.module.modules() if isinstance(part, nn.Conv2d)), None)
        if first is None or (usual := result_of(method, case)) is None:
            continue
        weight = first.weight.detach().clone()
        redraw_weights(model.module, 1)
        with torch.no_grad():
            first.weight.copy_(weight)
        changed = result_of(method, case, model)
        assert changed is None or _same_tensors(usual, changed), (
            f"the result changes with other weights than those of the first convolution, of {network!r}"
        )


@register_check(
    "method",
    "Filters that are each scaled by their own values, as the text says, have all values from 0 to 1.",
    "the axes of the minimum and maximum: all but that of the filters",
    lambda method: (
        None
        if issubclass(method.result, FilterBank) and _claims(r"\beach\b[^.]*\bown\b", prose_of(method))
        else "its text does not call each filter scaled by itself"
    ),
    exemptible=True,
)
def filters_are_scaled_as_documented(method: AnyMethod) -> None:
    for network in ("gap", "functional", "shapes-vgg"):
        if (result := result_of(method, Case(network))) is None:
            continue
        low = float(result.tiles.flatten(1).amin(1).max())
        high = float(result.tiles.flatten(1).amax(1).min())
        assert low < 0.01 and high > 0.99, (
            f"a filter of {network!r} has values from {low:.2f}, one up to {high:.2f}"
        )


@register_check(
    "method",
    "Each tile of a filter bank with as many weights shows the weights of its own number.",
    "tiles, weights and captions in one order",
    lambda method: None if issubclass(method.result, FilterBank) else "its result is no filter bank",
    exemptible=True,
)
def tiles_are_in_the_order_of_the_weights(method: AnyMethod) -> None:
    for network in ("gap", "functional", "shapes-vgg"):
        if (result := result_of(method, Case(network))) is None or len(result.tiles) != len(result.weights):
            continue
        # A filter as an image of its channels, or gray, up to a scale and an offset.
        tiles, weights = result.tiles.double(), result.weights.double()
        images = [weights, weights.mean(1, keepdim=True).expand(-1, 3, -1, -1)]
        agreements = [_correlations(tiles, image) for image in images if image.shape == tiles.shape]
        if not agreements:
            continue
        agreement = max(agreements, key=lambda c: float(c.amax(1).mean()))
        if float(agreement.amax(1).mean()) < 0.99:
            continue  # tiles show something else than the weights
        wrong = (agreement.diagonal() < agreement.amax(1) - 1e-3).nonzero().flatten().tolist()
        assert not wrong, f"tile {wrong[0]} of {network!r} shows filter {int(agreement[wrong[0]].argmax())}"


@register_check(
    "method",
    "The tile whose caption has the number of a filter is the one that changes with that filter's weights.",
    "captions of sorted filters: the number in the layer, not in the figure; fftshift over the last two axes",
    lambda method: (
        "its result is no filter bank"
        if not issubclass(method.result, FilterBank)
        else None
        if [i.role for i in method.spec.inputs] == ["model"]
        else "it reads more than a model"
    ),
    exemptible=True,
)
def captions_have_the_numbers_of_their_filters(method: AnyMethod) -> None:
    for case in map(Case, ("gap", "functional", "shapes-vgg")):
        if (before := result_of(method, case)) is not None:
            break
    else:
        raise SkipTest("it refused the networks")
    tiles = _numbered_tiles(before)
    if len(tiles) < len(before.captions):
        raise SkipTest("its captions are not each a number of their own")
    compared = 0
    for chosen in sorted(tiles)[:4]:
        model = case.model()
        layer = model.layers[before.layer]
        if not isinstance(layer, nn.Conv2d) or chosen >= len(layer.weight):
            raise SkipTest(f"the layer {before.layer!r} is no convolution of that many filters")
        with torch.no_grad():  # the same weights at other positions: their norm is unchanged
            order = torch.randperm(layer.weight[0].numel(), generator=torch.Generator().manual_seed(chosen))
            layer.weight[chosen] = layer.weight[chosen].flatten()[order].view_as(layer.weight[chosen])
        after = result_of(method, case, model)
        if after is None or after.tiles.shape != before.tiles.shape:
            continue
        numbered = _numbered_tiles(after)
        changes = {n: float((numbered[n] - t).abs().max()) for n, t in tiles.items() if n in numbered}
        largest = max(changes, key=lambda n: changes[n])
        # Tiles that are scaled together all change a little.
        if changes[largest] < 1e-3 or sorted(changes.values())[-2] > 0.5 * changes[largest]:
            continue
        compared += 1
        assert largest == chosen, (
            f"other weights of filter {chosen} of {before.layer!r} change the tile with the caption "
            f"{next(c for c in after.captions if _number(c) == largest)!r}"
        )
    if not compared:
        raise SkipTest("no filter changes one tile only")


def _numbered_tiles(result: FilterBank) -> dict[int, Tensor]:
    """The tiles by the first whole number in their captions."""
    numbers = [_number(caption) for caption in result.captions]
    return {n: tile for n, tile in zip(numbers, result.tiles, strict=True) if n is not None}


def _number(caption: str) -> int | None:
    match = re.search(r"\d+", caption)
    return int(match[0]) if match else None


def _correlations(first: Tensor, second: Tensor) -> Tensor:
    """Absolute correlation (N, M) of each of N tensors with each of M."""
    one, other = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (first, second))
    one, other = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) for x in (one, other))
    return (one @ other.T).abs()


# --- features ----------------------------------------------------------------------------------------


@register_check(
    "method",
    "Principal components are centered and uncorrelated, the first with the largest variance.",
    "subtract the mean of the features before their decomposition",
    lambda method: (
        None
        if issubclass(method.result, Embedding) and _claims(r"principal|\bpca\b", title_of(method))
        else "it computes no principal components"
    ),
    exemptible=True,
)
def principal_components(method: AnyMethod) -> None:
    case = accepted_case(method, Case(pictures="noise", dataset=9, double=True))
    result = None if case is None else result_of(method, case)
    if result is None or result.points is None:
        raise SkipTest("it returned no points")
    points = result.points.double()
    spread = points.std(0, correction=0).clamp(min=1e-12)
    assert float((points.mean(0).abs() / spread).max()) < 1e-3, (
        f"the mean of the points is {points.mean(0).tolist()}, not 0"
    )
    correlation = (points.T @ points / len(points) / spread[:, None] / spread).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 1e-3, "the coordinates are correlated"
    assert (spread.diff() <= 1e-6 * spread[0]).all(), f"the variances do not fall: {spread.square().tolist()}"


@register_check(
    "method",
    "No coordinate is the same for all images, for the least value of each count either.",
    "a neighbor or a rank that is the image itself",
    lambda method: None if issubclass(method.result, Embedding) else "it returns no coordinates",
    exemptible=True,
)
def coordinates_differ(method: AnyMethod) -> None:
    case = accepted_case(method, Case(pictures="noise", dataset=9))
    if case is None:
        return
    counts = {
        name: schema["minimum"]
        for name, schema in properties_of(method.spec.params_schema).items()
        if schema.get("type") == "integer" and "minimum" in schema and name != method.seed
    }
    for params in ({}, *({name: value} for name, value in counts.items())):
        result = result_of(method, replace(case, params=params))
        if result is None or result.points is None or not len(result.points):
            continue
        constant = (result.points == result.points[0]).all(0).nonzero().flatten().tolist()
        assert not constant, (
            f"coordinate {constant[0]} is {float(result.points[0, constant[0]]):.3g} for all images"
            f"{f', with {params}' if params else ''}"
        )


@register_check(
    "method",
    "Distances grow as the features do, or as a power of them that the text names.",
    "a Euclidean distance is the root of a sum of squares",
    lambda method: (
        None
        if issubclass(method.result, Embedding)
        and _claims(r"euclidean|\bdistances?\b", prose_of(method), but_not=r"squar|power|normali[sz]|cosine")
        else "its text names no distances"
    ),
    exemptible=True,
)
def grows_with_the_features(method: AnyMethod) -> None:
    if (calls := _calls(method, "homogeneous")) is None or calls.result.points is None:
        raise SkipTest("it refused the network homogeneous, or returned no points")
    # The network has no biases and does not normalize: its features are twice as large.
    points = calls.result.points.double()
    twice = calls(inputs=calls.transformed(lambda images: images / 2)).points.double() * 2
    for column, (one, other) in enumerate(zip(points.T, twice.T, strict=True)):
        size, half = float(one.norm()), float(other.norm()) / 2
        if min(size, half) == 0 or float((one / size - other / half / 2).norm()) > 1e-3:
            continue  # another function of the features
        power = math.log2(size / half)
        assert abs(power) < 0.05 or abs(power - 1) < 0.05, (
            f"coordinate {column} is 2^{power:.2f} times as large for images that are twice as bright, on a "
            "network without biases"
        )


@register_check(
    "method",
    "A method that its text calls unsupervised reads no labels of the data set.",
    "means over the images of a label",
    lambda method: (
        "it takes no data set"
        if not any(declared.role == "dataset" for declared in method.spec.inputs)
        else None
        if _claims(
            r"without (using )?(the |any )?labels|unsupervised",
            prose_of(method),
        )
        else "its text does not call it unsupervised"
    ),
    exemptible=True,
)
def labels_are_not_read(method: AnyMethod) -> None:
    case = accepted_case(method, Case(pictures="noise", dataset=9))
    if case is None:
        return
    model = case.model()
    inputs = case.inputs(method, model)
    names = [name for name, value in inputs.items() if isinstance(value, TensorDataset)]
    runs = []
    for count in (2, 3):
        classes = {n: [str(i % count) for i in range(len(inputs[n]))] for n in names}
        changed = {n: replace(inputs[n], classes=classes[n]) for n in names}
        try:
            runs.append(method(**(inputs | changed | case.arguments(method))))
        except PhospheneError:
            return
    assert _same_tensors(*runs), "the result changes with the labels of the data set"


# --- attacks -----------------------------------------------------------------------------------------

_MINIMAL = r"\bminim(al|um|ises|izes|ally)\b|smallest|\bnearest\b|\bclosest\b|least (change|distort)"
#: The largest ratio to the least distance of a linear classifier; an overshoot is a few percent.
_NEAR_MINIMAL = 1.5


@register_check(
    "method",
    "A perturbation that its text calls minimal is the least one of a linear classifier, up to a half.",
    "the class whose boundary is nearest, the dual norm in the step, the last step back to the boundary",
    lambda method: (
        "it is no attack"
        if not issubclass(method.result, AdversarialExamples)
        else "it has a radius"
        if _radius(method)
        else None
        if _claims(_MINIMAL, title_of(method))
        else "its text claims no minimal change"
    ),
    exemptible=True,
)
def smallest_perturbation(method: AnyMethod) -> None:
    case = Case("gap", count=6)
    params = case.arguments(method) | larger_parameters(method, case, limit=4000)
    model, weight = _linear_classifier()
    images = 0.5 + 0.02 * torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    logits = logits_of(model, images)
    labels = logits.argmax(1)
    inputs = case.inputs(method, model) | {"images": images, "labels": labels}
    inputs = {name: value for name, value in inputs.items() if method.spec.input(name)}
    try:
        result = method(**(inputs | params))
    except PhospheneError as refusal:
        raise SkipTest(f"it refused a linear classifier: {refusal}") from None
    fooled = logits_of(model, result.adversarial).argmax(1).ne(labels)
    if not fooled.any():
        return  # reported by the check "attack_succeeds"
    half = images + 0.5 * (result.adversarial - images)
    still = float(logits_of(model, half).argmax(1).ne(labels)[fooled].double().mean())
    assert still < 0.5, f"half of the perturbation fools the network as well, for {still:.0%} of the images"
    if "gradients" not in method.spec.needs:
        return
    gaps = logits.gather(1, labels[:, None]) - logits
    norms = {"l2": 2.0, "linf": 1.0, "l1": torch.inf}
    ratios = {}
    for name, dual in norms.items():
        slopes = (weight[labels][:, None] - weight).flatten(2).norm(dual, dim=2)
        least = torch.where(gaps > 0, gaps / slopes, torch.inf).amin(1)
        ratios[name] = float((result.distance(name) / least)[fooled].median())
    best = min(ratios, key=ratios.__getitem__)
    assert ratios[best] <= _NEAR_MINIMAL, (
        f"the perturbation is {ratios[best]:.2f} times the distance to the nearest other class of a linear "
        f"classifier, in {best}"
    )


def _linear_classifier() -> tuple[Model, Tensor]:
    """A linear classifier of five classes at different distances, and its weights (K, C, H, W)."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(5, 3, 8, 8, generator=generator, dtype=torch.float64) / 8
    bias = torch.tensor([0.0, 0.3, 0.8, 1.4, 2.0]) - 0.5 * weight.sum((1, 2, 3))
    return linear_model(weight, bias=bias), weight


@register_check(
    "method",
    "A perturbation that its text calls universal is the same for all images.",
    "the sum of the images' gradients: one perturbation, not one of each image",
    lambda method: (
        None
        if issubclass(method.result, AdversarialExamples)
        and _claims(r"universal|image-agnostic|\b(one|single|same|shared) perturbation", title_of(method))
        else "its text claims no universal perturbation"
    ),
    exemptible=True,
)
def universal_as_documented(method: AnyMethod) -> None:
    case = Case("fragile", "noise", count=3)
    model = case.model()
    name = next(i.name for i in method.spec.inputs if i.role == "images")
    images = 0.3 + 0.4 * case.inputs(method, model)[name]
    if (result := result_of(method, case, model, **{name: images})) is None:
        raise SkipTest("it refused the case")
    changes = result.adversarial - result.images
    inside = ((result.adversarial > 0) & (result.adversarial < 1)).all(0)
    spread = float((changes - changes[:1])[:, inside].abs().max()) if inside.any() else 0.0
    assert spread < 1e-4, f"the changes of a pixel differ by {spread:.3g} between the images"


# --- parameters ----------------------------------------------------------------------------------------


def _restarts(method: AnyMethod) -> str | None:
    """The parameter for the number of restarts, if an attack has one."""
    if not issubclass(method.result, AdversarialExamples) or method.seed is None:
        return None
    for name, schema in properties_of(method.spec.params_schema).items():
        low, high = schema.get("minimum", 1), schema.get("maximum", 9)
        if "restarts" in name and schema.get("type") == "integer" and low <= 1 and high >= _RESTARTS:
            return name
    return None


#: The number of restarts whose best is compared with single runs, and the number of these.
_RESTARTS, _SINGLE = 6, 8


@register_check(
    "method",
    "With more restarts the loss of the adversarial examples is larger: the best restart is returned.",
    "compare each restart with the best so far, image by image; draw each start anew",
    lambda method: None if _restarts(method) else "it has no seed or no number of restarts",
    exemptible=True,
)
def best_restart_is_returned(method: AnyMethod) -> None:
    name, case = str(_restarts(method)), Case("functional", "noise", count=10)
    schemas = properties_of(method.spec.params_schema)
    random = {n: True for n, schema in schemas.items() if "random" in n and schema.get("type") == "boolean"}
    # A radius at which nothing succeeds: a success may end an attack before all restarts.
    radius = _radius(method)
    small = {radius: schemas[radius].get("default", method.spec.quick.get(radius)) / 4} if radius else {}

    def losses(restarts: int, seed: int) -> Tensor | None:
        params = random | small | {name: restarts, str(method.seed): seed}
        if (run := _attack(method, replace(case, params=params))) is None:
            return None
        result, model = run
        logits = logits_of(model, result.adversarial).double()
        true = logits.gather(1, result.labels[:, None])[:, 0]
        margins = logits.scatter(1, result.labels[:, None], -torch.inf).amax(1) - true
        entropies = F.cross_entropy(logits, result.labels, reduction="none")
        return (-1 if result.targeted else 1) * torch.stack([entropies, margins]).cpu()

    one = [losses(1, seed) for seed in range(_SINGLE)]
    many = [losses(_RESTARTS, seed) for seed in range(_SINGLE)]
    if any(loss is None for loss in (*one, *many)):
        raise SkipTest("it refused the case")
    single, best = torch.stack(one), torch.stack(many)  # type: ignore[arg-type]
    spread = single.std(0)
    # Where a start alone succeeds, the attack may stop.
    open_ = (single[:, 1] < 0).all(0) & (best[:, 1] < 0).all(0)
    varying = (spread > 1e-6 * single.abs().mean(0)) & open_
    if varying[0].sum() < 3:
        raise SkipTest("a random start changes nothing, or each succeeds")
    gains = (best.mean(0) - single.mean(0)) / spread
    gain = max(float(gain[which].mean()) for gain, which in zip(gains, varying, strict=True))
    assert gain > 0.5, (
        f"the loss of {_RESTARTS} restarts is {gain:+.2f} standard deviations above that of one: that of the "
        "best of six is 1.27 above it"
    )
