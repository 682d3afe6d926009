"""The role ``denoiser``: a diffusion model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

from ..builtin.denoiser import DENOISER as _BUNDLED
from ..builtin.denoiser import load_denoiser
from ..errors import InputError, type_name
from ..generative.denoisers import Denoiser as _Denoiser
from ..generative.pipelines import load_pipeline
from ..spec.spec import Role
from .base import InputContext, InputRole, check_type

#: A diffusion model: predicts the noise in x_t, and maps images to x_0 and back.
Denoiser: TypeAlias = Annotated[_Denoiser, Role("denoiser")]


class DenoiserRole(InputRole):
    """A diffusion model or its folder; default: the bundled one."""

    name, value_type, default = "denoiser", _Denoiser, f"builtin:{_BUNDLED}"
    metavar = "FOLDER"
    description = "diffusion model, a ``Denoiser``"
    help = f"folder of a diffusers pipeline (default: builtin:{_BUNDLED})"

    def read(self, value: Any, context: InputContext) -> _Denoiser:
        if value == self.default:
            return load_denoiser()
        if isinstance(value, str) and value.startswith("builtin:"):
            raise InputError(f"the bundled diffusion model without text is {self.default}, not {value}")
        if not isinstance(value, (str, Path)):
            raise InputError(
                f"a diffusion model is a Denoiser or a pipeline's folder, not {type_name(value)}"
            )
        return load_pipeline(value)

    def check(self, value: Any, context: InputContext) -> _Denoiser:
        hint = "a subclass of phosphene.generative.Denoiser, or load_pipeline(folder)"
        denoiser: _Denoiser = check_type(value, _Denoiser, hint)
        return denoiser


DENOISER = DenoiserRole()
