"""Checks of numbers with a common name: outlier scores, agreement, calibration, Shapley values of a vote."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
from torch import Tensor, nn

from ...models import Model
from ..candidates import largest_accepted
from ..cases import Case, properties_of
from ..linear_model import linear_model
from ..networks import standardize_logits
from ..techniques import same_meaning
from .base import register_check, result_of
from .claims import title_of
from .dataset_claims import _DatasetCall, _reads_images_of_a_data_set
from .relations import text_of

if TYPE_CHECKING:
    from .base import AnyMethod

#: Images of the data set of a reference: more than the channels of the networks' last layers.
_COUNT = 60
#: The largest difference from a reference, as a fraction of its largest value.
_EQUAL = 5e-3
#: The neighbors that are counted.
_NEIGHBORS = 3

#: Vectors (M, D), classes (M,) and queries (N, D) of a data set and of images, in NumPy.
Reference = Callable[[Any, Any, Any], Iterator[Any]]


# --- references -----------------------------------------------------------------------------------------


def _local_outlier_factor(vectors: Any, classes: Any, queries: Any) -> Iterator[Any]:
    from sklearn.neighbors import LocalOutlierFactor

    for metric in ("euclidean", "cosine"):
        if queries is None:
            model = LocalOutlierFactor(_NEIGHBORS, metric=metric).fit(vectors)
            yield -model.negative_outlier_factor_
        else:
            model = LocalOutlierFactor(_NEIGHBORS, metric=metric, novelty=True).fit(vectors)
            yield -model.score_samples(queries)


def _mahalanobis(vectors: Any, classes: Any, queries: Any) -> Iterator[Any]:
    import numpy

    queries = vectors if queries is None else queries
    names = sorted(set(classes.tolist()))
    means = numpy.stack([vectors[classes == name].mean(0) for name in names])
    centered = vectors - means[[names.index(c) for c in classes.tolist()]]
    inverse = numpy.linalg.pinv(centered.T @ centered / len(vectors), rcond=1e-10)
    differences = queries[:, None] - means
    distances = numpy.einsum("nkd,de,nke->nk", differences, inverse, differences)
    yield distances.min(1)
    yield distances.min(1) ** 0.5


def _silhouette(vectors: Any, classes: Any, queries: Any) -> Iterator[Any]:
    from sklearn.metrics import silhouette_samples

    for metric in ("euclidean", "cosine", "sqeuclidean"):
        values = silhouette_samples(vectors, classes, metric=metric)
        yield values
        yield values.mean()
        yield [values[classes == name].mean() for name in sorted(set(classes.tolist()))]


def _davies_bouldin(vectors: Any, classes: Any, queries: Any) -> Iterator[Any]:
    from sklearn.metrics import davies_bouldin_score

    yield davies_bouldin_score(vectors, classes)


def _calinski_harabasz(vectors: Any, classes: Any, queries: Any) -> Iterator[Any]:
    from sklearn.metrics import calinski_harabasz_score

    yield calinski_harabasz_score(vectors, classes)


#: Of a name in a title: words for variants, whether a factor is open, and the reference.
FEATURE_NUMBERS: tuple[tuple[str, str, bool, Reference], ...] = (
    (r"local outlier factor|\blof\b", r"simplified|reverse|probabilit", False, _local_outlier_factor),
    (
        r"(class|tied).{0,40}mahalanobis|mahalanobis.{0,60}(class|tied)",
        r"relative|diagonal (covariance|matrix)|own covariance|covariance of (its|each|every|the) class"
        r"|per[- ]class covariance|single gaussian|ledoit|robust|logistic|marginal",
        True,
        _mahalanobis,
    ),
    (r"silhouette", r"simplified|centroid|\bmedoid|k-?means|clusters? of", False, _silhouette),
    (r"davies[- ]bouldin", r"k-?means|modified|median", False, _davies_bouldin),
    (r"calinski|variance ratio criterion", r"k-?means|modified|median", False, _calinski_harabasz),
)


def _entry(method: AnyMethod) -> tuple[str, str, bool, Reference] | None:
    title, text = title_of(method), text_of(method)
    rows = [row for row in FEATURE_NUMBERS if re.search(row[0], title) and not re.search(row[1], text)]
    return rows[0] if len(rows) == 1 else None


def _reads_a_model_and_a_data_set(method: AnyMethod) -> str | None:
    if (reason := _reads_images_of_a_data_set(method)) is not None:
        return reason
    if not method.spec.input("model"):
        return "it takes no model"
    return None if sum(i.role == "dataset" for i in method.spec.inputs) == 1 else "it takes two data sets"


@register_check(
    "method",
    "A number of features that has a common name is that of scikit-learn or of its definition.",
    "the definition, term by term: whose k-distance, the covariance about which mean, the number of pairs",
    lambda method: (
        _reads_a_model_and_a_data_set(method)
        or (None if _entry(method) else "its title names no such number, or a variant of one")
    ),
    exemptible=True,
)
def equals_the_number_of_its_name(method: AnyMethod) -> None:
    entry = _entry(method)
    assert entry is not None
    call = _DatasetCall.start(method, count=_COUNT)
    call.case = replace(call.case, count=9, double=True, params=_smallest_regularization(method))
    call.model = call.case.model()
    labels = [str(n % 3) for n in range(_COUNT)]
    result = call(range(_COUNT), labels)
    names = [i.name for i in method.spec.inputs if i.role == "images"]
    queries = next((v for n, v in result.inputs.items() if n in names), None)
    fields = list(_numbers(result))
    errors: list[tuple[float, str]] = []
    with torch.no_grad():
        for features in _features(call.model, method, call.case):
            vectors = features(call.dataset.images.to(call.model.device, call.model.dtype)).cpu().numpy()
            own = (
                None
                if queries is None
                else features(queries.to(call.model.device, call.model.dtype)).cpu().numpy()
            )
            classes = torch.tensor([int(label) for label in labels]).numpy()
            for expected in entry[3](vectors, classes, own):
                reference = torch.as_tensor(expected, dtype=torch.float64)
                for name, value in fields:
                    # Of few numbers, a factor could be found for any of them.
                    if value.shape == reference.shape and (value.numel() > 4 or not entry[2]):
                        errors.append((_distance(value, reference, entry[2]), name))
    if not errors:
        raise SkipTest("it returned no number of the shape of a reference")
    error, name = min(errors)
    assert error <= _EQUAL, (
        f"{name} differs by at least {error:.1%} of the largest value from the definition, for any usual "
        f"features of the model; a variant says so by exempt=\non {call.case}"
    )


def _smallest_regularization(method: AnyMethod) -> Mapping[str, Any]:
    """The number of neighbors, and the least value of a parameter that shrinks a covariance."""
    params: dict[str, Any] = {}
    for name, schema in properties_of(method.spec.params_schema).items():
        if same_meaning(name, ("k",)):
            params[name] = _NEIGHBORS
        elif re.search(r"shrink|ridge|regulari|jitter|epsilon|\beps\b", name):
            low = [schema[edge] for edge in ("minimum", "exclusiveMinimum") if edge in schema]
            if low:
                params[name] = low[0] if "minimum" in schema else max(low[0], 1e-9)
    return params


def _numbers(result: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in result.fields():
        if isinstance(value, float):
            yield name, torch.tensor(value, dtype=torch.float64)
        elif isinstance(value, Tensor) and value.is_floating_point() and value.ndim <= 1:
            yield name, value.double().cpu()


def _features(model: Model, method: AnyMethod, case: Case) -> Iterator[Callable[[Tensor], Tensor]]:
    """The usual vectors of images: inputs of the classifier, pooled maps, logits; each also of length 1."""

    def flat(images: Tensor, layer: str) -> Tensor:
        values = model.features(images, layer).double()
        return values.flatten(2).mean(2) if values.ndim > 3 else values.flatten(1)

    layers = [n for n in dict.fromkeys((*model.stages, model.last_map)) if n]
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: model.embed(x).double(),
        lambda x: model(x).double(),
    ]
    functions += [functools.partial(flat, layer=layer) for layer in layers]
    for function in functions:
        yield function
        yield lambda x, function=function: nn.functional.normalize(function(x), dim=1)  # type: ignore[misc]


def _distance(value: Tensor, reference: Tensor, up_to_a_factor: bool) -> float:
    """The largest difference as a fraction of the largest value."""
    if up_to_a_factor:
        reference = reference * (value @ reference) / (reference @ reference).clamp(min=1e-300)
    return float((value - reference).abs().max() / reference.abs().max().clamp(min=1e-12))


# --- predictions ---------------------------------------------------------------------------------------


def _predictions(method: AnyMethod, indices: Sequence[int], call: _DatasetCall) -> tuple[Tensor, Tensor]:
    """The probabilities (M, K) and the classes (M,) of these images of the data set."""
    images = call.dataset.read(list(indices)).to(call.model.device, call.model.dtype)
    with torch.no_grad():
        probabilities = call.model(images).double().softmax(1).cpu()
    labels = call.dataset.labels(list(indices)) or ()
    return probabilities, torch.tensor([call.model.class_index(label) for label in labels])


def _varied(call: _DatasetCall) -> None:
    """Make the call's network confident about some of the images only, and wrong about some."""
    standardize_logits(call.model, call.dataset.images.to(call.model.device, call.model.dtype), 1.5)


_CALIBRATION = r"calibration error|\bece\b"
_OTHER_CALIBRATION = (
    r"maxim|class-?wise|static|root|squared|\brms|\bl2\b|signed|kernel|unweighted|brier|temperature"
    r"|top-?label|marginal|over-?confiden|adaptive"
)


@register_check(
    "method",
    "An expected calibration error is at least |accuracy - mean confidence|, and at most the mean of each "
    "image's |right - confidence|.",
    "the weight of a bin: its share of the images, n_b / M",
    lambda method: (
        _reads_a_model_and_a_data_set(method)
        or (
            None
            if re.search(_CALIBRATION, title_of(method))
            and not re.search(_OTHER_CALIBRATION, text_of(method))
            else "its title names no expected calibration error"
        )
    ),
    exemptible=True,
)
def calibration_error_bounds_the_gap(method: AnyMethod) -> None:
    call = _DatasetCall.start(method, count=9)
    call.case = replace(call.case, double=True)
    call.model = call.case.model()
    _varied(call)
    compared = 0
    for n in range(6):  # each with an image that counts most
        indices = [n] * 12 + [m for m in range(9) if m != n]
        probabilities, labels = _predictions(method, indices, call)
        confidence, predicted = probabilities.max(1)
        right = (predicted == labels).double()
        low, high = float((right - confidence).mean().abs()), float((right - confidence).abs().mean())
        values = {name: float(v) for name, v in _numbers(call(indices)) if v.ndim == 0}
        if not values:
            raise SkipTest("it returned no number")
        compared += 1
        inside = [name for name, value in values.items() if low - 1e-3 <= value <= high + 1e-3]
        assert inside, (
            f"{', '.join(f'{name} is {value:.4f}' for name, value in values.items())}; the accuracy differs "
            f"from the mean confidence by {low:.4f}, and each image's by {high:.4f} on average\n"
            f"on {call.case}, with image {n} twelve times"
        )
    assert compared


_BALANCED = r"balanced accuracy|mean (class|per-class) accuracy|macro[- ]recall"
_KAPPA, _MATTHEWS, _BRIER = r"cohen'?s kappa|\bkappa\b", r"matthews|\bmcc\b", r"brier"
_F1 = r"macro[- ](averaged )?f1|\bf1\b"
_SCORES = "|".join((_BALANCED, _KAPPA, _MATTHEWS, _BRIER, _F1))


def _accuracies(probabilities: Any, labels: Any) -> Mapping[str, Callable[[], list[float]]]:
    from sklearn import metrics

    predicted = probabilities.argmax(1)
    one_hot = (labels[:, None] == range(probabilities.shape[1])).astype(float)
    squares = ((probabilities - one_hot) ** 2).sum(1).mean()
    present = sorted(set(labels.tolist()))
    return {
        _BALANCED: lambda: [
            metrics.balanced_accuracy_score(labels, predicted),
            metrics.balanced_accuracy_score(labels, predicted, adjusted=True),
        ],
        _KAPPA: lambda: [
            metrics.cohen_kappa_score(labels, predicted, weights=w) for w in (None, "linear", "quadratic")
        ],
        _MATTHEWS: lambda: [metrics.matthews_corrcoef(labels, predicted)],
        _F1: lambda: [
            metrics.f1_score(labels, predicted, average=average, labels=chosen, zero_division=0)
            for average in ("macro", "micro", "weighted")
            for chosen in (None, present, list(range(probabilities.shape[1])))
        ],
        _BRIER: lambda: [squares, squares / 2, squares / probabilities.shape[1]],
    }


@register_check(
    "method",
    "A number of predictions that has a common name is that of scikit-learn.",
    "which axis is the true class, the weights of the classes, what chance agrees on",
    lambda method: (
        _reads_a_model_and_a_data_set(method)
        or (
            None
            if re.search(_SCORES, title_of(method)) and not re.search(r"top-?k|per image", text_of(method))
            else "its title names no such number"
        )
    ),
    exemptible=True,
)
def equals_the_score_of_its_name(method: AnyMethod) -> None:
    call = _DatasetCall.start(method, count=24)
    call.case = replace(call.case, double=True)
    call.model = call.case.model()
    _varied(call)
    indices = [*range(24), *range(7), *range(0, 24, 3)]  # classes of different sizes
    probabilities, labels = _predictions(method, indices, call)
    values = {name: float(v) for name, v in _numbers(call(indices)) if v.ndim == 0}
    if not values:
        raise SkipTest("it returned no number")
    for pattern, numbers in _accuracies(probabilities.numpy(), labels.numpy()).items():
        if not re.search(pattern, title_of(method)):
            continue
        expected = numbers()
        assert any(abs(value - number) <= 1e-3 for value in values.values() for number in expected), (
            f"{', '.join(f'{name} is {value:.4f}' for name, value in values.items())}, scikit-learn has "
            f"{expected[0]:.4f}\non {call.case}, with some images twice"
        )
        return


# --- shares ---------------------------------------------------------------------------------------------


@register_check(
    "method",
    "Shapley values of a vote of k neighbors sum to a share of k votes.",
    "the recursion: min(k, i) / i with i from 1",
    lambda method: (
        _reads_a_model_and_a_data_set(method)
        or (
            None
            if "shapley" in title_of(method) and re.search(r"neighbou?r|k-?nn|\bknn\b", text_of(method))
            else "its text names no Shapley values of neighbors"
        )
    ),
    exemptible=True,
)
def shapley_values_of_neighbors_sum_to_a_share(method: AnyMethod) -> None:
    name = next((n for n in method.spec.params.model_fields if same_meaning(n, ("k",))), None)
    if name is None:
        raise SkipTest("it has no parameter for the number of neighbors")
    call = _DatasetCall.start(method, count=11)
    arguments = Case().arguments(method)
    votes = largest_accepted(method, arguments, name, 3)
    call.case = replace(call.case, double=True, params={name: votes})
    call.model = call.case.model()
    result = call(range(11))
    compared = 0
    for field, value in result.fields():
        if (
            not isinstance(value, Tensor)
            or value.ndim != 2
            or value.shape[1] != 11
            or not value.is_floating_point()
        ):
            continue
        compared += 1
        sums = value.double().sum(1) * votes
        error = float((sums - sums.round()).abs().max())
        assert error < 1e-3 and float(sums.min()) > -1e-3 and float(sums.max()) < votes + 1e-3, (
            f"{field} of an image sums to {[round(v, 4) for v in (sums / votes).tolist()]}, no share of "
            f"{votes} votes\non {call.case}"
        )
    if not compared:
        raise SkipTest("it returned no values of the images of a data set")


# --- certificates ----------------------------------------------------------------------------------------

#: Votes of a class, of which the bound is not near 1/2.
_VOTES = 60
_CERTIFIED = r"randomi[sz]ed smoothing|clopper|smoothed classifier"


@register_check(
    "method",
    "Of n equal votes, randomized smoothing certifies the radius sigma Phi^-1(alpha^(1/n)).",
    "the one-sided bound at level alpha: beta.ppf(alpha, k, n - k + 1), not alpha / 2",
    lambda method: (
        None
        if re.search(_CERTIFIED, text_of(method))
        and re.search(r"certif", text_of(method))
        and method.seed is not None
        and not re.search(r"hoeffding|laplace|two-?sided|bonferroni|l1\b|second[- ]largest", text_of(method))
        else "it certifies no radius by Gaussian noise"
    ),
    exemptible=True,
)
def radii_of_equal_votes_have_the_closed_form(method: AnyMethod) -> None:
    arguments = Case().arguments(method)
    properties = properties_of(method.spec.params_schema)
    votes = {
        name: largest_accepted(method, arguments, name, _VOTES)
        for name, schema in properties.items()
        if schema.get("type") == "integer" and name != method.seed and not re.search("batch|class", name)
    }
    params = method.validate(arguments | votes)
    levels, errors = (
        [value for name, value in params.items() if re.search(words, name) and isinstance(value, float)]
        for words in (r"sigma|noise|std", r"alpha|error|failure")
    )
    counts = [v for n, v in params.items() if type(v) is int and n != method.seed and v > 1]
    if not levels or not errors or not counts:
        raise SkipTest("it has no noise level, error probability and number of votes")
    sigma, alpha = levels[0], errors[0]
    bias = torch.tensor([0.0, 5.0, 1.0])
    model = linear_model(torch.zeros(3, 3, 8, 8), bias=bias)
    if (result := result_of(method, Case(pictures="noise", size=(8, 8), params=votes), model)) is None:
        raise SkipTest("it refused a network that ignores its image")
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = [sigma * float(normal.icdf(torch.tensor(alpha ** (1 / n)))) for n in counts]
    values = {n: v for n, v in _numbers(result) if v.ndim == 1 and v.numel() and re.search(r"radi", n)}
    if not values or all(e <= 0 for e in expected):
        raise SkipTest("it returned no radii, or abstains")
    for name, value in values.items():
        assert any(float((value - max(e, 0)).abs().max()) < 2e-3 * sigma + 1e-4 for e in expected), (
            f"{name} is {value.tolist()[:3]} for a network with the same class everywhere; with "
            f"sigma={sigma:g}, alpha={alpha:g} and {counts} votes it is {[round(e, 4) for e in expected]}"
        )
