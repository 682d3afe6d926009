"""Caption saliency: the input gradient of the classes that an image's caption names."""

import re

import torch
from phosphene_captions import Captions

from phosphene import Cost, InputError, hookimpl, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model
from phosphene.spec import MapPerPixel, Nonnegative, size


def linear_model_oracle():
    """The gradient of a linear model's class is its row of weights; of both classes, the sum of the rows."""
    from phosphene.testing import linear_model

    captions = ("a picture of class 1", "class 0 beside class 1")
    images = torch.rand(2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([[[0.2, 0.1], [0.3, 0.2]], [[0.2, 0.2], [0.5, 0.1]]], dtype=torch.float64)
    torch.testing.assert_close(caption_saliency(linear_model(), images, captions).maps, expected)


@method(
    family="captions",
    needs=["gradients"],
    invariants=[Nonnegative(), MapPerPixel()],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=linear_model_oracle,
)
def caption_saliency(model: Model, images: Images, captions: Captions) -> Attribution:
    """Caption saliency: absolute input gradient of the summed logits of the classes that a caption names.

    maps = max_c |d(sum_k z_k) / dx_c|, k over the classes whose names occur in the caption

    Returns:
        ``Attribution``; ``maps`` (N, H, W), ``targets`` are the captions.

    Raises:
        InputError: a caption names no class of the model.

    Example::
        from phosphene import run

        run("caption_saliency", images="builtin:scenes/2", captions=["a star", "a square"]).maps.shape
    """
    names = [model.class_name(index) for index in range(model.class_count)]
    mask = torch.zeros(len(images), len(names), dtype=images.dtype, device=images.device)
    for row, caption in enumerate(captions):
        for column, name in enumerate(names):
            mask[row, column] = bool(re.search(rf"\b{re.escape(name)}\b", caption, re.IGNORECASE))
        if not mask[row].any():
            raise InputError(f"the caption {caption!r} names no class; there are {', '.join(names[:12])}")
    pixels = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((model(pixels) * mask).sum(), pixels)
    return Attribution(images=images, maps=gradient.abs().amax(1), targets=captions)


@hookimpl
def phosphene_methods():
    return [caption_saliency]
