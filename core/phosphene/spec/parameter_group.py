"""``ParameterGroup``: parameters that several methods share, declared once and flattened into each schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic.fields import FieldInfo

from .base import FrozenModel


class ParameterGroup(FrozenModel):
    """Parameters that several methods share. Subclass it with annotated fields.

    A keyword-only parameter of a method that is annotated with a subclass is a group: callers, the command
    line and the JSON schema see its fields as parameters of the method, and the function receives one
    instance. The group's default may change the fields' defaults::

        class Regularizers(ParameterGroup):
            l2: Annotated[float, Field(ge=0, description="weight of the squared norm")] = 0.0

        def example(model: Model, *, regularizers: Regularizers = Regularizers(l2=0.1)) -> Synthesis: ...

        example(model, l2=0.2)
    """

    def parameters(self) -> dict[str, tuple[Any, Any]]:
        """Annotation and field of every parameter, for ``pydantic.create_model``."""
        fields = type(self).model_fields.items()
        return {
            name: (field.annotation, FieldInfo.merge_field_infos(field, default=getattr(self, name)))
            for name, field in fields
        }

    @classmethod
    def collect(cls, params: dict[str, Any]) -> Self:
        """An instance of the fields in ``params``, which are removed from it."""
        # Validated already, with the method's other parameters.
        return cls.model_construct(**{name: params.pop(name) for name in cls.model_fields})


def gather(params: Mapping[str, Any], groups: Mapping[str, type[ParameterGroup]]) -> dict[str, Any]:
    """The arguments of a method's function: parameters, with the fields of each group as one argument."""
    gathered = dict(params)
    return gathered | {name: group.collect(gathered) for name, group in groups.items()}
