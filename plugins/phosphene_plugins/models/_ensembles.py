"""Several models at once: others beside the one that is given, and their average as a model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Model, ModelError, load_model

#: Parameters that name other models, and say what an ensemble is the mean of.
URIs: TypeAlias = Annotated[
    tuple[str, ...], Field(max_length=16, description="the other models, by URI, of the same classes")
]


MeanOf: TypeAlias = Annotated[
    Literal["probabilities", "logits"], Field(description="what of the members the ensemble is the mean of")
]


def loaded_beside(model: Model, uris: Sequence[str], *, pretrained: bool = False) -> list[Model]:
    """The others, where and as precise as the model is.

    Raises InputError or ModelError for one of other classes, or for pictures of another size.
    """
    others = []
    for uri in uris:
        other = load_model(uri, pretrained=pretrained)
        other.module.to(model.device, model.dtype)
        if other.class_count != model.class_count:
            both = f"{other.class_count} classes, {model.name} {model.class_count}"
            raise ModelError(f"{uri} has {both}: what one says means nothing to the other")
        if other.input_size != model.input_size:
            raise InputError(
                f"{uri} takes pictures of {other.input_size}, {model.name} of {model.input_size}"
            )
        others.append(other)
    return others


def without_scheme(name: str) -> str:
    """A model's name, and those of its defences, without the schemes."""
    return re.sub(r"\b\w+:", "", name)


def averaged_logits(logits: Sequence[Tensor], mean_of: MeanOf) -> Tensor:
    """(N, K) of several models' logits: their mean, or the logarithm of their probabilities' mean."""
    stacked = torch.stack([some.to(logits[0]) for some in logits])
    if mean_of == "logits":
        return stacked.mean(0)
    return stacked.log_softmax(2).logsumexp(0) - math.log(len(stacked))


class Average(nn.Module):
    """Pixels (N, C, H, W) in [0, 1] to the logits (N, K) of an ensemble.

    Each member normalises for itself, behind its own defences, and gradients reach the picture through all.
    """

    def __init__(self, models: Sequence[Model], mean_of: MeanOf = "probabilities") -> None:
        super().__init__()
        if mean_of not in ("probabilities", "logits"):
            raise InputError(f"an ensemble is the mean of probabilities or of logits, not of {mean_of!r}")
        self.models, self.mean_of = tuple(models), mean_of
        self.members = nn.ModuleList(model.module for model in models)
        # A buffer, so that a digest tells the same networks behind other defences apart.
        told = "+".join([mean_of, *(model.name for model in models)]).encode()
        self.register_buffer("told", torch.frombuffer(bytearray(told), dtype=torch.uint8))

    def forward(self, pictures: Tensor) -> Tensor:
        return averaged_logits([model(pictures) for model in self.models], self.mean_of)


def fed_like(model: Model) -> dict[str, Any]:
    """How pictures are made for a model, as ``Model`` takes it."""
    known = ("input_size", "classes", "crop_pct", "interpolation")
    return {name: getattr(model, name) for name in known}


def averaged(models: Sequence[Model], mean_of: MeanOf = "probabilities") -> Model:
    """Several models of the same classes as one, to be attacked or looked into like any other."""
    name = f"ensemble:{' + '.join(model.name for model in models)}"
    return Model(Average(models, mean_of), name=name, **fed_like(models[0]))
