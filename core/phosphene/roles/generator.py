"""The role ``generator``: a decoder from latent codes to images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

from ..builtin.autoencoder import AUTOENCODER, load_autoencoder
from ..generative.generators import Generator as _Generator
from ..results import TrainedNetwork
from ..spec.spec import Role
from .base import InputContext, InputRole, check_type

#: A decoder from codes, distributed like draws of N(0, I), to images.
Generator: TypeAlias = Annotated[_Generator, Role("generator")]


class GeneratorRole(InputRole):
    """A decoder, a training result that contains one, or its folder; default: the bundled autoencoder."""

    name, value_type, default = "generator", _Generator, f"builtin:{AUTOENCODER}"
    metavar = "FOLDER"
    description = "decoder from codes to images, a ``Generator``"
    help = f"folder that a generator was saved in (default: builtin:{AUTOENCODER})"

    def read(self, value: Any, context: InputContext) -> Any:
        if value == self.default:
            return load_autoencoder()
        trained = context.result(value) if isinstance(value, (str, Path)) else value
        if not isinstance(trained, TrainedNetwork):
            return trained  # ``check`` refuses it unless it is a Generator
        if isinstance(trained.network, _Generator):
            trained.network.uri = trained.uri
        return trained.network

    def check(self, value: Any, context: InputContext) -> _Generator:
        hint = "such as phosphene.generative.Generator(latent_size, decoder)"
        generator: _Generator = check_type(value, _Generator, hint)
        return generator


GENERATOR = GeneratorRole()
