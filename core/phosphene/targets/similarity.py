"""``Similar``: the similarity of an image's embedding to a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, ModelError
from ..finite_values import check_finite
from .objectives import Objective

if TYPE_CHECKING:
    from ..models import Model


@dataclass(frozen=True, eq=False)
class Similar(Objective):
    """The cosine of the image's embedding and a reference, ``vector`` (D,): S = cos(embed(x), v).

    The embedding is ``model.embed``: the input of the classifier, or the output of an embedding network.
    ``name`` is the file of the reference image. An attack succeeds where the cosine is below ``threshold``.
    """

    vector: Tensor
    name: str = ""
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.vector, Tensor) or self.vector.ndim != 1 or not self.vector.any():
            raise InputError("the reference of a similarity must be a vector (D,) that is not zero")
        error = InputError("the reference of a similarity contains NaN or infinity")
        check_finite(self.vector, "reference", lambda: error)
        if not -1 < self.threshold < 1:
            raise InputError(f"threshold is a cosine between -1 and 1, not {self.threshold}")

    def score(self, values: Tensor) -> Tensor:
        if values.ndim != 2 or values.shape[1] != len(self.vector):
            raise InputError(
                f"the embedding is {tuple(values.shape)}, the reference has {len(self.vector)} numbers"
            )
        return F.cosine_similarity(values, self.vector.to(values)[None], dim=1)

    def evaluate(self, model: Model, images: Tensor) -> Tensor:
        if model.task in ("segmentation", "detection"):
            raise ModelError(f"{model.name} has no embedding of the image: it is for task {model.task!r}")
        return self.score(model.embed(images))

    def margin(self, model: Model, images: Tensor) -> Tensor:
        return self.evaluate(model, images) - self.threshold

    @property
    def is_identified(self) -> bool:
        return bool(self.name)

    def __str__(self) -> str:
        return f"similar:{self.name or 'a vector'}"
