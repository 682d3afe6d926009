"""``Provenance``: how a result was made."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Provenance(BaseModel):
    """How a result came about: enough to make it again and to see whether it came out the same."""

    model_config = ConfigDict(frozen=True)

    method: str
    distribution: str
    params: dict[str, Any]
    inputs: dict[str, Any]
    model: dict[str, Any] | None
    seed: int | None
    versions: dict[str, str]
    device: str
    dtype: str
    batch_size: int | None
    started: str
    seconds: float
    #: Where it stood when Ctrl-C ended it early ("after 12 of 200 steps"); None for what is whole.
    interrupted: str | None = None
