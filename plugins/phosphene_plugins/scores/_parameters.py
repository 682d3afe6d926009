"""Parameters that several scores share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

TargetSource = Literal["label", "predicted"]

MethodName = Annotated[
    str,
    Field(description="method whose maps are scored: any that returns an Attribution"),
]

MethodParams = Annotated[dict[str, Any], Field(description="parameters of the scored method")]

MapTarget = Annotated[
    TargetSource, Field(description="class that maps explain: the data set's label or the predicted class")
]

MaxImages = Annotated[int, Field(ge=1, description="largest number of the data set's images to score")]

Budget = Annotated[
    int,
    Field(
        ge=1,
        description="largest number of forward passes per method (a backward pass counts two); expensive "
        "methods are scored on fewer images",
    ),
]

Radius = Annotated[int, Field(ge=0, le=100, description="tolerance: pixels from the object that still count")]

Threshold = Annotated[
    float | None,
    Field(
        gt=0,
        le=1,
        description="fraction of the map's maximum above which pixels count; default: as many pixels as the "
        "object has",
    ),
]

Steps = Annotated[int, Field(ge=1, le=1000, description="number of equal portions of the image's pixels")]
