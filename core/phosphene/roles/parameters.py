"""Annotations of parameters that are more than a value: a layer's name, the seed, the number of frames."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from ..spec.spec import Role

#: The name of a layer, checked against the model before the method runs.
LayerName: TypeAlias = Annotated[str, Role("layer")]


#: How many frames of an optimization are saved.
Frames: TypeAlias = Annotated[
    int,
    Field(ge=0, le=1000, description="number of intermediate images to save, evenly spaced over the steps"),
]


#: The seed of all randomness in a call; None draws one and records it.
Seed: TypeAlias = Annotated[
    int | None,
    Role("seed"),
    Field(ge=0, lt=2**63, description="seed of all randomness; default: drawn at random and recorded"),
]
