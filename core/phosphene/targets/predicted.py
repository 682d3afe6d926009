"""``Predicted``: what the model predicts for each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from .boxes import Box
from .objectives import Class, Objective, check_logits, class_values

if TYPE_CHECKING:
    from ..models import Model


class Predicted(Objective):
    """The logit of the class that the model predicts for each image; of a detector its best box.

    The classes are fixed at the first call of ``score``, for the images themselves, and used for perturbed
    images in later calls, which may be predicted otherwise.
    """

    _resolved: Objective | None = None

    def score(self, values: Tensor) -> Tensor:
        self._resolved = self._resolved or Class(tuple(check_logits(values).argmax(dim=1).tolist()))
        return self._resolved.score(values)

    def evaluate(self, model: Model, images: Tensor) -> Tensor:
        if self._resolved is None and model.task == "detection":
            self._resolved = Box()
        if self._resolved is not None:
            return self._resolved.evaluate(model, images)
        values = class_values(model, images)
        if model.task == "regression" and values.shape[1] > 1:
            raise InputError(
                f"{model.name} is a regression with {values.shape[1]} outputs, none of which is predicted: "
                "name one, target=0"
            )
        return self.score(values)

    def margin(self, model: Model, images: Tensor) -> Tensor:
        return self.resolve(model, images).margin(model, images)

    def resolve(self, model: Model, images: Tensor) -> Objective:
        if self._resolved is None:
            with torch.no_grad():
                self.evaluate(model, images)
        return self._resolved or self

    def to_json(self) -> Any:
        return None

    def select(self, rows: Sequence[int]) -> Objective:
        return self._resolved.select(rows) if self._resolved else Predicted()

    def names(self, model: Model, count: int) -> tuple[str, ...]:
        return self._resolved.names(model, count) if self._resolved else super().names(model, count)

    def __str__(self) -> str:
        return "the predicted class"
