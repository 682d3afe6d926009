"""Adversarial patch: an image patch trained under random transformations to change the predicted class."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from phosphene import (
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    method,
    resumable,
)
from phosphene.optimize import compose, rescale, rotate
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import Cost, PixelRange, param, size

from ._adam import adam_step
from ._losses import cross_entropy
from ._parameters import Augmentations, HeldOut
from ._patch_result import AdversarialPatch
from ._perturbation_evaluation import evaluate_change, predict_classes, training_count


def becomes_white_for_a_brightness_detector() -> None:
    """Where the target logit is the mean brightness, the patch becomes white, wherever it lies."""
    linear = nn.Linear(1, 2).double()
    linear.weight.data = torch.tensor([[0.0], [8.0]], dtype=torch.float64)
    linear.bias.data = torch.tensor([2.0, 0.0], dtype=torch.float64)
    model = load_model(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear), input_size=(1, 16, 16))
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.2
    result = patch(model, TensorDataset(images), target_class=1, steps=40, lr=0.05, augmentations=(), seed=0)
    inside = result.perturbation[:, result.mask > 0.5]
    torch.testing.assert_close(inside, torch.ones_like(inside))
    # Elsewhere the image is unchanged; at the patch's edge, which lies between pixels, it is blended.
    covered = result.adversarial != result.images
    assert (result.adversarial >= result.images).all() and (result.adversarial.amax((1, 2, 3)) > 0.99).all()
    assert covered.any() and covered.float().mean() < 0.5 and 0 < result.fooling_rate <= 1


@method(
    family="attacks",
    title="Adversarial patch",
    references=[
        Reference(
            key="brown2017",
            title="Adversarial Patch",
            authors="Brown, Mané, Roy, Abadi, Gilmer",
            year=2017,
            url="https://arxiv.org/abs/1712.09665",
        ),
        Reference(
            key="athalye2018",
            title="Synthesizing Robust Adversarial Examples",
            authors="Athalye, Engstrom, Ilyas, Kwok",
            year=2018,
            url="https://arxiv.org/abs/1707.07397",
        ),
    ],
    invariants=[PixelRange(field="perturbation"), PixelRange(field="adversarial")],
    needs=["gradients", "dataset"],
    cost=Cost(forward=param.steps * param.batch + 2 * size.dataset, backward=param.steps * param.batch),
    tags=["white-box", "physical"],
    oracle=becomes_white_for_a_brightness_detector,
    quick={"steps": 3, "batch": 2},
    demo={"dataset": "builtin:scenes/32", "steps": 60, "batch": 4, "lr": 0.1},
)
def patch(
    model: Model,
    dataset: Dataset,
    *,
    target_class: Annotated[
        str | int | None, Field(description="class to be predicted; None: any but the predicted one")
    ] = None,
    size: Annotated[
        float, Field(gt=0, le=0.5, description="side of the patch, as a fraction of the image's shorter side")
    ] = 0.35,
    shape: Annotated[Literal["round", "square"], Field(description="outline of the patch")] = "round",
    steps: Annotated[int, Field(ge=1, le=100_000, description="number of Adam steps")] = 200,
    batch: Annotated[int, Field(ge=1, le=1000, description="number of images for each step")] = 8,
    lr: Annotated[float, Field(gt=0, le=1, description="Adam's step size, for pixels in [0, 1]")] = 0.05,
    degrees: Annotated[float, Field(ge=0, le=180, description="largest rotation in either direction")] = 20.0,
    scale: Annotated[float, Field(ge=1, le=2, description="largest factor of enlarging or shrinking")] = 1.25,
    augmentations: Augmentations = ("brightness",),
    held_out: HeldOut = 0.25,
    seed: Seed = None,
) -> AdversarialPatch:
    """Adversarial patch: a patch trained under random transformations (EOT) to change the predicted class.

    max_p E_{x, t} log P(target_class | t(p) pasted on x)

    over the images x of a data set and over random positions, rotations and scales t; without
    ``target_class`` the cross-entropy of the class predicted for x itself is maximized instead. Every step
    draws one t for ``batch`` images, pastes the patch, applies ``augmentations`` to the image, and
    updates the patch by Adam, clipped to [0, 1]. The last images of the data set, a fraction ``held_out``,
    are not trained on. An interrupted run can be resumed.

    Returns:
        AdversarialPatch with ``perturbation`` (C, p, p) and ``mask`` (p, p), ``fooling_rate`` on the training
        images, ``held_out_rate``, each with new draws of t, and some images (P, C, H, W) with and without it.

    Raises:
        UnknownName: the model has no such class.
        ModelError: no gradient flows from the model's logits to the images.

    Example::
        from phosphene import run

        result = run("patch", dataset="builtin:scenes/8", target_class="circle", steps=3, batch=2, seed=0)
        result.perturbation.shape  # (3, 22, 22)

    Source: Brown et al. 2017, section 2; Athalye et al. 2018, section 2.
    """
    target = None if target_class is None else model.class_index(target_class)
    count = training_count(dataset, held_out)
    channels, height, width = dataset.read([0]).shape[1:]
    side = max(1, round(size * min(height, width)))
    mask = _outline(side, shape).to(model.device, model.dtype)
    augment, seed = compose(augmentations), seed or 0
    gray = torch.full((channels, side, side), 0.5, device=model.device, dtype=model.dtype)
    state = {"patch": gray, "mean": torch.zeros_like(gray), "square": torch.zeros_like(gray)}
    remaining_steps = resumable(range(steps), state, "adversarial patch")
    if "predictions" not in state:
        state["predictions"] = predict_classes(model, dataset)
    predictions = state["predictions"].to(model.device)
    p, mean, square = state["patch"], state["mean"], state["square"]

    def paste(p: Tensor, images: Tensor, generator: Generator) -> Tensor:
        return _paste(p, mask, images, generator, degrees, scale)

    for step in remaining_steps:
        indices = [(step * batch + i) % count for i in range(min(batch, count))]
        gradient = torch.zeros_like(p)
        for part in torch.tensor(indices).split(batch_size(model)):
            images = dataset.read(part.tolist()).to(model.device, model.dtype)
            labels = predictions[part] if target is None else torch.full_like(predictions[part], target)
            draws = Generator().manual_seed((seed + step) % 2**63)  # the same for every part of a step
            leaf = p.detach().requires_grad_()
            patched = augment(paste(leaf, images, draws), draws)
            loss = cross_entropy(model(patched), labels).sum() * (1 if target is None else -1)
            gradient += torch.autograd.grad(loss, leaf)[0]
        update, mean, square = adam_step(gradient, mean, square, step, lr)
        p = (p + update).clamp(0, 1)
        state |= {"patch": p, "mean": mean, "square": square}

    def paste_each(images: Tensor, indices: Sequence[int]) -> Tensor:
        draws = (Generator().manual_seed((seed + steps + index) % 2**63) for index in indices)
        return torch.cat([paste(p, image[None], draw) for image, draw in zip(images, draws, strict=True)])

    with torch.no_grad():
        evaluation = evaluate_change(model, dataset, count, predictions, paste_each, target)
    return AdversarialPatch(perturbation=p, mask=mask, **evaluation)


def _outline(side: int, shape: str) -> Tensor:
    """The patch's mask (p, p): 1 inside."""
    if shape == "square":
        return torch.ones(side, side)
    offset = torch.arange(side) - (side - 1) / 2
    return (offset[:, None].square() + offset.square() <= (side / 2) ** 2).float()


def _paste(
    p: Tensor, mask: Tensor, images: Tensor, generator: Generator, degrees: float, scale: float
) -> Tensor:
    """Images (N, C, H, W) with the patch, rotated, resized and moved at random, the same for all."""
    height, width = images.shape[2:]
    side = len(mask)
    top, left = (height - side) // 2, (width - side) // 2
    # Zero outside the mask, color and mask alike, so that interpolation mixes in no color from outside.
    canvas = F.pad(
        torch.cat([p * mask, mask[None]])[None], (left, width - side - left, top, height - side - top)
    )
    canvas = rescale(rotate(canvas, generator, degrees=degrees), generator, factor=scale)
    margins = [max(0, math.floor((extent - side * scale) / 2)) for extent in (height, width)]
    shifts = [int(torch.randint(-margin, margin + 1, (), generator=generator)) for margin in margins]
    canvas = torch.roll(canvas, shifts, (2, 3))
    return (images * (1 - canvas[:, -1:]) + canvas[:, :-1]).clamp(0, 1)


@hookimpl
def phosphene_methods():
    return [patch]
