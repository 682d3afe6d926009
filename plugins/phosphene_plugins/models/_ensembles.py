"""Ensembles: loading models of the same classes, and their average as a model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Model, ModelError, load_model
from phosphene.targets import ObjectiveClassifier

#: Parameters that name further models, and what an ensemble averages.
ModelURIs: TypeAlias = Annotated[
    tuple[str, ...], Field(max_length=16, description="URIs of further models with the same classes")
]
MeanOf: TypeAlias = Annotated[
    Literal["probabilities", "logits"], Field(description="outputs of the members that are averaged")
]


def load_compatible_models(model: Model, uris: Sequence[str], *, pretrained: bool = False) -> list[Model]:
    """The models of these URIs, on the device and in the precision of ``model``.

    Raises ModelError for a model with another number of classes, InputError for one with another input size.
    """
    if isinstance(model, ObjectiveClassifier):  # the same objective of every model
        return [
            model.of_model(other)
            for other in load_compatible_models(model.viewed, uris, pretrained=pretrained)
        ]
    others = []
    for uri in uris:
        other = load_model(uri, pretrained=pretrained)
        other.module.to(model.device, model.dtype)
        if other.class_count != model.class_count:
            counts = f"{other.class_count} classes, {model.name} {model.class_count}"
            raise ModelError(f"{uri} has {counts}: their predictions cannot be compared")
        if other.input_size != model.input_size:
            raise InputError(
                f"{uri} takes images of size {other.input_size}, {model.name} of {model.input_size}"
            )
        others.append(other)
    return others


def strip_schemes(name: str) -> str:
    """A model's name, and those of its defenses, without the schemes: "jpeg() | shapes-vgg"."""
    return re.sub(r"\b\w+:", "", name)


def average_logits(logits: Sequence[Tensor], mean_of: MeanOf) -> Tensor:
    """(N, K) of several models' logits: their mean, or the logarithm of their probabilities' mean."""
    stacked = torch.stack([member.to(logits[0]) for member in logits])
    if mean_of == "logits":
        return stacked.mean(0)
    return stacked.log_softmax(2).logsumexp(0) - math.log(len(stacked))


class EnsembleNetwork(nn.Module):
    """From pixels (N, C, H, W) in [0, 1] to the logits (N, K) of an ensemble.

    Each member applies its own normalization and defenses, and gradients pass through all of them.
    """

    def __init__(self, models: Sequence[Model], mean_of: MeanOf = "probabilities") -> None:
        super().__init__()
        if mean_of not in ("probabilities", "logits"):
            raise InputError(f"an ensemble is the mean of probabilities or of logits, not of {mean_of!r}")
        self.models, self.mean_of = tuple(models), mean_of
        self.members = nn.ModuleList(model.module for model in models)
        # A buffer, so that the digest differs between the same networks behind different defenses.
        description = "+".join([mean_of, *(model.name for model in models)]).encode()
        self.register_buffer("description", torch.frombuffer(bytearray(description), dtype=torch.uint8))

    def forward(self, images: Tensor) -> Tensor:
        return average_logits([model(images) for model in self.models], self.mean_of)


def input_settings(model: Model) -> dict[str, Any]:
    """How images are prepared for a model, and its classes, as arguments of ``Model``."""
    names = ("input_size", "classes", "crop_pct", "crop_mode", "interpolation")
    return {name: getattr(model, name) for name in names}


def average_models(models: Sequence[Model], mean_of: MeanOf = "probabilities") -> Model:
    """Several models of the same classes as one model."""
    name = f"ensemble:{' + '.join(model.name for model in models)}"
    return Model(EnsembleNetwork(models, mean_of), name=name, **input_settings(models[0]))
