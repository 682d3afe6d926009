"""The role ``other_model``: a second model that a method compares with the first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, TypeAlias

import torch

from ..models import Model as _Model
from ..spec.spec import Role
from .base import AS_OBJECT, InputContext, InputRole, SampleRequest
from .model import MODEL

#: A second model; None where the method compares the first one with itself.
OtherModel: TypeAlias = Annotated[_Model | None, Role("other_model")]


class OtherModelRole(InputRole):
    """A second model, by default none; its record holds the digest of its weights."""

    name, value_type = "other_model", _Model
    metavar = "URI"
    description = "a second ``Model``, as ``load_model`` returns it"
    help = "second model as scheme:name, such as timm:resnet18"

    def make(self, value: Any, context: InputContext) -> _Model | None:
        return None if value is None else super().make(value, context)

    def read(self, value: Any, context: InputContext) -> _Model:
        return MODEL.read(value, context)

    def check(self, value: Any, context: InputContext) -> _Model | None:
        return None if value is None else MODEL.check(value, context)

    def record(self, value: Any) -> Any:
        if value is None:
            return None
        return value.source or f"the model {value.name} {AS_OBJECT}"

    def fingerprint(self, value: Any) -> Any:
        return None if value is None else [self.record(value), value.digest]

    def sample(self, request: SampleRequest) -> _Model | None:
        """A copy whose weights are each scaled by another factor between 1/2 and 3/2."""
        if not request.required:
            return None
        other = request.model.copy()
        with torch.no_grad():
            for number, weight in enumerate(other.module.parameters()):
                steps = torch.arange(weight.numel()).view(weight.shape)
                weight.mul_((1 + 0.5 * (1 + number + steps).double().sin()).to(weight))
        return other

    def bad_values(self, good: Any, context: InputContext) -> Iterator[tuple[str, Any]]:
        yield "a name", "resnet18"


OTHER_MODEL = OtherModelRole()
