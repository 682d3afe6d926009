"""Relations and references that several methods of attention declare."""

from __future__ import annotations

from phosphene import Reference
from phosphene.spec import Equivariant, InvariantTo, Relation, ScalesWith, ZeroWhen

#: The map flips and transposes with the image.
FLIPS: tuple[Relation, ...] = tuple(
    Equivariant(transform, fields=("maps",)) for transform in ("hflip", "vflip", "transpose")
)

#: Of what is computed from attention alone, without a score.
WITHOUT_A_SCORE: tuple[Relation, ...] = (
    *FLIPS,
    InvariantTo("batch_order"),
    InvariantTo("normalization"),
    ScalesWith("logits", power=0),
)

VASWANI_2017 = Reference(
    key="vaswani2017",
    title="Attention Is All You Need",
    authors="Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin",
    year=2017,
    url="https://arxiv.org/abs/1706.03762",
)
CARON_2021 = Reference(
    key="caron2021",
    title="Emerging Properties in Self-Supervised Vision Transformers",
    authors="Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin",
    year=2021,
    url="https://arxiv.org/abs/2104.14294",
)

#: Of a map of the attention's gradients: it depends on differences of the score only.
OF_A_SCORE: tuple[Relation, ...] = (
    *FLIPS,
    InvariantTo("batch_order"),
    InvariantTo("normalization"),
    InvariantTo("logit_shift"),
    ZeroWhen("constant"),
)
