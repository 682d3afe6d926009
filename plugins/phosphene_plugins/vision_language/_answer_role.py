"""The role ``answer_model``: a network that answers questions about images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field

from phosphene import InputError
from phosphene.errors import type_name
from phosphene.roles import AS_OBJECT, InputContext, InputRole, SampleRequest, check_type
from phosphene.spec import Role

from ._answer_models import AnswerModel, load_answer_model

Question: TypeAlias = Annotated[
    str, Field(min_length=1, description="question or prompt, with the network's own template")
]

#: A network that answers questions about images, word by word.
Answerer: TypeAlias = Annotated[AnswerModel, Role("answer_model")]


class AnswerRole(InputRole):
    """A network that answers questions about images; default: the bundled one."""

    name, value_type, default = "answer_model", AnswerModel, "builtin:shapes-answers"
    metavar = "URI"
    description = "an ``AnswerModel``, or hf:folder with a LLaVA or BLIP"
    help = "network that answers questions, hf:folder (default: builtin:shapes-answers)"

    def read(self, value: Any, context: InputContext) -> AnswerModel:
        if not isinstance(value, (str, Path)):
            raise InputError(f"a network of answers is named as hf:folder, not {type_name(value)}")
        return load_answer_model(str(value))

    def check(self, value: Any, context: InputContext) -> AnswerModel:
        model: AnswerModel = check_type(value, AnswerModel, "such as builtin:shapes-answers")
        return model

    def record(self, value: Any) -> Any:
        return value.uri or f"the network {value.name} {AS_OBJECT}"

    def sample(self, request: SampleRequest) -> AnswerModel:
        return load_answer_model(self.default)

    def bad_values(self, good: Any, context: InputContext) -> Iterator[tuple[str, Any]]:
        yield "a name", "resnet18"
        yield "a classifier", context.model


ANSWER_MODEL = AnswerRole()
