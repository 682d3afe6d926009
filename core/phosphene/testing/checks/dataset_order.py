"""Check of the order of a data set: its images in another order have the same results, in that order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import combinations
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
from torch import Tensor

from ...data.datasets import TensorDataset
from ...errors import PhospheneError
from ...results import TrainedNetwork
from ..cases import Case
from ..observation import tensors_in
from .base import register_check
from .relations import draws_random_numbers
from .work import USUAL_NETWORKS

if TYPE_CHECKING:
    from .base import AnyMethod

#: Images of the data set: another number than that of classes, of images or of channels of the networks.
COUNT = 11
#: Another order of them, in which also the classes appear in another order.
ORDER = (4, 8, 1, 6, 10, 3, 0, 9, 2, 7, 5)
#: The largest difference of sums that were added in another order, as a fraction of the largest value, and
#: that of values that cancel, such as the distance of a set to itself.
TOLERANCE, ROUNDING = 1e-4, 1e-7


def _reads_a_data_set(method: AnyMethod) -> str | None:
    if issubclass(method.result, TrainedNetwork):
        return "it trains a network, on images in the order of the data set"
    if not any(declared.role == "dataset" for declared in method.spec.inputs):
        return "it takes no data set"
    if any(getattr(relation, "change", None) == "dataset_order" for relation in method.spec.relations):
        return "it declares InvariantTo('dataset_order') itself, which is tested exactly"
    return None


@register_check(
    "method",
    "The images of a data set in another order, with their classes, have the same results in that order.",
    "classes coded by their first appearance; rows in another order than the images; a first image or class "
    "that is read as special",
    _reads_a_data_set,
    exemptible=True,
)
def independent_of_the_dataset_order(method: AnyMethod) -> None:
    tested = 0
    for network in USUAL_NETWORKS:
        case = Case(network, "noise", dataset=COUNT, double=True)
        model = case.model()
        inputs, params = case.inputs(method, model), case.arguments(method)
        try:
            before = method(**inputs, **params)
        except PhospheneError:
            continue
        for declared in method.spec.inputs:
            dataset = inputs[declared.name]
            if declared.role != "dataset" or not isinstance(dataset, TensorDataset):
                continue
            tested += 1
            after = method(**inputs | {declared.name: _in_order(dataset)}, **params)
            try:
                _assert_same_in_order(declared.name, before, after)
            except AssertionError:
                if draws_random_numbers(method, model, inputs, params, before):
                    raise SkipTest("it draws random numbers, which do not follow the images") from None
                raise
        break
    if not tested:
        raise SkipTest("it refused the networks")


def _in_order(dataset: TensorDataset) -> TensorDataset:
    """The data set with the images in ``ORDER``."""

    def rows(values: Any) -> Any:
        if values is None or isinstance(values, Tensor):
            return None if values is None else values[list(ORDER)]
        return [values[n] for n in ORDER]

    fields = {f.name: rows(getattr(dataset, f.name)) for f in dataclasses.fields(dataset) if f.init}
    return dataclasses.replace(dataset, **fields)


def _assert_same_in_order(name: str, before: Any, after: Any) -> None:
    others = dict(tensors_in(after))
    for path, values in tensors_in(before):
        other = others.get(path)
        assert other is not None, f"{path} is missing for {name} in another order"
        assert values.shape == other.shape, (
            f"{path} has the shape {tuple(other.shape)} for {name} in another order, "
            f"not {tuple(values.shape)}"
        )
        assert any(_same_values(expected, other) for expected in _expected(values)), (
            f"{path} for the images of {name} in another order differs from {path} in that order by "
            f"{min(_difference(expected, other) for expected in _expected(values)):.2g} of its largest value"
        )


def _expected(values: Tensor) -> Iterator[Tensor]:
    """The values with the rows of images in the other order, for each choice of axes of that length."""
    axes = [axis for axis, size in enumerate(values.shape) if size == COUNT]
    for count in range(len(axes) + 1):
        for chosen in combinations(axes, count):
            expected = values
            for axis in chosen:
                expected = expected.index_select(axis, torch.tensor(ORDER, device=values.device))
            yield expected


def _same_values(expected: Tensor, actual: Tensor) -> bool:
    """Whether values are equal up to rounding, up to the order of classes, and indices or codes renamed."""
    if not expected.is_floating_point():
        pairs = set(zip(expected.flatten().tolist(), actual.flatten().tolist(), strict=True))
        if len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs}):
            return True
    if _difference(expected, actual) <= TOLERANCE:
        return True
    # Rows or columns of classes may be in another order, those of images may not.
    rows = [t.flatten(1) if t.ndim > 1 and len(t) == COUNT else t.flatten()[None] for t in (expected, actual)]
    if len(rows[0]) != COUNT and COUNT in expected.shape:
        return False
    return _difference(*(t.sort(1).values for t in rows)) <= TOLERANCE


def _difference(expected: Tensor, actual: Tensor) -> float:
    """The largest difference, as a fraction of the largest value; 0 up to ``ROUNDING``."""
    one, other = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (expected, actual))
    if not torch.equal(expected.isfinite(), actual.isfinite()):
        return torch.inf
    difference = float((one - other).abs().max()) if one.numel() else 0.0
    return 0.0 if difference <= ROUNDING else difference / max(float(one.abs().max()), ROUNDING)
