"""The frozen pydantic model that every part of a spec is."""

from __future__ import annotations

from pydantic import (
    BaseModel,
    ConfigDict,
)


class FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
