"""RISE: mean of random masks weighted by the score of the masked image."""

import itertools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from phosphene import (
    Class,
    InputError,
    Method,
    Reference,
    batch_size,
    hookimpl,
    max_batch,
    method,
    progress_bar,
    scores,
)
from phosphene.images import Baseline, baseline_images
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Seed, Target
from phosphene.spec import Cost, InvariantTo, LinearIn, MapPerPixel, ScalesWith, param, size
from phosphene.targets import Objective, Predicted
from phosphene.testing import linear_model


def second_moments_of_the_masks_on_a_linear_model() -> None:
    """On a linear model a mask's score is S(b) + sum m w (x - b), and the map their sum over masks by N p.

    A mask is a linear interpolation between the two cells along each side. One that is 1 everywhere makes
    the map the score.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, 7, 5, dtype=torch.float64, generator=generator)
    images = torch.rand(2, 3, 7, 5, dtype=torch.float64, generator=generator)
    model = linear_model(weight)
    baselines: tuple[tuple[Baseline, Tensor], ...] = (
        ("zero", torch.zeros_like(images)),
        ("mean", images.mean((2, 3), keepdim=True).expand_as(images)),
        ("blur", baseline_images(images, "blur", sigma=5 / 8)),
        ("noise", baseline_images(images, "noise", sigma=5 / 8, seed=0)),
    )
    draw = torch.Generator().manual_seed(0)
    cells = (torch.rand(40, 2, 2, generator=draw) < 0.4).double()
    vertical, horizontal = (
        # Enlarged by the factor 3 step / 2, with a random offset in front of the first pixel.
        ((torch.randint(0, step, (40, 1), generator=draw) + torch.arange(side) + 0.5) / (1.5 * step) - 0.5)
        .clamp(0, 1)
        .double()
        for side, step in ((7, 4), (5, 3))
    )
    vertical, horizontal = (torch.stack([1 - at, at], 2) for at in (vertical, horizontal))
    masks = (vertical @ cells @ horizontal.mT).flatten(1)
    for index, (name, start) in itertools.product((0, 1), baselines):
        settings: dict[str, Any] = {"masks": 40, "grid": 2, "keep_probability": 0.4, "seed": 0}
        with max_batch(16):
            result = rise(model, images, index, **settings, baseline=name, score="logit")
        changes = ((images - start) * weight[index]).sum(1).flatten(1)
        values = changes @ masks.T + (start * weight[index]).sum((1, 2, 3))[:, None]
        torch.testing.assert_close(result.maps.flatten(1), values @ masks / (40 * 0.4))
        assert result.targets == (f"class {index}",) * 2
    predicted = model(images).softmax(1).amax(1)
    for score in (None, "probability"):
        maps = rise(model, images, masks=3, grid=1, keep_probability=1, score=score, seed=0).maps  # type: ignore[arg-type]
        torch.testing.assert_close(maps, predicted[:, None, None].expand_as(maps))
    maps = rise(model, images, lambda logits: logits[:, 1], masks=3, grid=1, keep_probability=1, seed=0).maps
    torch.testing.assert_close(maps, model(images)[:, 1, None, None].expand_as(maps))


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
    oracle=second_moments_of_the_masks_on_a_linear_model,
    relations=[
        ScalesWith("logits", power=1, where={"score": "logit"}),
        LinearIn("target", where={"score": "logit"}),
        InvariantTo("logit_shift"),
        InvariantTo("batch_order"),
    ],
    quick={"masks": 20},
    demo={"masks": 400},
)
def rise(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    masks: Annotated[int, Field(ge=1, le=100_000, description="number of random masks")] = 2000,
    grid: Annotated[int, Field(ge=1, le=64, description="cells of a mask in a row and in a column")] = 7,
    keep_probability: Annotated[
        float, Field(gt=0, le=1, description="probability p that a cell of a mask is visible")
    ] = 0.5,
    baseline: Annotated[Baseline, Field(description="content of the masked pixels")] = "zero",
    score: Annotated[
        Literal["probability", "logit"] | None,
        Field(description="value of a class that weights the masks; default: probability"),
    ] = None,
    seed: Seed = None,
) -> Attribution:
    """RISE: mean of random masks weighted by the score of the masked image.

    M_ij = 1 / (N p) sum_k S(I * m^k) m^k_ij,  m^k in [0, 1] random

    A mask is a grid of independent Bernoulli cells with parameter ``keep_probability``, enlarged
    bilinearly by one cell more than the image has and cropped at a random offset. All images get the same
    masks; masked pixels are filled with ``baseline`` ("zero" in the paper; "blur": sigma 1/8 of the shorter
    side). S is the probability of a class, or its logit, and the value of any other target; a predicted
    target is the class predicted for the unmasked image. Only differences within a map are meaningful, not
    its mean.

    Returns:
        ``maps`` (N, H, W), raw.

    Raises:
        InputError for a probability of a target that is not a class.

    Example::
        from phosphene import run

        result = run("rise", images="builtin:scenes/1", masks=50)
        result.maps.shape  # (1, 64, 64)

    Source:
        Petsiuk, Das & Saenko 2018, equation 6.
    """
    is_class = isinstance(target, (Class, Predicted))
    if score == "probability" and not is_class:
        raise InputError(f"only a class has a probability, {target} has none: use score='logit'")

    def weights_of(batch: Tensor, batch_target: Objective) -> Tensor:
        if score == "logit" or not is_class:
            return scores(model, batch, batch_target)
        return batch_target.score(model.probabilities(batch))

    count, _, height, width = images.shape
    weights_of(images, target)  # a predicted target becomes the class predicted for the unmasked image
    filling = baseline_images(images, baseline, sigma=min(height, width) / 8, seed=seed)
    sample_masks = random_masks(
        masks, (height, width), grid=grid, keep_probability=keep_probability, seed=seed
    )
    size = batch_size(model)
    maps = torch.zeros_like(images[:, 0])
    for start in progress_bar(range(0, masks, size), "masking"):
        batch = sample_masks(range(start, min(start + size, masks))).to(images)
        for n in range(count):
            masked = filling[n] + (images[n] - filling[n]) * batch[:, None]
            weights = weights_of(masked, target.select([n] * len(batch)))
            maps[n] += torch.einsum("k,khw->hw", weights, batch)
    maps = maps / (masks * keep_probability)
    return Attribution(images=images, maps=maps, targets=target.names(model, count))


def random_masks(
    count: int, size: tuple[int, int], *, grid: int, keep_probability: float, seed: int | None
) -> Callable[[range], Tensor]:
    """A function that returns the masks of a range of indices, (n, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed or 0)
    # equivalent mutants: a draw is never equal to the probability
    cells = (torch.rand(count, 1, grid, grid, generator=generator) < keep_probability).float()
    steps = [math.ceil(side / grid) for side in size]
    shifts = torch.stack(
        [torch.randint(0, step, (count,), generator=generator) for step in steps], 1
    ).tolist()

    def masks(indices: range) -> Tensor:
        chunk = slice(indices.start, indices.stop)
        enlarged = F.interpolate(cells[chunk], [(grid + 1) * step for step in steps], mode="bilinear")
        shifted = zip(enlarged[:, 0], shifts[chunk], strict=True)
        crops = [mask[top : top + size[0], left : left + size[1]] for mask, (top, left) in shifted]
        # Rounding may leave interpolated values just outside [0, 1].
        return torch.stack(crops).clamp(0, 1)

    return masks


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [rise]
