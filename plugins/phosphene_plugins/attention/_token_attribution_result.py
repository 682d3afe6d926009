"""``TokenAttribution``: maps of patches, with the values of class and register tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from phosphene.results import Attribution


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenAttribution(Attribution):
    """An ``Attribution`` of patch tokens, with ``others`` (N, S), the values of class and register tokens."""

    shapes: ClassVar[Mapping[str, str]] = {**Attribution.shapes, "others": "N S"}
    per_image: ClassVar[tuple[str, ...]] = (*Attribution.per_image, "others")

    others: Tensor
