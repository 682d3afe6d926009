"""Objectives of attacks on a data set: the classifier of each image, by the image itself."""

from __future__ import annotations

import re
import warnings
from typing import Annotated, TypeAlias

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from phosphene import Model, batch_size
from phosphene.models import warning_for_attacks
from phosphene.targets import Box, Objective, ObjectiveClassifier, parse_target

_PATTERN = "^(class|contrast|region|box|similar):"


def check_objective_text(value: object) -> object:
    """The value; ValueError for a text that is no objective with a criterion of success."""
    if isinstance(value, str) and not re.match(_PATTERN, value):
        raise ValueError(
            "should be an objective, as 'class:tabby', 'contrast:tabby,lynx', 'region:person', 'box:person' "
            "or 'similar:dog.png'"
        )
    return value


#: An objective as text. Names of classes alone are none, so that they cannot be mistaken for other choices.
ObjectiveText: TypeAlias = Annotated[
    str, BeforeValidator(check_objective_text), Field(json_schema_extra={"pattern": _PATTERN})
]


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


def predict_each(classifier: Model, images: Tensor) -> Tensor:
    """The predicted classes (n,) of images, each by the classifier of its own where there is one."""
    classes = []
    for rows in torch.arange(len(images)).split(batch_size(classifier)):
        logits = classifier.for_rows(rows)(images[rows])
        if activation := classifier.output_activation(logits, images[rows]):
            warnings.warn(warning_for_attacks(activation), stacklevel=2)
        classes.append(logits.argmax(1))
    return torch.cat(classes)
