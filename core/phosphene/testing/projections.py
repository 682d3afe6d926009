"""Random projections of a result's numbers: whether two runs in different processes have equal results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .observation import tensors_in

#: Projections of each tensor.
COUNT = 4
#: Results whose projections differ by no more than this fraction of the tensor's norm are equal.
TOLERANCE = 1e-3

#: Path, shape, norm and projections of each tensor of a result.
Projections = list[tuple[str, list[int], float, list[float]]]


def projections(result: Any) -> Projections:
    """Projections of all tensors of a result onto ``COUNT`` random directions, the same in every process.

    The projections of two tensors differ by about the norm of their difference.
    """
    rows = []
    for path, tensor in tensors_in(result):
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        values = values.detach().cpu().double().flatten().nan_to_num(nan=1e6, posinf=1e9, neginf=-1e9)
        directions = _directions(len(values))
        rows.append((path, list(tensor.shape), float(values.norm()), (directions @ values).tolist()))
    return rows


def _directions(length: int) -> Tensor:
    return torch.randn(COUNT, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def differ(one: Projections, other: Projections) -> bool:
    """Whether a tensor that both results have differs, by its projections."""
    others = {path: rest for path, *rest in other}
    return any(_tensors_differ(rest, others[path]) for path, *rest in one if path in others)


def _tensors_differ(one: Sequence[Any], other: Sequence[Any]) -> bool:
    (shape, norm, first), (other_shape, other_norm, second) = one, other
    if list(shape) != list(other_shape):
        return True
    allowed = TOLERANCE * max(norm, other_norm)
    return max(abs(a - b) for a, b in zip(first, second, strict=True)) > allowed
