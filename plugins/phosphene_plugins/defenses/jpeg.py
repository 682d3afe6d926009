"""JPEG compression before the model: what fine-tuned noise does not survive, unless it was tuned to."""

import io
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from phosphene import Reference, hookimpl, method
from phosphene.optimize import jpeg_round_trip, straight_through
from phosphene.roles import Images, Model
from phosphene.spec import Cost, PixelRange, SameShape, size

from ._input_transform_result import Change, DefendedImages, compared


def through_a_file(quality: int) -> Change:
    """A JPEG file's round trip, through which the gradient passes as if there were none."""
    return lambda images: straight_through(images, lambda pictures: jpeg_round_trip(pictures, quality))


def is_a_files_round_trip() -> None:
    """Within one grey level of what Pillow writes and reads again."""
    levels = torch.randint(256, (16, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(levels.numpy()).save(file, "JPEG", quality=60)
    want = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255
    got = through_a_file(60)(levels.permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(got, want, atol=1 / 255, rtol=0)


@method(
    family="defenses",
    title="JPEG",
    references=[
        Reference(
            key="guo2018",
            title="Countering Adversarial Images using Input Transformations",
            authors="Guo, Rana, Cissé, van der Maaten",
            year=2018,
            url="https://arxiv.org/abs/1711.00117",
        ),
        Reference(
            key="athalye2018",
            title="Obfuscated Gradients Give a False Sense of Security",
            authors="Athalye, Carlini, Wagner",
            year=2018,
            url="https://arxiv.org/abs/1802.00420",
        ),
    ],
    invariants=[PixelRange(field="transformed"), SameShape(field="transformed")],
    cost=Cost(forward=2 * size.images),
    tags=["input-transform"],
    oracle=is_a_files_round_trip,
    defense=through_a_file,
    demo={"quality": 20},
)
def jpeg(
    model: Model,
    images: Images,
    *,
    quality: Annotated[int, Field(ge=1, le=100, description="quality of the JPEG file")] = 75,
) -> DefendedImages:
    """Show the model every picture through a JPEG file.

    x' = decode(encode(round(255 x))) / 255,   dx'/dx = 1 on the way back

    Compression drops fine detail, and with it much of what an attack on the bare model has written there. The
    rounding inside has no useful gradient, so attacks on the defended model (``jpeg.defend(model)``, or the
    name ``defended:jpeg(quality=75)|...``) take the identity's, and get through: see the book's page on
    defences. ``images`` (N, 1 or 3, H, W) in [0, 1]; InputError for other channels.

    Source: Guo et al. 2018; the gradient (BPDA) Athalye et al. 2018, section 4.1.
    """
    return compared(model, images, through_a_file(quality))


@hookimpl
def phosphene_methods():
    return [jpeg]
