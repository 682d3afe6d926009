"""The role ``labels``: one class per image, or an objective that an attack changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor

from ..errors import InputError, ModelError, PhospheneError, type_name
from ..models import Model
from ..models.batch_size import batch_size
from ..models.tasks import EXCLUSIVE, no_classes
from ..spec.spec import Role
from ..targets.objectives import Class, Layer, Objective
from ..targets.parse import parse_target
from .base import InputContext, InputRole, SampleRequest, check_dense
from .concepts import is_concept, read_concept

#: Class indices: int64 (N,). Left out of ``run``, the classes that the model predicts. Of a method on single
#: images, callers may pass an objective instead ("region:person"): the method receives the model as a binary
#: classifier of whether it holds, and the label 1 (``phosphene.targets.ObjectiveClassifier``).
Labels: TypeAlias = Annotated[Tensor, Role("labels")]


class LabelsRole(InputRole):
    """Classes by name or index, or an objective; default: the predicted classes."""

    name, value_type, per_image = "labels", Tensor, True
    metavar = "TEXT,..."
    description = "class index of each image, (N,); or an objective: 'region:person', 'box:person'"
    help = "class of each image, by name or number, or an objective: region:person (default: predicted)"

    def read(self, value: Any, context: InputContext) -> Any:
        if is_concept(value):
            return read_concept(value, context)
        if value is not None or context.model is None:
            return value
        model, images = context.model, context.inputs["images"]
        if model.task not in EXCLUSIVE:
            return parse_target(None, model)
        with model.guard(), torch.no_grad():
            return torch.cat([model(some).argmax(1) for some in images.split(batch_size(model))])

    def check(self, value: Any, context: InputContext) -> Tensor | Objective:
        if isinstance(value, Tensor):
            check_dense(value, "labels")
        model = context.model
        if model is None:
            raise InputError("labels need a model: declare the model before them")
        if _is_objective(value):
            return _parse_objective(value, model)
        items = value.tolist() if isinstance(value, Tensor) else value
        items = [items] if isinstance(items, (int, str)) else items
        if not isinstance(items, Sequence) or not items:
            raise InputError(f"labels must be classes of a model, one per image, not {type_name(value)}")
        indices = [
            model.class_index(item.strip().removeprefix("class:") if isinstance(item, str) else item)
            for item in items
        ]
        context.need_one_each(indices, "label")
        if model.task == "multilabel":
            return Class(tuple(indices))
        if model.task not in EXCLUSIVE:
            raise ModelError(no_classes(model.name, model.task, ()))
        return torch.tensor(indices, device=model.device)

    def select(self, value: Tensor | Objective, rows: range) -> Tensor | Objective:
        return value.select(rows) if isinstance(value, Objective) else super().select(value, rows)

    def record(self, value: Any) -> Any:
        return value.to_json() if isinstance(value, Objective) else super().record(value)

    def is_identified(self, value: Any) -> bool:
        return value.is_identified if isinstance(value, Objective) else super().is_identified(value)

    def parse_option(self, texts: Sequence[str]) -> list[str]:
        if any(_is_objective(text) for text in texts):
            return list(texts)  # their commas separate two classes, or x and y
        return [label.strip() for text in texts for label in text.split(",")]

    def sample(self, request: SampleRequest) -> Tensor | Objective:
        if request.model.task not in EXCLUSIVE:
            return parse_target(None, request.model)
        # The predicted class for the first image and another for the next: an attack that stops where the
        # label is already wrong has work to do on one of them, targeted or not.
        labels = torch.arange(request.count)
        with suppress(PhospheneError):  # a size that the model does not take: the method has to refuse it
            labels = labels + self.make(None, request).cpu()
        return labels % min(request.classes, request.model.class_count)

    def bad_values(self, good: Tensor, context: InputContext) -> Iterator[tuple[str, Any]]:
        yield "too few labels", good[:-1]
        yield "labels that are fractions", good.float()
        yield "labels of two axes", good[:, None]
        yield "a label that no class has", torch.full_like(good, 99)
        yield "a negative label", torch.full_like(good, -1)
        yield "nothing", None


def _is_objective(value: Any) -> bool:
    """Whether a value is an objective or the text of one, not of a class."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        return value.partition(":")[0] in ("region", "box", "similar", "contrast")
    return isinstance(value, Objective)


def _parse_objective(value: Any, model: Model) -> Objective:
    value = value[0] if isinstance(value, (list, tuple)) else value
    if isinstance(value, Layer) and getattr(value, "threshold", None) is None:
        raise InputError(f"labels are classes or an objective with a criterion of success, not {value}")
    return parse_target(value, model).unresolved()


LABELS = LabelsRole()
