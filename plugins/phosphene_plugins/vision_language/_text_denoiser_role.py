"""The role ``text_denoiser``: a diffusion model that is conditioned on text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from phosphene import InputError
from phosphene.errors import type_name
from phosphene.generative import Denoiser, load_pipeline
from phosphene.roles import ROLES, InputContext, InputRole, check_type
from phosphene.spec import Role

from ._color_words import ColorWords

#: A diffusion model that draws what a prompt says.
TextDenoiser: TypeAlias = Annotated[Denoiser, Role("text_denoiser")]


class TextDenoiserRole(InputRole):
    """A text-conditioned diffusion model or its folder; default: landscapes of ten words in closed form."""

    name, value_type, default = "text_denoiser", Denoiser, ColorWords.uri
    metavar = "FOLDER"
    description = "text-conditioned diffusion model, a ``Denoiser``"
    help = f"folder of a text-to-image pipeline (default: {ColorWords.uri})"

    def read(self, value: Any, context: InputContext) -> Denoiser:
        if value == self.default:
            return ColorWords()
        if isinstance(value, str) and value.startswith("builtin:"):
            raise InputError(f"the bundled diffusion model that reads prompts is {self.default}, not {value}")
        if not isinstance(value, (str, Path)):
            raise InputError(
                f"a diffusion model is a Denoiser or a pipeline's folder, not {type_name(value)}"
            )
        return load_pipeline(value)

    def check(self, value: Any, context: InputContext) -> Denoiser:
        denoiser: Denoiser = check_type(value, Denoiser, "such as load_pipeline(folder)")
        try:
            denoiser.prompted("")
        except InputError as error:
            raise InputError(
                f"{error}: pass the folder of a text-to-image pipeline, or {self.default}"
            ) from error
        return denoiser

    def bad_values(self, good: Any, context: InputContext) -> Iterator[tuple[str, Any]]:
        yield "a name", "resnet18"
        yield "a model without text", ROLES["denoiser"].make(None, context)


TEXT_DENOISER = TextDenoiserRole()
