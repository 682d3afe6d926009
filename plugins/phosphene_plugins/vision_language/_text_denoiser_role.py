"""The role ``text_denoiser``: a diffusion model that is conditioned on text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, TypeAlias

from phosphene import InputError
from phosphene.generative import Denoiser
from phosphene.roles import ROLES, DenoiserRole, InputContext, check_type
from phosphene.spec import Role

from ._color_words import ColorWords

#: A diffusion model that draws what a prompt says.
TextDenoiser: TypeAlias = Annotated[Denoiser, Role("text_denoiser")]


class TextDenoiserRole(DenoiserRole):
    """A text-conditioned diffusion model or its folder; default: landscapes of ten words in closed form."""

    name, default = "text_denoiser", ColorWords.uri
    description = "text-conditioned diffusion model, a ``Denoiser``"
    help = f"folder of a text-to-image pipeline (default: {ColorWords.uri})"

    default_kind = "that reads prompts"

    def load_default(self) -> Denoiser:
        return ColorWords()

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
