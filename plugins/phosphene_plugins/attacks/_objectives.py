"""Objectives of attacks on a data set: the classifier of each image, by the image itself."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field
from torch import Tensor

from phosphene import Model
from phosphene.targets import Box, Objective, ObjectiveClassifier, parse_target

#: An objective as text. Names of classes alone are none, so that they cannot be mistaken for other choices.
ObjectiveText: TypeAlias = Annotated[str, Field(pattern="^(class|contrast|region|box|similar):")]


def parse_objective(text: str | None, model: Model) -> Objective | None:
    """The objective of this text; of None the best box of a detector, else None, for the predicted class."""
    if text is None:
        return Box() if model.task == "detection" else None
    return parse_target(text, model)


def classifier_of(model: Model, objective: Objective | None, images: Tensor) -> Model:
    """The model itself, or for an objective the classifier of whether it holds in each image.

    For an objective, class 1 of an image means that it holds, and the classifier of image n is
    ``for_rows([n])``. Without one, the classes are the model's.
    """
    return model if objective is None else ObjectiveClassifier.of_images(model, objective, images)
