"""The role ``labels``: one class per image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor

from ..errors import InputError, PhospheneError
from ..models.batch_size import batch_size
from ..spec.spec import Role
from .base import InputContext, InputRole, SampleRequest, check_dense

#: Class indices: int64 (N,). Left out of ``run``, the classes that the model predicts.
Labels: TypeAlias = Annotated[Tensor, Role("labels")]


class LabelsRole(InputRole):
    """Classes by name or index; default: the predicted ones."""

    name, value_type, per_image = "labels", Tensor, True
    metavar = "TEXT,..."
    description = "class index of each image, (N,)"
    help = "class of each image, by name or number (default: the predicted class)"

    def read(self, value: Any, context: InputContext) -> Any:
        if value is not None or context.model is None:
            return value
        model, images = context.model, context.inputs["images"]
        with model.guard(), torch.no_grad():
            return torch.cat([model(some).argmax(1) for some in images.split(batch_size(model))])

    def check(self, value: Any, context: InputContext) -> Tensor:
        if isinstance(value, Tensor):
            check_dense(value, "labels")
        items = value.tolist() if isinstance(value, Tensor) else value
        items = [items] if isinstance(items, (int, str)) else items
        model = context.model
        if model is None or not isinstance(items, Sequence) or not items:
            raise InputError(
                f"labels must be classes of a model, one per image, not a {type(value).__name__}"
            )
        indices = [model.class_index(item) for item in items]
        context.need_one_each(indices, "label")
        return torch.tensor(indices, device=model.device)

    def parse_option(self, texts: Sequence[str]) -> list[str]:
        return [label.strip() for text in texts for label in text.split(",")]

    def sample(self, request: SampleRequest) -> Tensor:
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


LABELS = LabelsRole()
