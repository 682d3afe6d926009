"""The adversarial patch: a sticker that works wherever, however turned and however large it is seen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

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
    progress_bar,
    save_progress,
    saved_progress,
)
from phosphene.optimize import compose, rescale, rotate
from phosphene.results import Panel
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import Cost, PixelRange, param, size

from ._gradients import Under, cross_entropy
from .universal import UniversalPerturbation, said_of, shown, training_count


@dataclass(frozen=True, eq=False, kw_only=True)
class AdversarialPatch(UniversalPerturbation):
    """A patch, ``perturbation`` (C, p, p) in [0, 1] where ``mask`` (p, p) is 1, and pictures with it on them.

    The rates are shares of the pictures of which the model did not say so before.
    """

    mask: Tensor

    def _portrait(self) -> Panel:
        return Panel(self.perturbation * self.mask + (1 - self.mask), self._rates(), is_output=True)


def becomes_what_a_linear_model_looks_for() -> None:
    """The score of a class that is the mean brightness: the patch becomes white, wherever it lies."""
    linear = nn.Linear(1, 2).double()
    linear.weight.data = torch.tensor([[0.0], [8.0]], dtype=torch.float64)
    linear.bias.data = torch.tensor([2.0, 0.0], dtype=torch.float64)
    model = load_model(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear), input_size=(1, 16, 16))
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.2
    found = patch(model, TensorDataset(images), wanted=1, steps=40, lr=0.05, under=(), seed=0)
    inside = found.perturbation[:, found.mask > 0.5]
    torch.testing.assert_close(inside, torch.ones_like(inside))


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
    cost=Cost(forward=param.steps * param.pictures + 2 * size.dataset, backward=param.steps * param.pictures),
    tags=["white-box", "physical"],
    oracle=becomes_what_a_linear_model_looks_for,
    quick={"steps": 3, "pictures": 2},
    demo={"dataset": "builtin:scenes/32", "steps": 60, "pictures": 4, "lr": 0.1},
)
def patch(
    model: Model,
    dataset: Dataset,
    *,
    wanted: Annotated[
        str | int | None, Field(description="the class to be seen; any but the right one when absent")
    ] = None,
    size: Annotated[
        float, Field(gt=0, le=0.5, description="its side, as a share of the shorter side")
    ] = 0.35,
    shape: Annotated[Literal["round", "square"], Field(description="what is cut out")] = "round",
    steps: Annotated[int, Field(ge=1, le=100_000, description="how many steps of Adam")] = 200,
    pictures: Annotated[int, Field(ge=1, le=1000, description="how many pictures a step sees")] = 8,
    lr: Annotated[float, Field(gt=0, le=1, description="Adam's step size, in pixels")] = 0.05,
    degrees: Annotated[float, Field(ge=0, le=180, description="how far it may be turned either way")] = 20.0,
    scale: Annotated[float, Field(ge=1, le=2, description="by how much it may be larger, or smaller")] = 1.25,
    under: Under = ("brightness",),
    held_out: Annotated[float, Field(ge=0, lt=1, description="share of the pictures to test it on")] = 0.25,
    seed: Seed = None,
) -> AdversarialPatch:
    """Learn a sticker that changes what the model sees wherever it is stuck: an attack on the physical world.

    max_p E_{x, t} log P(wanted | t(p) pasted on x)

    over the pictures x of a data set and over random places, turns and sizes t; without ``wanted`` the
    cross-entropy of what the model says of x itself is raised instead. Every step draws one t for
    ``pictures`` pictures, pastes, changes the whole picture ``under`` what a camera may do, and moves the
    patch by Adam, clipped to [0, 1]. The last pictures of the data set, a share ``held_out``, take no part:
    ``held_out_rate`` is how many of them are taken for what is wanted (or for something else), each t drawn
    anew, and ``fooling_rate`` how many of those learned from. A run that was cut off goes on.

    Source: Brown et al. 2017, section 2; Athalye et al. 2018, section 2.
    """
    index = None if wanted is None else model.class_index(wanted)
    count = training_count(dataset, held_out)
    channels, height, width = dataset.read([0]).shape[1:]
    side = max(1, round(size * min(height, width)))
    mask = _cut(side, shape).to(model.device, model.dtype)
    change, seed = compose(under), seed or 0
    state: dict[str, Any] = saved_progress() or {
        "step": 0,
        "said": said_of(model, dataset),
        "patch": torch.full((channels, side, side), 0.5, dtype=model.dtype),
        "mean": torch.zeros(channels, side, side, dtype=model.dtype),
        "square": torch.zeros(channels, side, side, dtype=model.dtype),
    }
    said, p, mean, square = (state[n].to(model.device) for n in ("said", "patch", "mean", "square"))
    first = state["step"]

    def pasted(p: Tensor, images: Tensor, generator: Generator) -> Tensor:
        return _pasted(p, mask, images, generator, degrees, scale)

    for step in progress_bar(range(first, steps), "learning the patch", steps - first):
        numbers = [(step * pictures + i) % count for i in range(min(pictures, count))]
        gradient = torch.zeros_like(p)
        for some in torch.tensor(numbers).split(batch_size(model)):
            images = dataset.read(some.tolist()).to(model.device, model.dtype)
            labels = said[some] if index is None else torch.full_like(said[some], index)
            draws = Generator().manual_seed((seed + step) % 2**63)  # the same for every part of a step
            place = p.detach().requires_grad_()
            seen = change(pasted(place, images, draws), draws)
            loss = cross_entropy(model(seen), labels).sum() * (1 if index is None else -1)
            gradient += torch.autograd.grad(loss, place)[0]
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient.square()
        tiny = torch.finfo(p.dtype).tiny ** 0.5
        spread = (square / (1 - 0.999 ** (step + 1))).sqrt() + tiny
        p = (p + lr * (mean / (1 - 0.9 ** (step + 1))) / spread).clamp(0, 1)
        save_progress(step=step + 1, said=said, patch=p, mean=mean, square=square)

    def stuck(images: Tensor, places: Sequence[int]) -> Tensor:
        draws = (Generator().manual_seed((seed + steps + place) % 2**63) for place in places)
        return torch.cat([pasted(p, image[None], draw) for image, draw in zip(images, draws, strict=True)])

    with torch.no_grad():
        return AdversarialPatch(perturbation=p, mask=mask, **shown(model, dataset, count, said, stuck, index))


def _cut(side: int, shape: str) -> Tensor:
    """The patch's outline (p, p): 1 inside."""
    if shape == "square":
        return torch.ones(side, side)
    middle = torch.arange(side) - (side - 1) / 2
    return (middle[:, None].square() + middle.square() <= (side / 2) ** 2).float()


def _pasted(
    p: Tensor, mask: Tensor, images: Tensor, generator: Generator, degrees: float, scale: float
) -> Tensor:
    """Images (N, C, H, W) with the patch on them, turned, resized and moved at random, all the same."""
    height, width = images.shape[2:]
    side = len(mask)
    top, left = (height - side) // 2, (width - side) // 2
    # What is outside the mask is nothing yet, so that interpolation mixes no colour in.
    canvas = F.pad(
        torch.cat([p * mask, mask[None]])[None], (left, width - side - left, top, height - side - top)
    )
    canvas = rescale(rotate(canvas, generator, degrees=degrees), generator, factor=scale)
    room = [max(0, math.floor((extent - side * scale) / 2)) for extent in (height, width)]
    moves = [int(torch.randint(-most, most + 1, (), generator=generator)) for most in room]
    canvas = torch.roll(canvas, moves, (2, 3))
    return (images * (1 - canvas[:, -1:]) + canvas[:, :-1]).clamp(0, 1)


@hookimpl
def phosphene_methods():
    return [patch]
