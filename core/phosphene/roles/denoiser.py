"""The role ``denoiser``: a diffusion model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeAlias

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
    """A diffusion model or its folder; default: the bundled one. A subclass may have another default."""

    name, value_type, default = "denoiser", _Denoiser, f"builtin:{_BUNDLED}"
    metavar = "FOLDER"
    description = "diffusion model, a ``Denoiser``"
    help = f"folder of a diffusers pipeline (default: builtin:{_BUNDLED})"

    #: What the default model is, in a message.
    default_kind: ClassVar[str] = "without text"

    def load_default(self) -> _Denoiser:
        """The model that ``default`` names."""
        return load_denoiser()

    def read(self, value: Any, context: InputContext) -> _Denoiser:
        if value == self.default:
            return self.load_default()
        bundled = f"the bundled diffusion model {self.default_kind} is {self.default}"
        if isinstance(value, str) and value.startswith("builtin:"):
            raise InputError(f"{bundled}, not {value}")
        if not isinstance(value, (str, Path)):
            raise InputError(
                f"a diffusion model is a Denoiser or a pipeline's folder, not {type_name(value)}; {bundled}"
            )
        if not Path(value).is_dir():
            raise InputError(f"there is no folder at {str(value)!r}; {bundled}")
        return load_pipeline(value)

    def check(self, value: Any, context: InputContext) -> _Denoiser:
        hint = "a subclass of phosphene.generative.Denoiser, or load_pipeline(folder)"
        denoiser: _Denoiser = check_type(value, _Denoiser, hint)
        return denoiser


DENOISER = DenoiserRole()
