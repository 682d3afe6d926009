"""``RepresenterInfluence``: training images as terms of a sum that is the class's score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ._influence_result import TrainingInfluence


@dataclass(frozen=True, eq=False, kw_only=True)
class RepresenterInfluence(TrainingInfluence):
    """``TrainingInfluence`` whose ``values`` (N, M) sum to the ``scores`` (N) of a fitted linear layer.

    ``model_scores`` (N): the logits of the same classes by the model's own layer. ``agreement``: the share of
    the training images for which both layers predict the same class.
    """

    shapes: ClassVar[Mapping[str, str]] = {**TrainingInfluence.shapes, "scores": "N", "model_scores": "N"}

    scores: Tensor
    model_scores: Tensor
    agreement: float

    def lines(self) -> list[str]:
        head, *rest = super().lines()
        return [f"{head}, fitted layer agrees for {self.agreement:.1%}", *rest]
