"""JPEG compression as a defense against adversarial perturbations."""

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
from phosphene.testing import linear_model

from ._input_transform_result import INDEPENDENT, DefendedImages, Transform, compare_predictions


def compress(quality: int) -> Transform:
    """Encoding and decoding as JPEG, with the gradient of the identity."""
    return lambda images: straight_through(images, lambda x: jpeg_round_trip(x, quality))


def equals_a_round_trip_through_pillow() -> None:
    """Within one gray level of an image that Pillow writes and reads again."""
    levels = torch.randint(256, (16, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(levels.numpy()).save(file, "JPEG", quality=60)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255
    compressed = compress(60)(levels.permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(compressed, expected, atol=1 / 255, rtol=0)
    model = linear_model(torch.linspace(-1, 1, 2 * levels.numel()).view(2, 3, 16, 24))
    result = jpeg(model, levels.permute(2, 0, 1)[None] / 255, quality=60)
    torch.testing.assert_close(result.transformed, expected, atol=1 / 255, rtol=0)
    torch.testing.assert_close(result.confidence_after, model(result.transformed).softmax(1).amax(1))


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
    relations=INDEPENDENT,
    cost=Cost(forward=2 * size.images),
    tags=["input-transform"],
    oracle=equals_a_round_trip_through_pillow,
    defense=compress,
    demo={"quality": 20},
    exempt={
        "numbers_are_the_same_for_transposed_images": "JPEG's table of quantization steps is not symmetric"
    },
)
def jpeg(
    model: Model,
    images: Images,
    *,
    quality: Annotated[int, Field(ge=1, le=100, description="JPEG quality")] = 75,
) -> DefendedImages:
    """JPEG compression as an input transform against adversarial perturbations.

    x' = decode(encode(round(255 x))) / 255,   dx'/dx = 1 in the backward pass

    Compression removes fine detail, and with it part of a perturbation computed for the undefended
    model. It has no useful gradient of its own, so attacks on the defended model (``jpeg.defend(model)`` or
    ``defended:jpeg(quality=75)|...``) use the gradient of the identity (BPDA) and mostly succeed: see the
    page on defenses.

    Returns:
        ``transformed`` (N, C, H, W) in [0, 1]; ``before``, ``after`` (N,) the predicted classes.

    Raises:
        InputError: images with neither 1 nor 3 channels.

    Example::
        from phosphene import run

        result = run("jpeg", images="builtin:scenes/2", quality=50)
        result.transformed.shape  # (2, 3, 64, 64)

    Source: Guo et al. 2018; BPDA Athalye et al. 2018, section 4.1.
    """
    return compare_predictions(model, images, compress(quality))


@hookimpl
def phosphene_methods():
    return [jpeg]
