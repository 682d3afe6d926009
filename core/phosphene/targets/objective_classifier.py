"""A model with an objective as a binary classifier, which attacks on classes can attack."""

from __future__ import annotations

import copy

from torch import Tensor

from ..models import Model
from ..models.introspection import Structure
from ..models.tasks import binary_logits
from .objectives import Objective


class ObjectiveClassifier(Model):
    """A model's view with two classes: that an objective does not hold, and that it does.

    Its logits are (-m/2, m/2), with m the objective's margin, so that class 1 is predicted where m > 0. The
    objective refers to one image, of which all rows are variants.
    """

    objective: Objective
    viewed: Model

    @classmethod
    def view(cls, model: Model, objective: Objective, image: Tensor) -> ObjectiveClassifier:
        """The classifier of ``objective`` for one image (1, C, H, W), where its reference is fixed."""
        view = copy.copy(model)
        view.__class__ = cls
        assert isinstance(view, ObjectiveClassifier)
        view.viewed, view.objective = model, objective.resolve(model, image)
        view.task, view.source = "binary", None
        (name,) = view.objective.names(model, 1)
        view.classes = (f"not {name}", name)
        return view

    def outputs(self, images: Tensor) -> Tensor:
        rows = self.objective.select([0] * len(images))
        return binary_logits(rows.margin(self.viewed, images), self.name)

    def structure_at(self, input_size: tuple[int, int, int]) -> Structure:
        return self.viewed.structure_at(input_size)

    def at_size(self, input_size: tuple[int, int, int]) -> Model:
        view = copy.copy(self)
        view.viewed = self.viewed.at_size(input_size)
        view.input_size = input_size
        return view
