"""The role ``text_model``: a model that embeds images and texts in one space."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, TypeAlias

import torch

from phosphene import InputError, fork_random_state, load_model
from phosphene import Model as ImageModel
from phosphene.roles import ROLES, InputContext, InputRole, SampleRequest
from phosphene.spec import Role

#: A model of images and texts, such as a CLIP.
TextModel: TypeAlias = Annotated[ImageModel, Role("text_model")]


class TextModelRole(InputRole):
    """A model of images and texts; default: the bundled one, which has ten words."""

    name, value_type, default = "text_model", ImageModel, "builtin:shapes-words"
    metavar = "URI"
    description = "a ``Model`` that embeds texts, such as open_clip:ViT-B-32(a dog; a cat)"
    help = "model of images and texts, open_clip: or hf: (default: builtin:shapes-words)"

    def read(self, value: Any, context: InputContext) -> Any:
        return ROLES["model"].read(value, context)

    def check(self, value: Any, context: InputContext) -> ImageModel:
        model: ImageModel = ROLES["model"].check(value, context)
        if model.embed_text is None:
            raise InputError(
                f"{model.name} embeds images alone: names need a model of images and texts, such as "
                "open_clip:ViT-B-32(a dog; a cat) or hf: with a CLIP"
            )
        return model

    def record(self, value: Any) -> Any:
        return ROLES["other_model"].record(value)

    def fingerprint(self, value: Any) -> Any:
        return ROLES["other_model"].fingerprint(value)

    def sample(self, request: SampleRequest) -> ImageModel:
        with fork_random_state():
            model = load_model(self.default)
        if request.model.dtype == torch.float64:
            model.module.double()
        return model

    def bad_values(self, good: Any, context: InputContext) -> Iterator[tuple[str, Any]]:
        yield "a name", "resnet18"
        with fork_random_state():
            yield "a model without texts", load_model("builtin:shapes-vgg")


TEXT_MODEL = TextModelRole()
