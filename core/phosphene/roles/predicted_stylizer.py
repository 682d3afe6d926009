"""The role ``predicted_stylizer``: a trained network that predicts the parameters of a style."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from ..results import TrainedNetwork
from ..spec.spec import Role
from .stylizer import StylizerRole

#: A style-transfer network whose normalization parameters are predicted from an image of the style.
PredictedStylizer: TypeAlias = Annotated[TrainedNetwork, Role("predicted_stylizer")]


class PredictedStylizerRole(StylizerRole):
    """The result of ``predicted_style_fit`` or its folder; default: the bundled network."""

    name, default = "predicted_stylizer", "builtin:shapes-predicted"
    description = "result of ``predicted_style_fit``"
    help = "folder of a network that predicted_style_fit trained (default: builtin:shapes-predicted)"


PREDICTED_STYLIZER = PredictedStylizerRole()
