"""The role ``adaptive_stylizer``: a trained network for arbitrary styles."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from ..results import TrainedNetwork
from ..spec.spec import Role
from .stylizer import StylizerRole

#: A style-transfer network that receives the style as an image; a ``Stylizer`` has a fixed list of styles.
AdaptiveStylizer: TypeAlias = Annotated[TrainedNetwork, Role("adaptive_stylizer")]


class AdaptiveStylizerRole(StylizerRole):
    """The result of ``adaptive_style_fit`` or its folder; default: the bundled network."""

    name, default = "adaptive_stylizer", "builtin:shapes-adaptive"
    description = "result of ``adaptive_style_fit``"
    help = "folder of a network that adaptive_style_fit trained (default: builtin:shapes-adaptive)"


ADAPTIVE_STYLIZER = AdaptiveStylizerRole()
