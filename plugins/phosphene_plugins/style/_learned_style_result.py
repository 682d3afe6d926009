"""``LearnedStylization``, the result of ``inst_style``: images stylized by learned words, and the words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from phosphene.results import Stylization


@dataclass(frozen=True, eq=False, kw_only=True)
class LearnedStylization(Stylization):
    """Images (N, C, H, W) stylized by n learned words: their embeddings ``tokens`` (n, D).

    ``fit_losses`` (fit_steps,) are the losses of the textual inversion, ``text`` is the prompt, in which *
    stands for the words.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        **Stylization.shapes,
        "tokens": "n D",
        "fit_losses": "fit",
    }

    tokens: Tensor
    fit_losses: Tensor
    text: str
