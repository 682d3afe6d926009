"""A model with an objective as a binary classifier, which attacks on classes can attack."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from torch import Tensor

from ..errors import InputError
from ..models import Model
from ..models.introspection import Structure
from ..models.output_activation import OutputActivation
from ..models.tasks import binary_logits
from .objectives import AbsentObjective, Objective


class ObjectiveClassifier(Model):
    """A model's view with two classes: that an objective does not hold, and that it does.

    Its logits are (-m/2, m/2), with m the objective's margin, so that class 1 is predicted where m > 0. The
    objective refers to one image, of which all rows are variants. A view of several images cannot run;
    ``for_rows`` returns those of single ones, so that methods on many images run each of them by itself.
    """

    viewed: Model
    #: The objective that was declared for all images.
    declared: Objective
    #: The objective of each image; None where it is absent (no such box or region), so that m = -1.
    objectives: tuple[Objective | None, ...]
    #: The images (N, C, H, W) that the objectives refer to.
    images: Tensor

    @classmethod
    def view(cls, model: Model, objective: Objective, image: Tensor) -> ObjectiveClassifier:
        """The classifier of ``objective`` for one image (1, C, H, W), where its reference is fixed.

        Raises AbsentObjective where the image does not show the object.
        """
        resolved = objective.resolve(model, image)
        return cls._create(model, objective, (resolved,), image)

    @classmethod
    def of_images(cls, model: Model, objective: Objective, images: Tensor) -> ObjectiveClassifier:
        """The classifier of ``objective`` for each of the images (N, C, H, W), fixed by the image itself.

        In an image that does not show the object, the objective does not hold.
        """
        objective = objective.unresolved()
        objectives: list[Objective | None] = []
        for row in range(len(images)):
            try:
                objectives.append(objective.select([row]).unresolved().resolve(model, images[row : row + 1]))
            except AbsentObjective:
                objectives.append(None)
        return cls._create(model, objective, tuple(objectives), images)

    @classmethod
    def _create(
        cls, model: Model, declared: Objective, objectives: tuple[Objective | None, ...], images: Tensor
    ) -> ObjectiveClassifier:
        view = copy.copy(model)
        view.__class__ = cls
        assert isinstance(view, ObjectiveClassifier)
        view.viewed, view.declared, view.objectives, view.images = model, declared, objectives, images
        view.task, view.source = "binary", None
        names = {own.names(model, 1)[0] for own in objectives if own is not None}
        name = names.pop() if len(names) == 1 else str(declared)
        view.classes = (f"not {name}", name)
        return view

    @property
    def row_by_row(self) -> bool:
        return len(self.objectives) > 1

    def for_rows(self, rows: Sequence[int] | Tensor) -> ObjectiveClassifier:
        rows = [int(row) for row in rows]
        objectives = tuple(self.objectives[row] for row in rows)
        return self._create(self.viewed, self.declared.select(rows), objectives, self.images[rows])

    def of_model(self, model: Model) -> ObjectiveClassifier:
        """The classifier of the same objective and images by another model with the same classes."""
        return self.of_images(model, self.declared.for_model(model), self.images)

    def outputs(self, images: Tensor) -> Tensor:
        if self.row_by_row:
            raise InputError(
                f"an objective is evaluated image by image: for_rows selects one of {len(self.objectives)}"
            )
        (objective,) = self.objectives
        if objective is None:  # on the graph, with a gradient of zero
            margin = 0.0 * images.flatten(1).sum(1) - 1
        else:
            margin = objective.select([0] * len(images)).margin(self.viewed, images)
        return binary_logits(margin, self.name)

    def output_activation(self, outputs: Tensor, images: Tensor) -> OutputActivation:
        return ""  # a margin is no probability

    def defended(self, transform: Callable[[Tensor], Tensor], name: str) -> Model:
        view = copy.copy(self)
        view.viewed = self.viewed.defended(transform, name)
        view.defenses, view.name, view._cache = view.viewed.defenses, view.viewed.name, view.viewed._cache
        return view

    def structure_at(self, input_size: tuple[int, int, int]) -> Structure:
        return self.viewed.structure_at(input_size)

    def at_size(self, input_size: tuple[int, int, int]) -> Model:
        view = copy.copy(self)
        view.viewed = self.viewed.at_size(input_size)
        view.input_size = input_size
        return view
