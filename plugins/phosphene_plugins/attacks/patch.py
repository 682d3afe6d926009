"""Adversarial patch: an image patch trained under random transformations to change the predicted class."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from phosphene import (
    InputError,
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
from phosphene.spec import Cost, InvariantTo, PixelRange, param, size

from ._adam import adam_step
from ._losses import cross_entropy
from ._objectives import ObjectiveText, classifier_of, parse_objective
from ._oracle_models import five_classes
from ._parameters import Augmentations, HeldOut
from ._patch_result import AdversarialPatch
from ._perturbation_evaluation import eligible_rows, evaluate_change, predict_classes, training_count


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
    # An objective counts the images in which it holds alone; without one the brighter ones would decide.
    both = TensorDataset(torch.cat([images[:1] + 0.2, images[:3] + 0.2, images]))
    assert model(both.images).argmax(1).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    options: dict[str, Any] = {"objective": "contrast:0,1", "steps": 40, "lr": 0.05, "augmentations": ()}
    darker = patch(model, both, batch=8, held_out=0, seed=0, **options)
    assert (darker.perturbation[:, darker.mask > 0.5] == 1).all() and darker.fooling_rate > 0
    # Elsewhere the image is unchanged; at the patch's edge, which lies between pixels, it is blended.
    covered = result.adversarial != result.images
    assert (result.adversarial >= result.images).all() and (result.adversarial.amax((1, 2, 3)) > 0.99).all()
    assert covered.any() and covered.float().mean() < 0.5 and 0 < result.fooling_rate <= 1
    assert patch(model, TensorDataset(images[:1]), size=0.01, steps=1, held_out=0).mask.shape == (1, 1)
    # Adam's first step is the sign of the gradient, down to the root of the smallest number.
    tiny = torch.finfo(torch.float64).tiny ** 0.5
    gradient, zero = torch.tensor([tiny, -1.0, 0.0], dtype=torch.float64), torch.zeros(3).double()
    update, mean, square = adam_step(gradient, zero, zero, 0, 0.1)
    torch.testing.assert_close(update, torch.tensor([0.05, -0.1, 0], dtype=torch.float64))
    torch.testing.assert_close((mean, square), (0.1 * gradient, 0.001 * gradient.square()))
    _equals_plain_steps(2, "round", 0)
    _equals_plain_steps(None, "square", 2**63 - 2)
    # Pasted at its own size and angle, it covers a square of its side within the margins.
    white = _paste(
        torch.ones(1, 3, 3), torch.ones(3, 3), torch.zeros(1, 1, 7, 9), Generator(), 0.0, 1.0
    ).round()
    p, full = torch.rand(1, 3, 3), torch.ones(3, 3)  # no margin
    pasted = _paste(p, full, torch.zeros(1, 1, 3, 3), Generator(), 0.0, 1.0)
    torch.testing.assert_close(pasted[0], p)
    assert white.sum() == 9 and white.amax(3).sum() == white.amax(2).sum() == 3
    assert _outline(4, "round").tolist() == [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]
    rims = _outline(12, "glasses")
    assert rims[3:6].tolist() == [  # the upper half of both rings
        [0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1],
        [1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1],
    ]
    assert not rims[:3].any() and torch.equal(rims, rims.flip(0))


def _equals_plain_steps(target_class: int | None, shape: Literal["round", "square"], seed: int) -> None:
    """Three steps of torch's Adam on five linear classes, and success with new draws."""
    case = five_classes(7, (9, 12))
    case = replace(case, images=case.images.float().double())
    y = case.labels
    result = patch(
        case.model, TensorDataset(case.images.float()), target_class=target_class, size=0.45, shape=shape,
        steps=3, batch=3, lr=0.2, degrees=30.0, scale=1.5, augmentations=("brightness",), held_out=0.3,
        seed=seed,
    )  # fmt: skip
    mask = _outline(4, shape).double()
    assert torch.equal(result.mask, mask)
    p = torch.full((3, 4, 4), 0.5, dtype=torch.float64, requires_grad=True)

    def paste(images: Tensor, draws: Generator) -> Tensor:
        canvas = F.pad(torch.cat([p * mask, mask[None]])[None], (4, 4, 2, 3))
        canvas = rescale(rotate(canvas, draws, degrees=30.0), draws, factor=1.5)
        down, right = (int(torch.randint(-m, m + 1, (), generator=draws)) for m in (1, 3))
        color, cover = canvas.roll((down, right), (2, 3)).split([3, 1], dim=1)
        return (images * (1 - cover) + color).clamp(0, 1)

    # Without epsilon, by which Adam differs here.
    optimizer = torch.optim.Adam([p], lr=0.2, eps=0, maximize=target_class is None)
    for step in range(3):
        rows, draws = [(3 * step + i) % 5 for i in range(3)], Generator().manual_seed((seed + step) % 2**63)
        views = compose(["brightness"])(paste(case.images[rows], draws), draws)
        labels = y[rows] if target_class is None else torch.full((3,), target_class)
        optimizer.zero_grad()
        F.cross_entropy(case.model(views), labels, reduction="sum").backward()
        assert p.grad is not None
        p.grad[p.grad == 0] = 1e-200
        optimizer.step()
        p.data.clamp_(0, 1)
    inside = mask.bool().expand(3, -1, -1)
    torch.testing.assert_close(result.perturbation[inside], p.detach()[inside])
    new_draws = [Generator().manual_seed((seed + 3 + n) % 2**63) for n in range(7)]
    patched = torch.cat([paste(x[None], draw) for x, draw in zip(case.images, new_draws, strict=True)])
    after = case.model(patched).argmax(1)
    eligible = y != (-1 if target_class is None else target_class)
    success = (after != y if target_class is None else after == target_class) & eligible
    assert result.fooling_rate == float(success[:5].sum()) / int(eligible[:5].sum())
    assert result.held_out_rate == float(success[5:].sum()) / max(1, int(eligible[5:].sum()))
    torch.testing.assert_close(result.adversarial, patched[5:].detach())
    torch.testing.assert_close(result.images, case.images[5:])
    assert result.names_before == tuple(case.model.class_name(k) for k in y[5:].tolist())
    assert result.names_after == tuple(case.model.class_name(k) for k in after[5:].tolist())


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
        Reference(
            key="sharif2016",
            title="Accessorize to a Crime: Real and Stealthy Attacks on State-of-the-Art Face Recognition",
            authors="Sharif, Bhagavatula, Bauer, Reiter",
            year=2016,
            url="https://doi.org/10.1145/2976749.2978392",
        ),
    ],
    invariants=[PixelRange(field="perturbation"), PixelRange(field="adversarial")],
    relations=[
        InvariantTo("normalization", fields=("perturbation",)),
        InvariantTo("logit_shift", fields=("perturbation",)),
    ],
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
    objective: Annotated[
        ObjectiveText | None,
        Field(description="objective to change, as 'region:person'; None: the predicted class"),
    ] = None,
    size: Annotated[
        float, Field(gt=0, le=0.5, description="side of the patch, as a fraction of the image's shorter side")
    ] = 0.35,
    shape: Annotated[
        Literal["round", "square", "glasses"],
        Field(description="outline of the patch; glasses: the rims of eyeglasses"),
    ] = "round",
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

    With an ``objective`` ("region:person", "box:person", "similar:dog.png", "contrast:tabby,lynx") the patch
    changes its sign in the images in which it holds; the others are not trained on and not counted. The
    region or box is the one of each image without the patch. For a detector the default is the box of the
    highest score.

    Returns:
        AdversarialPatch with ``perturbation`` (C, p, p) and ``mask`` (p, p), ``fooling_rate`` on the training
        images, ``held_out_rate``, each with new draws of t, and some images (P, C, H, W) with and without it.

    Raises:
        UnknownName: the model has no such class.
        InputError: ``target_class`` and ``objective`` are both set, or the objective holds in none of the
            training images.
        ModelError: no gradient flows from the model's logits to the images.

    Example::
        from phosphene import run

        result = run("patch", dataset="builtin:scenes/8", target_class="circle", steps=3, batch=2, seed=0)
        result.perturbation.shape  # (3, 22, 22)

    Source: Brown et al. 2017, section 2; Athalye et al. 2018, section 2.
    """
    if target_class is not None and objective is not None:
        raise InputError(
            f"target_class={target_class!r} is a class to be predicted and objective={objective!r} what is "
            "changed instead of the predicted class: leave one of them out"
        )
    target = None if target_class is None else model.class_index(target_class)
    criterion = parse_objective(objective, model) if target is None else None
    count = training_count(dataset, held_out)
    channels, height, width = dataset.read([0]).shape[1:]
    side = max(1, round(size * min(height, width)))
    mask = _outline(side, shape).to(model.device, model.dtype)
    augment, seed = compose(augmentations), seed or 0
    gray = torch.full((channels, side, side), 0.5, device=model.device, dtype=model.dtype)
    state = {"patch": gray, "mean": torch.zeros_like(gray), "square": torch.zeros_like(gray)}
    remaining_steps = resumable(range(steps), state, "adversarial patch")
    predictions = predict_classes(model, dataset, objective=criterion)
    trained = (
        torch.arange(count)
        if criterion is None
        else eligible_rows(predictions[:count], criterion, model).cpu()
    )
    part_size = batch_size(model) if criterion is None else 1
    p, mean, square = state["patch"], state["mean"], state["square"]

    for step in remaining_steps:
        indices = [(step * batch + i) % len(trained) for i in range(min(batch, len(trained)))]
        gradient = torch.zeros_like(p)
        for part in trained[indices].split(part_size):
            images = dataset.read(part.tolist()).to(model.device, model.dtype)
            labels = predictions[part] if target is None else torch.full_like(predictions[part], target)
            # equivalent mutants: torch's generator on the CPU uses the lower 32 bits of a seed
            draws = Generator().manual_seed((seed + step) % 2**63)  # the same for every part of a step
            # equivalent mutants: results are detached
            leaf = p.detach().requires_grad_()
            patched = augment(_paste(leaf, mask, images, draws, degrees, scale), draws)
            # equivalent mutants: Adam's step does not depend on the scale of the gradients
            loss = cross_entropy(classifier_of(model, criterion, images)(patched), labels).sum() * (
                1 if target is None else -1
            )
            gradient += torch.autograd.grad(loss, leaf)[0]
        update, mean, square = adam_step(gradient, mean, square, step, lr)
        p = (p + update).clamp(0, 1)
        state |= {"patch": p, "mean": mean, "square": square}

    paste_each = _PastePatch(p, mask, degrees, scale, seed + steps)
    with torch.no_grad():
        evaluation = evaluate_change(model, dataset, count, predictions, paste_each, target, criterion)
    return AdversarialPatch(perturbation=p, mask=mask, **evaluation)


@dataclass(frozen=True)
class _PastePatch:
    """Images (N, C, H, W) with the patch ``p`` (C, p, p), each transformed by draws of its own."""

    p: Tensor
    mask: Tensor
    degrees: float
    scale: float
    seed: int

    def __call__(self, images: Tensor, indices: Sequence[int]) -> Tensor:
        # equivalent mutants: torch's generator on the CPU uses the lower 32 bits of a seed
        draws = (Generator().manual_seed((self.seed + index) % 2**63) for index in indices)
        pasted = [
            _paste(self.p, self.mask, image[None], draw, self.degrees, self.scale)
            for image, draw in zip(images, draws, strict=True)
        ]
        return torch.cat(pasted)


def _outline(side: int, shape: str) -> Tensor:
    """The patch's mask (p, p): 1 inside; of glasses two rings, each half as wide as the patch."""
    if shape == "square":
        return torch.ones(side, side)
    offset = torch.arange(side) - (side - 1) / 2
    if shape == "glasses":
        radius = torch.hypot(offset[:, None], offset.abs() - side / 4)
        return ((radius <= side / 4) & (radius >= side / 7)).float()
    # equivalent mutants: no pixel's center lies on the circle
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
    # equivalent mutants: the color is at most the mask, so that only rounding is clipped
    return (images * (1 - canvas[:, -1:]) + canvas[:, :-1]).clamp(0, 1)


@hookimpl
def phosphene_methods():
    return [patch]
