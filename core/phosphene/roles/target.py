"""The role ``target``: the scalar of each image that is explained or optimized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, TypeAlias

from ..errors import InputError
from ..spec.spec import Role
from ..targets.objectives import Objective
from ..targets.parse import parse_target
from .base import InputContext, InputRole, SampleRequest
from .concepts import is_concept, read_concept

#: One scalar per image. Callers pass a class, a unit ("layer4[17]"), a callable or None (the predicted
#: class); the method receives an ``Objective``.
Target: TypeAlias = Annotated[Any, Role("target")]


class TargetRole(InputRole):
    """A class, a unit or a callable; default: the predicted class, without images the first five classes."""

    name, value_type = "target", Objective
    metavar = "TEXT"
    description = (
        "class, unit of a layer, callable or ``Objective``; None: the predicted class, of a method without "
        "images the first five classes"
    )
    help = (
        "class (repeated: one for each image), unit: layer4[17], or concept: concept:folder#name "
        "(default: the predicted class, without images the first five classes)"
    )

    def read(self, value: Any, context: InputContext) -> Any:
        # Without images there is no predicted class: the first five classes.
        if value is None and context.model is not None and "images" not in context.inputs:
            model = context.model
            if model.class_count == 0 or model.task in ("segmentation", "embedding"):
                raise InputError(f"{model.name} has no classes: name a layer's unit, target='layer[17]'")
            return tuple(range(min(5, model.class_count)))
        return read_concept(value, context) if is_concept(value) else value

    def check(self, value: Any, context: InputContext) -> Objective:
        if context.model is None:
            raise InputError("a target needs a model: declare the model before it")
        target = parse_target(value, context.model).unresolved()
        if isinstance(index := getattr(target, "index", None), tuple):
            context.need_one_each(index, "class")
        return target

    def select(self, value: Objective, rows: range) -> Objective:
        return value.select(rows)

    def image_count(self, value: Any) -> int | None:
        index = getattr(value, "index", None)
        return len(index) if isinstance(index, tuple) else None

    def record(self, value: Any) -> Any:
        return value.to_json() if isinstance(value, Objective) else super().record(value)

    def is_identified(self, value: Any) -> bool:
        return value.is_identified if isinstance(value, Objective) else super().is_identified(value)

    def sample(self, request: SampleRequest) -> Any:
        return self.make(request.target, request)

    def bad_values(self, good: Any, context: InputContext) -> Iterator[tuple[str, Any]]:
        yield "a class that does not exist", 99
        yield "a negative class", -1
        yield "the name of no class", "no such class"
        yield "a layer that does not exist", "no_such_layer[0]"
        yield "a unit with a row but no column", "conv1[0,1]"
        yield "a number that is no index", 1.5
        if (images := context.inputs.get("images")) is not None:
            yield "too few classes", [0] * (len(images) - 1)


TARGET = TargetRole()
