"""RISE: random masks, each weighted by how well the model still recognises what it leaves to be seen."""

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Class,
    InputError,
    Method,
    Reference,
    batch_size,
    hookimpl,
    load_model,
    method,
    progress_bar,
    scores,
)
from phosphene.images import Baseline, baseline_images
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Seed, Target
from phosphene.spec import Cost, MapPerPixel, param, size
from phosphene.targets import Objective, Predicted


def linear_model_shows_how_its_masks_go_together() -> None:
    """On a linear model the map is the masks' second moments, times w x, over p."""
    torch.manual_seed(0)
    linear = nn.Linear(3 * 6 * 5, 2, bias=False)
    model = load_model(nn.Sequential(nn.Flatten(), linear).double(), input_size=(3, 6, 5))
    images = torch.rand(2, 3, 6, 5, dtype=torch.float64)
    masks = random_masks(40, (6, 5), grid=2, keep=0.4, seed=3)(range(40)).double().flatten(1)
    for index in (0, 1):
        maps = rise(model, images, index, masks=40, grid=2, keep=0.4, score="logit", seed=3).maps
        shares = (images * linear.weight[index].view(3, 6, 5)).sum(1).flatten(1)
        torch.testing.assert_close(maps.flatten(1), shares @ masks.T @ masks / (40 * 0.4))


@method(
    family="attribution",
    title="RISE",
    references=[
        Reference(
            key="petsiuk2018",
            title="RISE: Randomized Input Sampling for Explanation of Black-box Models",
            authors="Petsiuk, Das, Saenko",
            year=2018,
            url="https://arxiv.org/abs/1806.07421",
        )
    ],
    invariants=[MapPerPixel()],
    cost=Cost(forward=size.images * (1 + param.masks)),
    oracle=linear_model_shows_how_its_masks_go_together,
    quick={"masks": 20},
    demo={"masks": 400},
)
def rise(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    masks: Annotated[int, Field(ge=1, le=100_000, description="how many")] = 2000,
    grid: Annotated[int, Field(ge=1, le=64, description="cells of a mask in a row and in a column")] = 7,
    keep: Annotated[float, Field(gt=0, le=1, description="p, the chance of a cell to be seen")] = 0.5,
    baseline: Annotated[Baseline, Field(description="what hides")] = "zero",
    score: Annotated[
        Literal["probability", "logit"] | None, Field(description="of a class; probability unless told")
    ] = None,
    seed: Seed = None,
) -> Attribution:
    """Show what has to be seen for the score to be high, by hiding random parts of the picture.

    M_ij = 1 / (N p) sum_k S(I * m^k) m^k_ij,  m^k in [0, 1] random

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, H, W), raw. A mask is a grid of zeros and ones, each
    one with the chance ``keep``, enlarged bilinearly by one cell more than the picture has and cut out at
    a random place. All images get the same masks, and what they hide is filled with ``baseline`` (zero is
    the paper's; the blur is by an eighth of the shorter side). S is a class's probability unless
    ``score`` says logit, and the value of any other target; the target is decided on the whole picture.
    The map's level means little, its relief does. Raises InputError where a probability is wanted of a
    target that is not a class.

    Source: Petsiuk, Das & Saenko 2018, equation 6.
    """
    is_class = isinstance(target, (Class, Predicted))
    if score == "probability" and not is_class:
        raise InputError(f"only a class has a probability, {target} has none: use score='logit'")

    def score_of(pictures: Tensor, wanted: Objective) -> Tensor:
        if score == "logit" or not is_class:
            return scores(model, pictures, wanted)
        return wanted.score(model(pictures).softmax(1))

    count, _, height, width = images.shape
    score_of(images, target)  # decides which class is meant
    hidden = baseline_images(images, baseline, sigma=min(height, width) / 8, seed=seed)
    drawn = random_masks(masks, (height, width), grid=grid, keep=keep, seed=seed)
    size = batch_size(model)
    maps = torch.zeros_like(images[:, 0])
    for start in progress_bar(range(0, masks, size), "masking"):
        seen = drawn(range(start, min(start + size, masks))).to(images)
        for n in range(count):
            pictures = hidden[n] + (images[n] - hidden[n]) * seen[:, None]
            values = score_of(pictures, target.select([n] * len(seen)))
            maps[n] += torch.einsum("k,khw->hw", values, seen)
    return Attribution(images=images, maps=maps / (masks * keep), targets=target.names(model, count))


def random_masks(count: int, size: tuple[int, int], *, grid: int, keep: float, seed: int | None) -> Any:
    """A function that gives the masks of these numbers, (n, H, W) in [0, 1], however many at a time."""
    generator = torch.Generator().manual_seed(seed or 0)
    cells = (torch.rand(count, 1, grid, grid, generator=generator) < keep).float()
    steps = [math.ceil(side / grid) for side in size]
    shifts = torch.stack(
        [torch.randint(0, step, (count,), generator=generator) for step in steps], 1
    ).tolist()

    def masks(numbers: range) -> Tensor:
        large = F.interpolate(
            cells[numbers.start : numbers.stop], [(grid + 1) * s for s in steps], mode="bilinear"
        )
        cut = zip(large[:, 0], shifts[numbers.start : numbers.stop], strict=True)
        seen = [mask[top : top + size[0], left : left + size[1]] for mask, (top, left) in cut]
        return torch.stack(seen).clamp(0, 1)  # rounding

    return masks


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [rise]
