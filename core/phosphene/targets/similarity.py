"""``Similar``: the similarity of an image's embedding to a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, ModelError
from ..finite_values import check_finite
from ..images.paths import IMAGE_SUFFIXES, local_path
from .objectives import Objective

if TYPE_CHECKING:
    from ..models import Model


@dataclass(frozen=True, eq=False)
class Similar(Objective):
    """The cosine of the image's embedding and a reference, ``vector`` (D,): S = cos(embed(x), v).

    The embedding is ``model.embed``: the input of the classifier, or the output of an embedding network.
    ``name`` is the file or the text of the reference, as after "similar:". An attack succeeds where the
    cosine is below ``threshold``; None: below half the cosine of the image itself.
    """

    vector: Tensor
    name: str = ""
    threshold: float | None = 0.5
    _own: tuple[float, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.vector, Tensor) or self.vector.ndim != 1 or not self.vector.any():
            raise InputError("the reference of a similarity must be a vector (D,) that is not zero")
        error = InputError("the reference of a similarity contains NaN or infinity")
        check_finite(self.vector, "reference", lambda: error)
        if self.threshold is not None and not -1 < self.threshold < 1:
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
        cosine = self.evaluate(model, images)
        if self.threshold is not None:
            return cosine - self.threshold
        own = cosine.detach() if self._own is None else torch.tensor(self._own).to(cosine)
        return cosine - own / 2

    def resolve(self, model: Model, images: Tensor) -> Similar:
        if self.threshold is not None or self._own is not None:
            return self
        with torch.no_grad():
            return replace(self, _own=tuple(self.evaluate(model, images).tolist()))

    def unresolved(self) -> Similar:
        return replace(self, _own=None)

    def select(self, rows: Sequence[int]) -> Similar:
        return self if self._own is None else replace(self, _own=tuple(self._own[row] for row in rows))

    def for_model(self, model: Model) -> Similar:
        if not self.name:
            raise InputError(
                f"a vector is an embedding of one model, and that of {model.name} differs: name the "
                "reference, 'similar:dog.png'"
            )
        return replace(read_reference(self.name, model), threshold=self.threshold)

    @property
    def is_identified(self) -> bool:
        # The text of a reference does not name another threshold than its default.
        return bool(self.name) and self.threshold == (None if self.name.startswith("text:") else 0.5)

    def __str__(self) -> str:
        return f"similar:{self.name or 'a vector'}"


def read_reference(text: str, model: Model) -> Similar:
    """The similarity to an image file or, where the model embeds text, to a text.

    "image:dog.png" and "text:a dog" say which of the two it is. Without that, what ends as an image file does
    is a file. Other text is a text where the model embeds text and no file has that name, else a file.

    Raises InputError for a text that is also the name of a file, ModelError for a text and a model that
    embeds none.
    """
    kind, colon, rest = (part.strip() for part in text.partition(":"))
    if not (colon and kind in ("image", "text")):
        kind, rest = _kind(text, model), text
    if not rest:
        raise InputError("a similarity needs a reference: 'similar:dog.png', or 'similar:text:a dog'")
    name = text if rest != text or kind == "image" else f"text:{rest}"
    if kind == "image":
        image = model.transform(rest)[None].to(model.device, model.dtype)
        with model.guard(), torch.no_grad():
            return Similar(model.embed(image)[0], name)
    if model.embed_text is None:
        raise ModelError(
            f"{model.name} embeds images alone, so that {rest!r} has no embedding to compare with; models "
            "of images and text have one (open_clip:, hf: with a CLIP). 'similar:dog.png' names an image"
        )
    with torch.no_grad():
        return Similar(model.embed_text(rest).detach(), name, threshold=None)


def _kind(text: str, model: Model) -> str:
    """Whether a reference without a prefix is an "image" or a "text"."""
    if text.lower().endswith(IMAGE_SUFFIXES) or "://" in text:
        return "image"
    is_file = "\0" not in text and local_path(text).exists()
    if is_file and model.embed_text is not None:
        raise InputError(
            f"{text!r} is a text, and a file has that name: write 'similar:text:{text}' or "
            f"'similar:image:{text}'"
        )
    return "image" if is_file else "text"
