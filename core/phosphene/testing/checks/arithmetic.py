"""Checks of what a result depends on: the named target, layer and parameters, the weights, the images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import PhospheneError
from ...results import Attribution, Result
from ...roles import ROLES
from ..candidates import candidate_values, larger_parameters
from ..cases import OPTIONAL_ROLES, Case, properties_of
from ..networks import redraw_weights
from ..observation import (
    Passes,
    assert_same_result,
    count_passes,
    rank_correlation,
    tensors_in,
)
from .attacks import logits_of
from .base import MAP_PER_PIXEL, register_check, result_of

if TYPE_CHECKING:
    from .base import AnyMethod

#: Maps of two networks or of two images with a larger rank correlation than this are equal in all but name.
SAME_MAP = 0.995
#: Names of parameters that only divide the work: they must not change a result.
WORK_ONLY = frozenset(
    ("batch_size", "chunk_size", "minibatch", "num_workers", "workers", "threads", "verbose", "progress")
)
#: Data sets that are tried before they count as ignored.
MOST_DATASETS = 6
#: Calls with other parameters that are tried before a parameter counts as ignored.
MOST_TRIALS = 80


def same_result(first: Result, second: Result) -> bool:
    """Whether two results are equal in all fields, bit for bit."""
    try:
        assert_same_result(first, second)
    except AssertionError:
        return False
    return True


def same_tensors(first: Result, second: Result) -> bool:
    """Whether two results have equal tensors; names in them may differ."""
    ones, others = dict(tensors_in(first)), dict(tensors_in(second))
    return ones.keys() == others.keys() and all(torch.equal(t, others[n]) for n, t in ones.items())


def is_attribution(method: AnyMethod) -> bool:
    return issubclass(method.result, Attribution)


# --- the target --------------------------------------------------------------------------------

#: Image sizes, and the corners of an 8x8 patch of each color: no reflection, rotation or transposition
#: maps a patch to its own position or to that of another.
LAYOUTS: tuple[tuple[tuple[int, int], tuple[tuple[int, int], ...]], ...] = (
    ((32, 32), ((0, 16), (22, 2), (18, 24))),
    ((32, 48), ((0, 40), (24, 6), (4, 20))),
    ((40, 24), ((32, 0), (2, 16), (18, 6))),
)
PATCH = 8


def colored_patches(size: tuple[int, int], corners: tuple[tuple[int, int], ...]) -> Tensor:
    """An image (3, H, W), dark but for a patch of each color: the network "colors" has a class for each."""
    image = torch.full((3, *size), 0.05)
    shades = 0.8 + 0.2 * torch.rand(PATCH, PATCH, generator=torch.Generator().manual_seed(1))
    for channel, (top, left) in enumerate(corners):
        image[channel, top : top + PATCH, left : left + PATCH] = shades
    return image


def _missed(
    maps: Sequence[Tensor], size: tuple[int, int], corners: tuple[tuple[int, int], ...], color: int
) -> str:
    """What is wrong with the map (h, w) of a color's class; empty where the patch has the largest mean."""
    enlarged = [F.interpolate(m[None, None].double(), size, mode="bilinear")[0, 0] for m in maps]
    heat = enlarged[color]
    spread = float(heat.std())
    if spread <= 1e-6 * float(heat.abs().max()):
        return ""  # constant: it names no region, and ``images_matter`` fails where all maps are constant
    patches = torch.zeros(3, *size, dtype=torch.bool)
    for patch, (top, left) in zip(patches, corners, strict=True):
        patch[top : top + PATCH, left : left + PATCH] = True
    means = [float(heat[patch].mean()) for patch in patches] + [float(heat[~patches.any(0)].mean())]
    names = ("the red patch", "the green patch", "the blue patch", "the background")
    coarse = any(cells * PATCH < side for cells, side in zip(maps[color].shape, size, strict=True))
    in_cells = F.interpolate(patches.double()[None], tuple(maps[color].shape), mode="area")[0] > 0
    if coarse and bool((in_cells.sum(0) > 1).any()):
        return ""  # two patches share a cell
    largest = max(range(4), key=lambda region: means[region])
    if largest != color:
        where, where_not = names[largest], names[color]
        return f"is largest on {where} ({means[largest]:.3g}), not on {where_not} ({means[color]:.3g})"
    if float((heat > 0.5 * heat.max()).sum()) > 2 * PATCH**2:
        return ""  # too coarse for a statement about pixels
    # The gradient of a loss is not 0 on the other patches: the mean map of the other classes is subtracted.
    contrast = heat - (torch.stack(enlarged).sum(0) - heat) / (len(enlarged) - 1)
    bright = (contrast > 0.5 * contrast.max()).double()
    top, left = corners[color]
    for axis, corner in ((0, top), (1, left)):
        center = float((bright.sum(1 - axis) * torch.arange(size[axis])).sum() / bright.sum())
        shift = center - (corner + (PATCH - 1) / 2)
        if abs(shift) > 2.5:
            return f"is {shift:+.1f} pixels off along the {('height', 'width')[axis]}"
    return ""


@register_check(
    "method",
    "The map of a class is largest on what the class depends on, at its position.",
    "the class, layer or axis that is read; signs; reshapes, flips and the enlargement of maps",
    lambda method: (
        None if is_attribution(method) and method.spec.input("target") else "it explains no target by a map"
    ),
    exemptible=True,
    requires=MAP_PER_PIXEL,
)
def explains_the_target(method: AnyMethod) -> None:
    if (failures := _localization_failures(method, {})) is None or not failures:
        return
    larger = larger_parameters(method, Case("colors"), limit=2500)
    if larger != method.spec.quick:
        failures = _localization_failures(method, larger) or []
    assert not failures, "; ".join(failures[:3])


def _localization_failures(method: AnyMethod, params: Mapping[str, Any]) -> list[str] | None:
    """A sentence for each class whose map misses its patch in most layouts; None if all are refused."""
    missed: dict[int, list[str]] = {0: [], 1: [], 2: []}
    answered = 0
    for number, (size, corners) in enumerate(LAYOUTS):
        image = colored_patches(size, corners)
        case = Case("colors", count=3, size=size, target=[0, 1, 2], params=params)
        model = case.model()
        model.input_size = (3, *size)
        if number == 0:  # one class for all images, in the other layouts one for each
            runs = [
                result_of(method, replace(case, count=1, target=k), model, images=image[None])
                for k in range(3)
            ]
            maps = None if None in runs else [run.maps[0].cpu() for run in runs]
        else:
            run = result_of(method, case, model, images=image.repeat(3, 1, 1, 1))
            maps = None if run is None else list(run.maps.cpu())
        if maps is None:
            continue
        answered += 1
        constant = [bool((color_map == color_map.flatten()[0]).all()) for color_map in maps]
        for color in range(3):
            if constant[color] and not all(constant):
                missed[color].append(
                    f"the map of class {color} of a {size[0]}x{size[1]} image is constant, others are not"
                )
            elif what := _missed(maps, size, corners, color):
                missed[color].append(f"the map of class {color} of a {size[0]}x{size[1]} image {what}")
    if not answered:
        return None
    return [faults[0] for faults in missed.values() if 2 * len(faults) > answered]


@register_check(
    "method",
    "Without a target, the class that is predicted for the image is explained.",
    "resolve the target on the images, before they are changed: target = target.resolve(model, images)",
    lambda method: (
        "it explains no target by a map"
        if not is_attribution(method) or not method.spec.input("images")
        else None
        if any(i.role == "target" and not i.required for i in method.spec.inputs)
        else "it needs a target"
    ),
    exemptible=True,
)
def explains_the_predicted_class(method: AnyMethod) -> None:
    for network in ("functional", "gap", "flat", "shapes-vgg"):
        case = Case(network, "noise", count=3)
        model = case.model()
        images = case.inputs(method, model)[str(getattr(method.spec.input("images"), "name", ""))]
        predicted = logits_of(model, images).argmax(1).tolist()
        without, named = result_of(method, case), result_of(method, replace(case, target=predicted))
        if without is not None and named is not None:
            assert _near_tensors(without, named), (
                f"without a target the maps are not those of target={predicted}, the predicted classes,\n"
                f"on the network {network!r}"
            )


# --- weights and images --------------------------------------------------------------------------


def _compare_maps(first: Attribution, second: Attribution) -> bool:
    """Whether the maps of two results are the same, by rank correlation; constant ones are the same."""
    if first.maps.shape != second.maps.shape:
        return False
    pairs = list(zip(first.maps, second.maps, strict=True))
    return all(rank_correlation(one, other) > SAME_MAP for one, other in pairs)


def _unchanged(method: AnyMethod, first: Any, second: Any) -> bool:
    return _compare_maps(first, second) if is_attribution(method) else same_result(first, second)


def _dependence_cases() -> Iterator[Case]:
    yield Case(pictures="noise")
    yield from (Case(network, "noise") for network in ("functional", "tokens", "relu6", "gelu", "multihead"))
    yield Case("shapes-vgg")
    # With few images of a class, a distance that their covariance scales is the same for all images.
    yield Case(pictures="noise", dataset=23)
    # Without a second model, one that is compared with itself may have the same result for all weights.
    yield Case(pictures="noise", optional=True)


@register_check(
    "method",
    "Other weights return another result.",
    "what is read from the model; a cache by name or id",
    lambda method: None if method.spec.input("model") else "it takes no model",
    exemptible=True,
)
def weights_matter(method: AnyMethod) -> None:
    compared = 0
    for case in _dependence_cases():
        if (first := result_of(method, case)) is None:
            continue
        for seed in (1, 2):
            model = case.model()
            redraw_weights(model.module, seed)
            second = result_of(method, case, model)
            if second is not None:
                compared += 1
                if not _unchanged(method, first, second):
                    return
    what = "the maps have the same order of pixels" if is_attribution(method) else "the result is the same"
    assert not compared, f"{what} after all weights were drawn again, in {compared} of {compared} comparisons"


@register_check(
    "method",
    "Other images return another result.",
    "what is computed from the images",
    lambda method: (
        None
        if any(ROLES[i.role].per_image and i.role == "images" or i.role in ("dataset", "texture")
               for i in method.spec.inputs if i.required)
        else "it takes no images"
    ),
    exemptible=True,
)  # fmt: skip
def images_matter(method: AnyMethod) -> None:
    compared = 0
    for case in _dependence_cases():
        first = result_of(method, case)
        for pictures in ("scenes", "binary"):
            if first is None or pictures == case.pictures:
                continue
            if (second := result_of(method, replace(case, pictures=pictures))) is None:
                continue
            compared += 1
            if is_attribution(method):
                if not _compare_maps(first, second):
                    return
            elif not same_result(_without_copies(first), _without_copies(second)):
                return
    what = "the maps have the same order of pixels" if is_attribution(method) else "the result is the same"
    assert not compared, f"{what} for other images, in {compared} of {compared} comparisons"


def _reads_images_and_a_dataset(method: AnyMethod) -> str | None:
    roles = {declared.role for declared in method.spec.inputs if declared.required}
    return None if {"images", "dataset"} <= roles else "it does not take images and a data set"


@register_check(
    "method",
    "Another data set returns another result for the same images.",
    "what is computed from the data set; a cache by layer, name or size",
    _reads_images_and_a_dataset,
    exemptible=True,
)
def dataset_matters(method: AnyMethod) -> None:
    names = [declared.name for declared in method.spec.inputs if declared.role == "dataset"]
    compared = 0
    for case in _dependence_cases():
        model = case.model()
        if (first := result_of(method, case, model)) is None:
            continue
        for pictures in ("scenes", "binary", "noise"):
            if pictures == case.pictures:
                continue
            others = replace(case, pictures=pictures).inputs(method, model)
            changed = {name: others[name] for name in names if others[name] is not None}
            if (second := result_of(method, case, model, **changed)) is None:
                continue
            compared += 1
            if not same_result(_without_copies(first), _without_copies(second)):
                return
        if compared >= MOST_DATASETS:
            break
    assert not compared, (
        f"the result is the same for another data set, in {compared} of {compared} comparisons"
    )


def _without_copies(result: Any) -> Any:
    """A result without the fields that repeat an input."""
    inputs = [value for value in result.inputs.values() if isinstance(value, Tensor)]
    copies = {
        name: None
        for name, value in result.fields()
        if isinstance(value, Tensor) and any(value.shape == i.shape and torch.equal(value, i) for i in inputs)
    }
    remaining = [(name, value) for name, value in result.fields() if name not in copies]
    return dict(remaining)


@register_check(
    "method",
    "After a change of the weights or of the images in place, results are computed anew.",
    "caches by id, name or shape",
)
def results_are_not_stale(method: AnyMethod) -> None:
    for case in _dependence_cases():
        model = case.model()
        inputs = case.inputs(method, model)
        params = case.arguments(method)
        try:
            method(**inputs, **params)
        except PhospheneError:
            continue
        redraw_weights(model.module, 1)
        fresh_model = case.model()
        redraw_weights(fresh_model.module, 1)
        images = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
        for tensor in images.values():
            tensor.copy_(tensor.flip(-1))
        fresh_inputs = {n: v.clone() if n in images else v for n, v in inputs.items()}
        owner = method.spec.input("model")
        if owner is not None:
            fresh_inputs[owner.name] = fresh_model
        try:
            again, fresh = method(**inputs, **params), method(**fresh_inputs, **params)
        except PhospheneError:
            continue
        assert_same_result(again, fresh)
        return


# --- layers ------------------------------------------------------------------------------------


def _as_layer(schema: Mapping[str, Any], name: str) -> list[Any]:
    """The forms in which a parameter of this schema names one layer."""
    forms: list[Any] = []
    for branch in schema.get("anyOf", [schema]):
        match branch.get("type"):
            case "string":
                forms.append(name)
            case "array":
                forms.append([name] * max(1, branch.get("minItems", 1)))
            case "object":
                forms.append({name: 1.0})
    return forms


@register_check(
    "method",
    "The named layer is the one that is read.",
    "model.features(images, layer) and model.tap(layer) read a layer's output",
    lambda method: None if method.layers else "it has no parameter that names layers",
    exemptible=True,
)
def reads_the_named_layer(method: AnyMethod) -> None:
    schemas = properties_of(method.spec.params_schema)
    for name in method.layers:
        for form in range(len(_as_layer(schemas[name], "conv2"))):
            runs: dict[str, Any] = {}

            def run(layer: str, name: str = name, form: int = form, runs: dict[str, Any] = runs) -> Any:
                if layer not in runs:
                    value = _as_layer(schemas[name], layer)[form]
                    # The defaults of other layers may depend on this one.
                    others = {n: _as_layer(schemas[n], "relu1")[0] for n in method.layers if n != name}
                    case = Case("identities", "noise", params=others | {name: value})
                    runs[layer] = result_of(method, case)
                return runs[layer]

            compared, different = 0, []
            for layer in ("conv2", "relu2", "relu1"):
                result, copy = run(layer), run(f"{layer}_copy")
                if result is not None and copy is not None:
                    compared += 1
                    different += [] if _near_tensors(result, copy) else [layer]
            assert 2 * len(different) <= compared, (
                f"{name}={different[0]!r} and {name}='{different[0]}_copy' (an identity after it) return "
                "different results"
            )
            results = [(layer, r) for layer, r in runs.items() if r is not None and "copy" not in layer]
            if len(results) > 1:
                pairs = itertools.combinations(results, 2)
                assert not all(same_tensors(one, other) for (_, one), (_, other) in pairs), (
                    f"{name}: layers {', '.join(layer for layer, _ in results)} return the same result"
                )


def _near_tensors(first: Result, second: Result) -> bool:
    """Whether two results have the same tensors up to rounding."""
    ones, others = dict(tensors_in(first)), dict(tensors_in(second))
    return ones.keys() == others.keys() and all(
        one.shape == others[n].shape
        and torch.allclose(one.double(), others[n].double(), rtol=1e-4, atol=1e-6)
        for n, one in ones.items()
    )


# --- parameters ----------------------------------------------------------------------------------


class Trials:
    """Runs of a method with some parameters changed, each once, up to a limit."""

    def __init__(self, method: AnyMethod) -> None:
        self.method = method
        self.runs: dict[Case, tuple[Any, Passes] | None] = {}

    def run(self, case: Case) -> tuple[Any, Passes] | None:
        """A case's result and passes; None where it is refused or raises."""
        if case not in self.runs:
            model = case.model()
            try:
                with count_passes(model.module) as passes:
                    self.runs[case] = case.run(self.method, model), passes
            except Exception:  # refused, or reported by the check "answers"
                self.runs[case] = None
        return self.runs[case]

    def differ(self, one: Case, other: Case, work_only: bool) -> bool | None:
        """Whether two cases have different results; None where one of them has none."""
        # The second first: where its value is refused, the first is not needed.
        if (second := self.run(other)) is None or (first := self.run(one)) is None:
            return None
        if not same_result(first[0], second[0]):
            return True
        return work_only and (first[1].started, first[1].largest) != (second[1].started, second[1].largest)


@register_check(
    "method",
    "Every parameter changes the result.",
    "a parameter that is not used, or that another one overrides; remove it, or name it in exempt=",
    exemptible=True,
)
def parameters_matter(method: AnyMethod) -> None:
    trials = Trials(method)
    schemas = {n: s for n, s in properties_of(method.spec.params_schema).items() if n != method.seed}
    ignored, switches = [], []
    for name in schemas:
        tried, pairs = 0, 0
        for one, other in itertools.islice(case_pairs(method, name, schemas), MOST_TRIALS):
            differ = trials.differ(one, other, name in WORK_ONLY)
            tried, pairs = tried + (differ is not None), pairs + 1
            if differ:
                if (same := _values_of_a_switch(trials, name, schemas[name], one)) is not None:
                    switches.append(f"{name} only by whether it is at the end of its range: {same} are equal")
                break
        else:
            if 4 * tried > pairs:  # else it depends on the inputs which values are valid
                ignored.append(f"{name} ({tried} pairs of values tried)")
    assert not ignored, f"no result depends on {', '.join(ignored)}"
    assert not switches, f"the result depends on {'; '.join(switches)}"


def _values_of_a_switch(trials: Trials, name: str, schema: Mapping[str, Any], case: Case) -> str | None:
    """Values of a number that is read as a switch: those inside its range return one result."""
    usual = case.arguments(trials.method).get(name, schema.get("default"))
    if schema.get("type") != "number" or not usual:
        return None
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    values = [v for v in (usual, 2 * usual, usual / 2, usual / 5, usual / 50) if low < v < high]
    compared = 0
    for network in (case.network, "fragile", "functional", "gap"):
        base = replace(case, network=network, pictures="noise")
        cases = [replace(base, params={**base.params, name: v}) for v in values]
        equal = 0
        for other in cases[1:]:
            differ = trials.differ(cases[0], other, False)
            if differ:
                return None
            equal += differ is False
        compared += equal >= 3
    return ", ".join(f"{v:.3g}" for v in values) if compared > 1 else None


def case_pairs(method: AnyMethod, name: str, schemas: Mapping[str, Any]) -> Iterator[tuple[Case, Case]]:
    """Pairs of cases that differ in one parameter, the most informative first."""
    bases = [Case(pictures="noise"), Case("functional"), Case("shapes-vgg", count=1)]
    if method.spec.input("model"):  # no dead ReLU: every unit has a gradient
        bases.insert(1, Case("fragile", "noise"))
    if name in method.layers:
        bases = [Case("functional", "noise"), *bases]
    if method.spec.input("labels"):  # a label is the predicted class for the first image only
        bases += [Case("fragile", pictures, count=1) for pictures in ("noise", "scenes", "binary")]
    if method.spec.input("model"):  # it may concern attention
        bases.append(Case("heads", "noise"))
    if any(declared.role in OPTIONAL_ROLES for declared in method.spec.inputs):
        bases.append(Case(pictures="noise", optional=True))

    def values(of: str, base: Case) -> list[Any]:
        return candidate_values(method, of, schemas[of], base)

    def pairs(base: Case) -> Iterator[tuple[Case, Case]]:
        for value in values(name, base):
            yield base, replace(base, params={**base.params, name: value})

    for base in bases[:2]:
        yield from itertools.islice(pairs(base), 4)
    others = [[(other, v) for v in values(other, bases[0])[:6]] for other in schemas if other != name]
    rows = [list(filter(None, row)) for row in itertools.zip_longest(*others)]

    def combined(row: list[tuple[str, Any]]) -> Iterator[tuple[Case, Case]]:
        for other, value in row:
            # Another network and another value: the first may refuse the combination.
            for number, base in enumerate(bases[:2]):
                yield from itertools.islice(pairs(replace(base, params={other: value})), number, number + 1)

    # It may matter only under one choice of another parameter, on another network, or in a longer call.
    for row in rows[:1]:
        yield from combined(row)
    for base in bases[2:]:
        yield from itertools.islice(pairs(base), 4)
    larger = larger_parameters(method, bases[0], limit=1500)
    if larger != method.spec.quick:
        for base in bases[:2]:
            yield from itertools.islice(pairs(replace(base, params=larger)), 4)
    for row in rows[1:]:
        yield from combined(row)
    for base in bases:
        yield from itertools.islice(pairs(base), 4, None)
