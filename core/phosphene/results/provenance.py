"""``Provenance``: how a result was computed."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Provenance(BaseModel):
    """How a result was computed: enough to run it again and to compare."""

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
    #: Where Ctrl-C ended it early ("after 12 of 200 steps"); None if it is complete.
    interrupted: str | None = None
    #: What a detector finds in the images, and in the adversarial examples: a table, values by column.
    detections: dict[str, list[Any]] = {}
    #: The files of the images, where all were files.
    files: tuple[str, ...] = ()
    #: Number of processes of a training, on which its result depends.
    processes: int = 1
