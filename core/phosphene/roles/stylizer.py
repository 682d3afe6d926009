"""The role ``stylizer``: a trained style-transfer network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

from ..errors import InputError, type_name
from ..results import TrainedNetwork
from ..spec.spec import Role
from .base import InputContext, InputRole, SampleRequest, check_type

#: A style-transfer network with a fixed list of styles, trained by ``fast_style_fit``.
Stylizer: TypeAlias = Annotated[TrainedNetwork, Role("stylizer")]


class StylizerRole(InputRole):
    """The result of ``fast_style_fit`` or its folder; default: the bundled network."""

    name, value_type, default = "stylizer", TrainedNetwork, "builtin:shapes-styles"
    optional_is_none = True
    metavar = "FOLDER"
    description = "result of ``fast_style_fit``"
    help = "folder of a network that fast_style_fit trained (default: builtin:shapes-styles)"

    def read(self, value: Any, context: InputContext) -> Any:
        if not isinstance(value, (str, Path)):
            raise InputError(f"a stylizer is a training's result or its folder, not {type_name(value)}")
        return context.result(value)

    def check(self, value: Any, context: InputContext) -> TrainedNetwork:
        network: TrainedNetwork = check_type(value, TrainedNetwork, "the result of a training method")
        return network

    def sample(self, request: SampleRequest) -> TrainedNetwork | None:
        """The default network; None where it may be: a training that starts at one has its widths."""
        network: TrainedNetwork | None = super().sample(request) if request.required else None
        return network


STYLIZER = StylizerRole()
