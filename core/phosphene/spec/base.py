"""``FrozenModel``: base class of every part of a spec, an immutable pydantic model."""

from __future__ import annotations

from pydantic import (
    BaseModel,
    ConfigDict,
)


class FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
