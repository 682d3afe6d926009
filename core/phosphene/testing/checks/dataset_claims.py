"""Checks of what the text of a method over a data set claims: neighbors, ties, means, deviations, counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
from torch import Tensor

from ...data.datasets import TensorDataset
from ...results import TrainedNetwork
from ..cases import Case
from .base import register_check, result_of
from .relations import prose_of
from .work import accepted_case

if TYPE_CHECKING:
    from ...models import Model
    from .base import AnyMethod


def _reads_images_of_a_data_set(method: AnyMethod) -> str | None:
    if issubclass(method.result, TrainedNetwork):
        return "it trains a network"
    names = [declared.name for declared in method.spec.inputs if declared.role == "dataset"]
    return None if names else "it takes no data set"


def _claims(method: AnyMethod, pattern: str, otherwise: str) -> str | None:
    return _reads_images_of_a_data_set(method) or (
        None if re.search(pattern, prose_of(method)) else otherwise
    )


@dataclass
class _DatasetCall:
    """A case whose data set is replaced: images of noise, each with a class."""

    method: AnyMethod
    case: Case
    model: Model
    dataset: TensorDataset

    @classmethod
    def start(cls, method: AnyMethod, count: int = 9) -> _DatasetCall:
        """On the first network that the method accepts. Raises SkipTest where it accepts none."""
        case = accepted_case(method, Case(pictures="noise", dataset=count))
        if case is None:
            raise SkipTest("it refused each network")
        model = case.model()
        dataset = case.inputs(method, model)[_dataset_name(method)]
        if not isinstance(dataset, TensorDataset):
            raise SkipTest("the data set is not in memory")
        return cls(method, case, model, dataset)

    def __call__(self, indices: Sequence[int], classes: Sequence[str] | None = None, **changed: Any) -> Any:
        """The result for these images of the data set. Raises SkipTest where the method refuses them."""
        if (result := self.attempt(indices, classes, **changed)) is None:
            raise SkipTest("it refused the case")
        return result

    def attempt(self, indices: Sequence[int], classes: Sequence[str] | None = None, **changed: Any) -> Any:
        """The result for these images of the data set; None where the method refuses them."""
        part = TensorDataset(
            self.dataset.read(indices),
            classes=classes if classes is not None else self.dataset.labels(indices),
            objects=self.dataset.masks(indices),
        )
        return result_of(self.method, self.case, self.model, **{_dataset_name(self.method): part}, **changed)


def _dataset_name(method: AnyMethod) -> str:
    return next(declared.name for declared in method.spec.inputs if declared.role == "dataset")


def _classes(dataset: TensorDataset) -> list[str]:
    classes = sorted({*(dataset.labels(range(len(dataset))) or ())})[:3]
    if len(classes) < 2:
        raise SkipTest("the data set has fewer than two classes")
    return classes


def _tensor(result: Any, name: str) -> Tensor | None:
    value = dict(result.fields()).get(name)
    return value if isinstance(value, Tensor) else None


@register_check(
    "method",
    "An image of the data set is not its own neighbor where the text says that it is left out.",
    "leave out the images that are equal to the query",
    lambda method: _claims(
        method,
        r"\bother images\b|(is|are) left out|without itself|not its own neighbou?r|x != q",
        "its text does not say that an image is left out",
    ),
    exemptible=True,
)
def leaves_the_image_out_as_documented(method: AnyMethod) -> None:
    if (name := next((i.name for i in method.spec.inputs if i.role == "images"), None)) is None:
        raise SkipTest("it takes no images")
    call = _DatasetCall.start(method)
    count = len(call.dataset)
    result = call(
        range(count), None, **{name: call.dataset.read([2, 5]).to(call.model.device, call.model.dtype)}
    )
    distances = _tensor(result, "distances")
    if distances is None or not distances.numel():
        raise SkipTest("it returned no distances")
    least, mean = float(distances.min()), float(distances.mean())
    assert least > 1e-5 * mean, f"the least distance of an image of the data set is {least:.3g}"


@register_check(
    "method",
    "As many images are listed where several have the same value.",
    "which of the images with the value of the last one are counted: >= lists too many, > too few",
    lambda method: _reads_images_of_a_data_set(method),
    exemptible=True,
)
def lists_as_many_images_with_ties(method: AnyMethod) -> None:
    call = _DatasetCall.start(method, count=8)
    if (indices := _tensor(call(range(8)), "indices")) is None:
        raise SkipTest("it lists no images")
    for n in range(4):
        repeated = call.attempt([n] * 5 + [4, 5, 6])
        other = None if repeated is None else _tensor(repeated, "indices")
        shapes = [tuple(value.shape) for value in (indices, other) if value is not None]
        assert shapes[0] == shapes[-1], (
            f"indices has the shape {shapes[0]}, and {shapes[-1]} where five images are equal"
        )


@register_check(
    "method",
    "The mean of a class does not depend on the images of other classes.",
    "divide the sum of a class by the number of its images, not by that of all images",
    lambda method: _claims(
        method,
        r"(mean|average|centroid|prototype|centre|center)s?\b[^.]*\b(each|every|a|the|its|per) class\b",
        "its text names no mean of a class",
    ),
    exemptible=True,
)
def means_of_classes_are_separate(method: AnyMethod) -> None:
    call = _DatasetCall.start(method)
    classes = _classes(call.dataset)
    labels = [classes[n % len(classes)] for n in range(9)]
    more = [*range(9), *(n for n in range(9) if n % len(classes) == 0)]  # the first class twice
    usual, repeated = call(range(9), labels), call(more, [labels[n] for n in more])
    compared = 0
    for name, value in usual.fields():
        other = _tensor(repeated, name)
        is_mean = isinstance(value, Tensor) and re.search("mean|centroid|prototype|cent(er|re)", name)
        if not is_mean or other is None or value.ndim < 2 or value.shape != other.shape:
            continue
        if len(value) == len(classes):
            compared += 1
            change = float((other[1:] - value[1:]).norm() / value[1:].norm().clamp(min=1e-12))
            assert change < 1e-3, (
                f"{name} of other classes change by {change:.1%} with more images of one class"
            )
    if not compared:
        raise SkipTest("it returned no means of classes")


@register_check(
    "method",
    "A standard deviation over images and positions is that of the layer's maps.",
    "the number that the sum of squares is divided by, and the axes of the sum",
    lambda method: _claims(
        method,
        r"(\bstd\b|standard deviation|spread|variance)[^=]*images and (all )?positions"
        r"|images times (the )?positions",
        "its text names no standard deviation over images and positions",
    ),
    exemptible=True,
)
def deviations_are_those_of_the_maps(method: AnyMethod) -> None:
    call = _DatasetCall.start(method)
    if not method.layers:
        raise SkipTest("it takes no layer")
    layer, name = call.model.last_map, method.layers[0]
    call.case = replace(call.case, params={name: layer})
    result = call(range(len(call.dataset)))
    deviation = _tensor(result, "std")
    if deviation is None or deviation.ndim != 1:
        raise SkipTest("it returned no standard deviation of channels")
    images = call.dataset.images.to(call.model.device, call.model.dtype)
    with torch.no_grad():
        maps = call.model.maps(call.model.features(images, layer), images, layer).double()
    expected = maps.std((0, 2, 3), correction=0)
    if len(expected) != len(deviation):
        raise SkipTest("it returned no standard deviation of channels")
    difference = float((deviation.double() - expected).norm() / expected.norm().clamp(min=1e-12))
    assert difference < 0.05, (
        f"std differs by {difference:.1%} from the standard deviation of {layer!r} over images and positions"
    )


@register_check(
    "method",
    "The rows of a table of true classes by predictions sum to the number of images of each class.",
    "which of the two classes is the row: counts[true, predicted] += 1",
    lambda method: _claims(
        method,
        r"row sums? (is|are) [^.]*true class|rows?[^.]{0,20} true class"
        r"|of the true class \w+ that are predicted",
        "its text names no rows of true classes",
    ),
    exemptible=True,
)
def rows_are_true_classes_as_documented(method: AnyMethod) -> None:
    call = _DatasetCall.start(method)
    first, second, *_ = _classes(call.dataset)
    # Unequal numbers of images, so that no other table has the same sums.
    labels = [first] * 6 + [second] * 3
    result = call(range(9), labels)
    true = torch.tensor([call.model.class_index(label) for label in labels])
    for name, table in result.fields():
        is_table = isinstance(table, Tensor) and table.ndim == 2 and torch.equal(table, table.round())
        if is_table and table.shape[0] == table.shape[1] == call.model.class_count:
            rows, expected = table.sum(1).long().tolist(), true.bincount(minlength=len(table)).tolist()
            assert rows == expected, f"the rows of {name} sum to {rows}, the classes have {expected} images"
            return
    raise SkipTest("it returned no table of counts")
