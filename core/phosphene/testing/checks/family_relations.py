"""Relations that the technique or the equation in a method's text implies: sums, supports, twins, N - 1."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
from torch import Tensor

from ...data.datasets import TensorDataset
from ...errors import PhospheneError
from ...results import AdversarialExamples
from ..candidates import larger_parameters, largest_accepted
from ..cases import Case, properties_of
from ..linear_model import linear_model
from ..techniques import same_meaning
from .attacks import COUNT, _attack, logits_of
from .base import register_check, result_of
from .claims import title_of
from .dataset_claims import _DatasetCall, _reads_images_of_a_data_set
from .maps import _averages_no_samples, _sample_parameters
from .relations import RelationCalls, _declares, maps_images_of_a_model, prose_in_one_line, text_of

if TYPE_CHECKING:
    from .base import AnyMethod


# --- sums ----------------------------------------------------------------------------------------------

#: Words for a path from a baseline, and words for a map or a baseline of which no sum is known.
_PATH = (
    r"integrated gradients|path integral|line integral|expected gradients|completeness|sums? to S\(\w\) - "
)
_NO_SUM = (
    r"blur|mean colou?r|own mean|around the image|neighbou?r|noisy (copies|version)|absolute|magnitude|relu\("
    r"|rectif|squar|normali[sz]ed to|layer|feature map|permut|shuffl|guided"
)
#: Points of the integral, the largest error of their sum, and the number of seeds of a random method.
_POINTS, _SUM, _SEEDS = 64, 0.02, 6
#: Samples of a random method.
_SAMPLES = 32


@register_check(
    "method",
    "The map of a path method sums to S(x) - c, with the same c for all images, whatever the baselines.",
    "the mean over baselines of (x - b) times the gradient: the mean difference times the mean gradient is "
    "another number",
    lambda method: (
        maps_images_of_a_model(method)
        or _declares(method, "complete")
        or (
            None
            if re.search(_PATH.lower(), text_of(method)) and not re.search(_NO_SUM, text_of(method))
            else "its text names no integral from a baseline that is the same for all images"
        )
    ),
    exemptible=True,
)
def path_sums_differ_as_the_scores(method: AnyMethod) -> None:
    fields = method.spec.params.model_fields
    arguments = Case().arguments(method)
    usual = method.validate(arguments)
    _require_common_baseline(usual)
    steps = {
        name: largest_accepted(method, arguments, name, 2 * _POINTS) // 2
        for name in fields
        if same_meaning(name, ("steps",))
    }
    if not steps and method.seed is None:
        raise SkipTest("a fixed number of points may be too small for the integral")
    samples = {
        name: largest_accepted(method, arguments, name, _SAMPLES)
        for name in _sample_parameters(method)
        if method.seed is not None
    }
    calls = _first_calls(method, ("tokens", "gap"), arguments | steps | samples)
    offsets, size = _offsets(calls)
    error = float(offsets.abs().max()) / size
    if error > _SUM and calls.is_random and method.seed is not None:
        error = _error_over_seeds(calls, method.seed) / size
    elif error > _SUM and steps:
        finer, _ = _offsets(
            replace(calls, params=calls.params | {n: 2 * count for n, count in steps.items()})
        )
        if float(finer.abs().max()) < 0.6 * float(offsets.abs().max()):
            return  # a left or a right sum, whose error falls with the number of points
    assert error <= _SUM, (
        f"S(x) minus the sum of the map differs between the images by {error:.1%} of the largest sum "
        f"({_SUM:.0%} is allowed): it is the mean score of the baselines, which are the same for all images"
        f"{f', with {steps}' if steps else ''} on relation_network({calls.network!r}), one image at a time"
    )


def _first_calls(method: AnyMethod, networks: tuple[str, ...], params: dict[str, Any]) -> RelationCalls:
    """The first call on the first network that the method accepts. Raises SkipTest where it refuses all."""
    for network in networks:
        try:
            return RelationCalls.start(method, network, params)
        except PhospheneError as error:
            refusal = error
    raise SkipTest(f"it refused the networks {', '.join(networks)}: {refusal}")


def _offsets(calls: RelationCalls) -> tuple[Tensor, float]:
    """S(x) - sum M of each image minus that of the first, and the largest |sum M|."""
    images = calls.inputs["images"]
    # A dimmed image, with other values of the gradient.
    images = torch.cat([images, 0.6 * images[:1] + 0.3])
    sums = torch.stack(
        [calls(inputs={"images": images[n : n + 1]}).maps.double().sum() for n in range(len(images))]
    )
    offsets = calls.scores(images) - sums
    return offsets[1:] - offsets[:1], max(float(sums.abs().max()), 1e-12)


def _error_over_seeds(calls: RelationCalls, seed: str) -> float:
    """By how much the mean offsets over several seeds differ from 0, beyond the errors of random points."""
    runs = torch.stack([_offsets(replace(calls, params=calls.params | {seed: n}))[0] for n in range(_SEEDS)])
    errors = runs.std(0) / _SEEDS**0.5
    return float((runs.mean(0).abs() - 6 * errors).clamp(min=0).max())


def _require_common_baseline(params: Mapping[str, Any]) -> None:
    """Raise SkipTest for a baseline that is not the same for all images."""
    if any("baseline" in n and v in ("mean", "blur", "noise", "own") for n, v in params.items()):
        raise SkipTest("its baseline depends on the image")


#: Words for a grid of cells whose values add up, and what makes them another number.
_OTHER_SHARES = (
    r"blur|mean colou?r|own mean|inpaint|normali[sz]ed to|rectif|absolute|magnitude|relu\(|interaction"
    r"|banzhaf|owen|layer|feature map|(last|whole|raw) token|ranks?\b"
)


@register_check(
    "method",
    "Shapley values of an image's parts sum to S(x) - c, with the same c for all images.",
    "the weights |T|! (n - |T| - 1)! / n!, or the order of a permutation; the parts that are left",
    lambda method: (
        maps_images_of_a_model(method)
        or _declares(method, "complete")
        or (
            None
            if re.search(r"shapley|\bshap\b", title_of(method))
            and not re.search(_OTHER_SHARES, prose_in_one_line(method))
            else "its title names no Shapley values"
        )
    ),
    exemptible=True,
)
def shapley_values_sum_to_the_change_of_the_score(method: AnyMethod) -> None:
    calls = _first_calls(method, ("tokens", "gap"), Case().arguments(method))
    _require_common_baseline(calls.params)
    if tuple(calls.result.maps.shape[1:]) == tuple(calls.inputs["images"].shape[2:]) and any(
        re.search(r"cell|grid|patch|segment|block", name) for name in calls.params
    ):
        raise SkipTest("each pixel may have the value of its cell")
    offsets, size = _offsets(calls)
    error = float(offsets.abs().max()) / size
    if error > _SUM and calls.is_random and method.seed is not None:
        error = _error_over_seeds(calls, method.seed) / size
    assert error <= _SUM, (
        f"S(x) minus the sum of the map differs between the images by {error:.1%} of the largest sum "
        f"({_SUM:.0%} is allowed)\non relation_network({calls.network!r}), one image at a time"
    )


#: Samples and seeds of variance indices, and the largest difference of their sum from 1.
_INDEX_SAMPLES, _INDEX_SEEDS, _INDEX_ERROR = 256, 4, 0.3


@register_check(
    "method",
    "Sobol indices of a score that is a sum over the cells sum to 1.",
    "the estimator: Jansen's is the mean of squared differences divided by 2 V",
    lambda method: (
        maps_images_of_a_model(method)
        or (
            None
            if "sobol" in title_of(method)
            and re.search(r"total|first[- ]order|jansen|saltelli", prose_in_one_line(method))
            and not re.search(_OTHER_SHARES, prose_in_one_line(method))
            else "its title names no Sobol indices"
        )
    ),
    exemptible=True,
)
def indices_of_an_additive_score_sum_to_one(method: AnyMethod) -> None:
    size = (12, 16)
    weight = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    model = linear_model(weight.abs() + 0.2)
    counts = {
        n: largest_accepted(method, Case().arguments(method), n, _INDEX_SAMPLES)
        for n in _sample_parameters(method)
    }
    sums = []
    for seed in range(_INDEX_SEEDS):
        params = counts if method.seed is None else {**counts, method.seed: seed}
        case = Case(pictures="noise", count=1, size=size, target=1, params=params)
        if (result := result_of(method, case, model)) is None:
            raise SkipTest("it refused a linear network")
        if tuple(result.maps.shape[1:]) == size:
            raise SkipTest("each pixel may have the value of its cell")
        sums.append(float(result.maps.double().sum()))
    mean = sum(sums) / len(sums)
    assert abs(mean - 1) <= _INDEX_ERROR, (
        f"the indices of the cells of a linear network's score sum to {mean:.3f} on average, with {counts}"
    )


#: A sentence that the map sums to the score itself, and words that limit it.
_SUMS_TO_SCORE = (
    r"\bsums? (up )?(exactly )?to (s\([ix]\)|s\b|f\(x\)|the (target's |class |whole )?(score|logit))"
    r"(?! ?(-|−|–|minus|\(|'s|’s|change|drop|difference))"
)
_LIMITED = (
    r"without bias|no bias|bias-free|linear network|homogeneous|minus its|up to|approximat|nearly|epsilon"
)


@register_check(
    "method",
    "A map whose text says that it sums to the score does so on networks with biases.",
    "the biases: input times gradient is the score of a network without biases only",
    lambda method: (
        maps_images_of_a_model(method)
        or (
            None
            if re.search(_SUMS_TO_SCORE, prose_in_one_line(method))
            and not re.search(_LIMITED, prose_in_one_line(method))
            else "its text does not say that it sums to the score"
        )
    ),
    exemptible=True,
)
def sums_to_the_score_as_documented(method: AnyMethod) -> None:
    compared = 0
    for network in ("gap", "flat"):
        try:
            calls = RelationCalls.start(method, network, Case().arguments(method))
        except PhospheneError:
            continue
        compared += 1
        sums, values = calls.result.maps.double().flatten(1).sum(1), calls.scores(calls.inputs["images"])
        error = float((sums - values).abs().max() / values.abs().max().clamp(min=1e-12))
        assert error < 0.01, (
            f"the maps sum to {[round(v, 4) for v in sums.tolist()]}, the scores are "
            f"{[round(v, 4) for v in values.tolist()]}\non relation_network({network!r}), which has biases"
        )
    if not compared:
        raise SkipTest("it refused the networks gap and flat")


@register_check(
    "method",
    "A larger stabilizer absorbs relevance: the map does not become larger.",
    "the sign: z + epsilon sign(z) is larger than z in size, z - epsilon sign(z) smaller",
    lambda method: (
        maps_images_of_a_model(method)
        or (
            None
            if _stabilizer(method)
            and re.search(r"\blrp\b|relevance", text_of(method))
            and re.search(r"absorb|damp|stabili", str(_stabilizer_text(method)))
            else "it has no stabilizer that absorbs relevance"
        )
    ),
    exemptible=True,
)
def larger_stabilizers_absorb_more(method: AnyMethod) -> None:
    name = str(_stabilizer(method))
    schema = properties_of(method.spec.params_schema)[name]
    largest = float(schema.get("maximum", schema.get("exclusiveMaximum", 1.0) * 0.99))
    calls = _first_calls(method, ("flat", "gap", "tokens"), Case().arguments(method))
    usual = float(calls.params[name] or 0)
    # Smaller than the scores: a stabilizer of the wrong sign that is larger than they are makes them smaller.
    values = [value for value in (0.02, 0.1) if usual < value <= largest]
    if not values:
        raise SkipTest(f"its default {name}={usual:g} is not small")
    before = float(calls.result.maps.double().abs().sum())
    for value in values:
        ratio = float(calls(params={name: value}).maps.double().abs().sum()) / max(before, 1e-300)
        assert ratio <= 1.02, (
            f"with {name}={value:g} the map is {ratio:.3f} times as large as with {usual:g}\n"
            f"on relation_network({calls.network!r})"
        )


def _stabilizer(method: AnyMethod) -> str | None:
    return next((n for n in method.spec.params.model_fields if n in ("epsilon", "eps", "stabilizer")), None)


def _stabilizer_text(method: AnyMethod) -> str:
    """The description of the parameter and of the method."""
    field = method.spec.params.model_fields[str(_stabilizer(method))]
    return f"{field.description or ''} {text_of(method)}".lower()


# --- supports ------------------------------------------------------------------------------------------

#: An equation with one ReLU, around a sum whose terms are linear in the gradient.
_RELU_OF_SUM = r"relu ?\( ?(sum|σ|∑|\\sum)"
_NOT_LINEAR = (
    r"relu ?\(.*relu ?\(|relu of (each|every|the (weights?|gradients?))|rectified (weight|gradient)|positive"
    r"|softmax|\bexp|abs\(|\|d|\^2|squar|sigmoid|top[- ]|absolute|maximum\(|clamp"
)


@register_check(
    "method",
    "Where the map of the score is positive, that of the negated score is zero: M = ReLU(sum).",
    "one ReLU, of the sum over the channels: not one of each channel",
    lambda method: (
        maps_images_of_a_model(method)
        or (
            "it takes no target"
            if not method.spec.input("target")
            else None
            if re.search(_RELU_OF_SUM, prose_in_one_line(method))
            and not re.search(_NOT_LINEAR, prose_in_one_line(method).partition("returns:")[0])
            and "gradients" in method.spec.needs
            else "its text has no ReLU of a sum that is linear in gradients"
        )
    ),
    exemptible=True,
)
def rectifies_the_sum_as_documented(method: AnyMethod) -> None:
    target = next(i.name for i in method.spec.inputs if i.role == "target")
    compared = 0
    for network in ("gap", "flat"):
        try:
            calls = RelationCalls.start(method, network, Case().arguments(method))
            maps = [
                calls(inputs={target: lambda logits, sign=sign: sign * logits[:, 1]}).maps.double()
                for sign in (1, -1)
            ]
        except PhospheneError:
            continue
        if tuple(maps[0].shape[1:]) == tuple(calls.inputs["images"].shape[2:]):
            raise SkipTest("enlarged maps overlap at the borders of their cells")
        compared += 1
        sizes = [float(signed.max()) for signed in maps]
        both = torch.minimum(maps[0] / max(sizes[0], 1e-300), maps[1] / max(sizes[1], 1e-300))
        assert float(both.max()) <= 1e-6, (
            f"the maps of S and of -S are both positive at {float((both > 1e-6).double().mean()):.0%} of the "
            f"positions; ReLU(sum) is positive for one of them\non relation_network({network!r}) and target 1"
        )
    if not compared:
        raise SkipTest("it refused the networks gap and flat")


#: Side of the images, the number of seeds, and the fraction of columns where shifted masks have edges.
_MASKED_SIDE, _MASK_SEEDS, _EDGES = 56, 8, 0.7


@register_check(
    "method",
    "The edges of masks whose text says that they are shifted at random are at other pixels for each seed.",
    "enlarge the grid by a cell more than the image and crop it at a random offset",
    lambda method: (
        maps_images_of_a_model(method)
        or (
            None
            if method.seed is not None
            and re.search(r"\bmasks?\b", prose_in_one_line(method))
            and re.search(
                r"random(ly)? (shift|offset|crop)|shifted|(shift|offset)s? (is|are) random",
                prose_in_one_line(method),
            )
            else "its text names no masks with a random shift"
        )
    ),
    exemptible=True,
)
def masks_are_shifted_as_documented(method: AnyMethod) -> None:
    # The map of a constant score is the mean of the masks.
    model = linear_model(torch.zeros(2, 3, _MASKED_SIDE, _MASKED_SIDE), bias=torch.tensor([1.0, 0.5]))
    edges = torch.zeros(2, _MASKED_SIDE - 2, dtype=torch.bool)
    for seed in range(_MASK_SEEDS):
        params = {str(method.seed): seed}
        case = Case(count=1, size=(_MASKED_SIDE, _MASKED_SIDE), target=0, params=params)
        if (result := result_of(method, case, model)) is None:
            raise SkipTest("it refused a network that ignores its image")
        mask = result.maps[0].double()
        if tuple(mask.shape) != case.size or float(mask.max() - mask.min()) < 1e-9:
            raise SkipTest("its map of a constant score shows no masks")
        for axis, tensor in enumerate((mask, mask.T)):  # a mask is linear but at the centers of its cells
            bends = (tensor[:, 2:] - 2 * tensor[:, 1:-1] + tensor[:, :-2]).abs().amax(0)
            edges[axis] |= bends > 1e-4 * float(mask.max() - mask.min())
    share = float(edges.double().mean(1).min())
    assert share >= _EDGES, (
        f"the masks of {_MASK_SEEDS} seeds have edges at {share:.0%} of the columns or rows: "
        "shifted masks have them everywhere"
    )


# --- neighbors -----------------------------------------------------------------------------------------

_NOT_NEAREST = (
    r"least similar|farthest|furthest|dissimilar|other class|different class|opposite|counterfactual|diverse"
    r"|influence|hardest|outlier|inner product|dot product|unlike"
)


@register_check(
    "method",
    "The nearest neighbor of an image that the data set has with a little noise is that image.",
    "the order: the smallest distance, the largest similarity",
    lambda method: (
        _reads_images_of_a_data_set(method)
        or (
            None
            if re.search(r"neighbou?r|nearest|most similar|closest", text_of(method))
            and not re.search(_NOT_NEAREST, text_of(method))
            and "indices" in getattr(method.result, "__dataclass_fields__", {})
            else "it returns no nearest images of a data set"
        )
    ),
    exemptible=True,
)
def nearest_neighbor_is_the_twin(method: AnyMethod) -> None:
    call = _DatasetCall.start(method, count=8)
    images, classes = call.dataset.images, list(call.dataset.labels(range(8)) or ())
    generator = torch.Generator().manual_seed(2)
    noise = 2e-3 * torch.randn(images[:1].shape, generator=generator).to(images)
    twin = (images[3:4] + noise).clamp(0, 1)
    queries = next((i.name for i in method.spec.inputs if i.role == "images"), None)
    dataset = next(i.name for i in method.spec.inputs if i.role == "dataset")
    if queries is None:
        labels = [*classes, classes[3]] if classes else None
        changed: dict[str, Any] = {dataset: TensorDataset(torch.cat([images, twin]), classes=labels)}
    else:
        changed = {queries: twin.to(call.model.device, call.model.dtype)}
    if (result := result_of(method, call.case, call.model, **changed)) is None:
        raise SkipTest("it refused the case")
    compared = 0
    for name, indices in result.fields():
        if not (name.endswith("indices") and isinstance(indices, Tensor)) or indices.ndim != 2:
            continue
        if queries is None and len(indices) != 9:
            continue
        compared += 1
        row = indices[0 if queries is not None else 3].tolist()
        nearest = [n for n in row if queries is not None or n != 3][0:1]
        expected = 3 if queries is not None else 8
        assert nearest == [expected], (
            f"{name} of a copy of image {3 if queries else 8} with a little noise are {row}, and "
            f"{expected} is the nearest\non {call.case}"
        )
    if not compared:
        raise SkipTest("it returned no indices")


# --- spreads -------------------------------------------------------------------------------------------

_SPREAD = r"variance|std|standard deviation|covarian|\bvar\b"
_UNBIASED = (
    r"[/(] ?\(? ?\w{1,12} ?[-−] ?1 ?\)|\b(n|m|k|samples|images) ?[-−] ?1\b|unbiased|bessel|correction ?= ?1"
)
_BIASED = r"correction ?= ?0|ddof ?= ?0|population (variance|standard)|\bbiased\b|divided by (the number|n\b)"


def _spread_claim(method: AnyMethod) -> str | None:
    """ "N - 1" or "N", by which the text divides a variance; None where it does not say."""
    text = prose_in_one_line(method)
    if not re.search(_SPREAD, text):
        return None
    unbiased, biased = re.search(_UNBIASED, text), re.search(_BIASED, text)
    return None if bool(unbiased) == bool(biased) else "N - 1" if unbiased else "N"


@register_check(
    "method",
    "A variance over a data set is divided by N - 1 where the text says so, and by N where it says that.",
    "torch.var and std divide by N - 1 unless correction=0 is passed; a mean of squares divides by N",
    lambda method: (
        _reads_images_of_a_data_set(method)
        or (None if _spread_claim(method) else "its text does not say what a variance is divided by")
    ),
    exemptible=True,
)
def variances_are_divided_as_documented(method: AnyMethod) -> None:
    claim = _spread_claim(method)
    call = _DatasetCall.start(method, count=6)
    call.case = replace(call.case, double=True)
    call.model = call.case.model()
    usual = call(range(6))
    # Each image twice: a mean of squares over N stays the same, one over N - 1 becomes smaller.
    doubled = call([*range(6), *range(6)])
    others = dict(_spreads(doubled))
    compared = 0
    for name, value in _spreads(usual):
        other = others.get(name)
        if other is None or other.shape != value.shape or not float(value.abs().sum()):
            continue
        compared += 1
        ratio = float(other.double().abs().sum() / value.double().abs().sum())
        as_documented = ratio < 1 - 1e-4 if claim == "N - 1" else abs(ratio - 1) < 1e-4
        assert as_documented, (
            f"{name} is {ratio:.5f} times as large for a data set with each image twice; a sum of squares "
            f"divided by {claim}, as the text says, is {'smaller' if claim != 'N' else 'the same'}"
            f"\non {call.case}"
        )
    if not compared:
        raise SkipTest("it returned no variance")


def _spreads(result: Any) -> Iterator[tuple[str, Tensor]]:
    """Fields that are variances or standard deviations."""
    for name, value in result.fields():
        if re.search(r"var|std|cov|deviation|spread", name) and not re.search(r"explained|ratio", name):
            if isinstance(value, float):
                yield name, torch.tensor(value)
            elif isinstance(value, Tensor) and value.is_floating_point():
                yield name, value


@register_check(
    "method",
    "A variance over random samples has the same mean for two samples and for many: it is divided by n - 1.",
    "torch.var divides by n - 1, a mean of squares by n",
    lambda method: (
        _averages_no_samples(method)
        or (
            None
            if _spread_claim(method) == "N - 1"
            else "its text names no variance that is divided by n - 1"
        )
    ),
    exemptible=True,
)
def sample_variances_are_unbiased_as_documented(method: AnyMethod) -> None:
    for name in _sample_parameters(method):
        means = []
        for count, seeds in ((2, 24), (16, 3)):
            params = [{name: count, str(method.seed): seed} for seed in range(seeds)]
            runs = [result_of(method, Case(pictures="noise", count=1, params=p)) for p in params]
            if None in runs:
                raise SkipTest("it refused the case")
            means.append(float(torch.stack([run.maps.double().abs().mean() for run in runs]).mean()))
        ratio = means[0] / max(means[1], 1e-300)
        standard = re.search(r"standard deviation|\bstd\b|sqrt", prose_in_one_line(method)) is not None
        # Divided by n it is 1/2 over 15/16; roots are smaller for few samples even then.
        assert ratio > (0.6 if standard else 0.73), (
            f"with {name}=2 the map is {ratio:.2f} times as large as with 16, over many seeds: a variance is "
            "as large if it is divided by n - 1, 0.53 times if by n"
        )


# --- explained variance --------------------------------------------------------------------------------


@register_check(
    "method",
    "Explained variances are proportional to the variances of the coordinates.",
    "the variance of a component is its singular value squared, divided by the sum of all squares",
    lambda method: (
        _reads_images_of_a_data_set(method)
        or (
            None
            if re.search(
                r"explained variance|variance (is )?explained|explain\w* [^.]{0,30}variance",
                prose_in_one_line(method),
            )
            else "its text names no explained variance"
        )
    ),
    exemptible=True,
)
def explained_variances_are_those_of_the_coordinates(method: AnyMethod) -> None:
    call = _DatasetCall.start(method, count=9)
    call.case = replace(call.case, double=True)
    call.model = call.case.model()
    result = call(range(9))
    fields = {n: v.double() for n, v in _tensors(result)}
    shares = {n: v for n, v in fields.items() if re.search(r"explained|ratio|variance", n) and v.ndim == 1}
    coordinates = {n: v for n, v in fields.items() if v.ndim == 2 and len(v) == 9}
    compared = 0
    for name, share in shares.items():
        pairs = [(n, v.var(0)) for n, v in coordinates.items() if 2 <= v.shape[1] <= len(share)]
        for other, variances in pairs:
            centered = float(coordinates[other].mean(0).abs().max()) < 1e-3 * float(variances.max().sqrt())
            own = share[: len(variances)]
            if not centered or float(variances.max()) < 1.01 * float(variances.min()):
                continue  # features, or whitened coordinates
            compared += 1
            expected = variances / variances.sum()
            error = float((own / own.sum() - expected).abs().max())
            assert error < 1e-3, (
                f"{name} is in the proportions {_shares(own)}, the variances of {other} in "
                f"{_shares(expected)}\non {call.case}"
            )
    if not compared:
        raise SkipTest("it returned no explained variances with coordinates")


def _tensors(result: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in result.fields():
        if isinstance(value, Tensor) and value.is_floating_point():
            yield name, value
        elif isinstance(value, (tuple, list)) and value and all(isinstance(v, float) for v in value):
            yield name, torch.tensor(value)


def _shares(values: Tensor) -> str:
    return " : ".join(f"{value:.3f}" for value in (values / values.sum()).tolist())


# --- attacks and units ---------------------------------------------------------------------------------

_CONFIDENCE = ("kappa", "confidence", "margin")


def _confidence(method: AnyMethod) -> str | None:
    """The parameter for the lead of the other class over the label, if an attack has one that can be 0."""
    for name, schema in properties_of(method.spec.params_schema).items():
        low, high = schema.get("minimum", schema.get("exclusiveMinimum", -1)), schema.get("maximum", 1e9)
        if name in _CONFIDENCE and schema.get("type") in ("number", "integer") and low <= 0 and high >= 1:
            return name
    return None


@register_check(
    "method",
    "With a larger confidence the adversarial class leads by more, or the loss goes on to rise.",
    "the sign of kappa: max(z_y - max_j z_j, -kappa) goes on falling below 0",
    lambda method: (
        "it is no attack"
        if not issubclass(method.result, AdversarialExamples)
        else None
        if _confidence(method)
        else "it has no parameter for the confidence"
    ),
    exemptible=True,
)
def larger_confidence_leads_by_more(method: AnyMethod) -> None:
    name = str(_confidence(method))
    leads = []
    for value in (0, 1):
        case = Case("fragile", "noise", count=COUNT)
        case = replace(case, params=larger_parameters(method, case, limit=1500) | {name: value})
        if (run := _attack(method, case)) is None:
            raise SkipTest("it refused the case")
        result, model = run
        logits = logits_of(model, result.adversarial).double()
        own = logits.gather(1, result.labels[:, None])[:, 0]
        other = logits.scatter(1, result.labels[:, None], -torch.inf).amax(1)
        leads.append((other - own) * (-1 if result.targeted else 1))
    before, after = leads
    fooled = before > 0
    if not fooled.any():
        raise SkipTest("it succeeded for no image")
    # A confidence that cannot be reached may end at any image: one image that leads by more is enough.
    least, lead = float(before[fooled].mean()), float(after[fooled].mean())
    assert lead > least - 0.05 or bool((after[fooled] > before[fooled]).any()), (
        f"with {name}=1 the other class leads by {lead:.3f} logits on average, with {name}=0 by {least:.3f}"
    )


@register_check(
    "method",
    "An entropy is in the unit that its text states: log2 K bits or ln K nats for K equal probabilities.",
    "torch.log is the natural logarithm; divide by ln 2 for bits",
    lambda method: (
        "it takes no images of a model"
        if not (method.spec.input("model") and method.spec.input("images"))
        else None
        if re.search(r"entropy|information|surpris", text_of(method)) and _unit(method)
        else "its text states no unit of an entropy"
    ),
    exemptible=True,
)
def entropies_have_the_documented_unit(method: AnyMethod) -> None:
    unit, units = _unit(method), {"bits": math.log2(3), "nats": math.log(3)}
    model = linear_model(torch.zeros(3, 3, 8, 8))
    if (result := result_of(method, Case(size=(8, 8)), model)) is None:
        raise SkipTest("it refused a network that ignores its image")
    for name, value in _tensors(result):
        for other, number in units.items():
            wrong = other != unit and value.numel() and bool((value.double() - number).abs().max() < 1e-3)
            assert not wrong, (
                f"{name} of three equally likely classes is {number:.4f} {other}; its text says {unit}, of "
                f"which they have {units[str(unit)]:.4f}"
            )


def _unit(method: AnyMethod) -> str | None:
    """ "bits" or "nats" where the text names one of them."""
    named = [unit for unit in ("bits", "nats") if re.search(rf"\b{unit[:-1]}s?\b", prose_in_one_line(method))]
    return named[0] if len(named) == 1 else None
