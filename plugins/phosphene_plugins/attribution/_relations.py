"""Relations that several attributions declare."""

from __future__ import annotations

from phosphene.spec import Equivariant, InvariantTo, LinearIn, Relation, ScalesWith, ZeroWhen

#: The map flips and transposes with the image.
FLIPS: tuple[Relation, ...] = (Equivariant("hflip"), Equivariant("vflip"), Equivariant("transpose"))

#: Of a map without enlarging and blurs: it shifts with the image as well.
EQUIVARIANT: tuple[Relation, ...] = (*FLIPS, Equivariant("shift"))

#: Of a map that is proportional to the gradient of the score, up to its sign.
PROPORTIONAL_TO_THE_SCORE: tuple[Relation, ...] = (
    ScalesWith("logits", power=1),
    InvariantTo("logit_shift"),
    InvariantTo("batch_order"),
    ZeroWhen("constant"),
)

#: Of a map of gradients with respect to the pixels, before the model's normalization.
GRADIENT: tuple[Relation, ...] = (
    *EQUIVARIANT,
    *PROPORTIONAL_TO_THE_SCORE,
    ZeroWhen("ignored"),
    InvariantTo("normalization"),
)

#: Of a class activation map whose weights are linear in the score.
LINEAR_CAM: tuple[Relation, ...] = (
    *EQUIVARIANT,
    *PROPORTIONAL_TO_THE_SCORE,
    LinearIn("target", fields=("signed_maps",)),
)
