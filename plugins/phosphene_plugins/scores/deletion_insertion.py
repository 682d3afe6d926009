"""Deletion and insertion: how fast the score falls, or comes, by a map's order of pixels."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Method, Reference, TensorDataset, hookimpl, load_model, method
from phosphene.images import Baseline, baseline_images
from phosphene.roles import Dataset, Model, Seed

from ._evaluate_maps import (
    About,
    Budget,
    Explained,
    Measure,
    MethodName,
    MethodParams,
    Pictures,
    Pool,
    Table,
    baselines,
    from_method,
    ranks,
    score,
)
from ._score_table import Scores, means

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Steps = Annotated[int, Field(ge=1, le=1000, description="equal parts of the picture, one after the other")]
Hidden = Annotated[Baseline, Field(description="what stands for pixels that are not there")]
Read = Literal["probability", "logit"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Curves(Scores):
    """Scores that are areas under curves, with the curves.

    ``deletion`` and ``insertion`` (rows, steps + 1) are means over the pictures, ``fractions``
    (steps + 1,) how much of the picture has been changed.
    """

    fractions: Tensor
    deletion: Tensor
    insertion: Tensor

    def figure(self) -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
        for axis, c, title in zip(figure.subplots(1, 2), (0, 1), ("deletion", "insertion"), strict=True):
            for r, name in enumerate(self.names):
                label = f"{name.replace('_', ' ')}: {self._text(r, c, 0)}"
                axis.plot(self.fractions.cpu(), getattr(self, title)[r].cpu(), label=label)
            axis.set_title(f"{title} ({'higher' if self.higher[c] else 'lower'} is better)", fontsize=9)
            axis.set_xlabel("share of the pixels", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.legend(fontsize=7, frameon=False)
            axis.spines[["top", "right"]].set_visible(False)
        return figure


def curves(seen: Explained, steps: int, hidden: Baseline, read: Read, seed: int) -> Tensor:
    """The score after each step of deletion, then of insertion: (n, 2, steps + 1)."""
    images = seen.images
    absent = baseline_images(images, hidden, sigma=min(images.shape[2:]) / 8, seed=seed)
    rank = ranks(seen.maps)[:, None]

    def value(pictures: Tensor) -> Tensor:
        logits = seen.model(pictures)
        return seen.target.score(logits.softmax(1) if read == "probability" else logits)

    bounds = places_of(steps, rank[0].numel())
    whole, nothing = value(images), value(absent)
    between = bounds[1:-1]
    fall = [value(torch.where(rank < bound, absent, images)) for bound in between]
    rise = [value(torch.where(rank < bound, images, absent)) for bound in between]
    return torch.stack([torch.stack([whole, *fall, nothing], 1), torch.stack([nothing, *rise, whole], 1)], 1)


def places_of(steps: int, pixels: int) -> list[int]:
    """How many pixels have been changed after each step; never more steps than pixels."""
    steps = min(steps, pixels)
    return [round(pixels * step / steps) for step in range(steps + 1)]


def areas(curve: Tensor, bounds: list[int]) -> Tensor:
    """The area under curves (..., steps + 1) over the true shares of pixels, by trapezoids."""
    at = torch.tensor(bounds, dtype=curve.dtype, device=curve.device) / bounds[-1]
    return torch.trapezoid(curve, at)


def faithfulness(steps: int, hidden: Baseline, read: Read, seed: int) -> Measure:
    """The two areas."""

    def measure(seen: Explained) -> Tensor:
        return areas(curves(seen, steps, hidden, read, seed), places_of(steps, seen.maps[0].numel()))

    return Measure(("deletion", "insertion"), (False, True), measure)


def additive_model_sums_up() -> None:
    """Where the score is a sum over pixels, every step takes away what its pixels brought."""
    weight = torch.randn(16, generator=torch.Generator().manual_seed(0))
    linear = nn.Linear(16, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([weight, -weight]))
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 4, 4), mean=[0.0], std=[1.0])
    images = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    gains = weight * images.flatten()
    found = deletion_insertion(
        model, TensorDataset(images, ["0"]), method="gradient_x_input", steps=16, hidden="zero",
        read="logit", seed=0,
    )  # fmt: skip
    sums = torch.cat([torch.zeros(1), gains.sort(descending=True).values.cumsum(0)])
    torch.testing.assert_close(found.insertion[0], sums)
    torch.testing.assert_close(found.deletion[0], gains.sum() - sums)
    torch.testing.assert_close(found.values[0, 0, 1], torch.trapezoid(sums) / 16)


@method(
    family="scores",
    title="Deletion and insertion",
    references=[
        Reference(
            key="petsiuk2018",
            title="RISE: Randomized Input Sampling for Explanation of Black-box Models",
            authors="Petsiuk, Das, Saenko",
            year=2018,
            url="https://arxiv.org/abs/1806.07421",
        ),
        Reference(
            key="samek2017",
            title="Evaluating the Visualization of What a Deep Neural Network Has Learned",
            authors="Samek, Binder, Montavon, Lapuschkin, Müller",
            year=2017,
            url="https://arxiv.org/abs/1509.06321",
        ),
    ],
    needs=["dataset"],
    oracle=additive_model_sums_up,
    quick={"method": "grad_cam", "params": {}, "pictures": 2, "budget": 40, "steps": 3},
    demo={"pictures": 8},
)
def deletion_insertion(
    model: Model,
    dataset: Dataset,
    *,
    method: MethodName = "grad_cam",
    params: MethodParams = {},  # noqa: B006
    target: About = "label",
    steps: Steps = 16,
    hidden: Hidden = "blur",
    read: Annotated[Read, Field(description="of the class")] = "probability",
    pictures: Pictures = 100,
    budget: Budget = 20_000,
    seed: Seed = None,
) -> Curves:
    """Take a picture's pixels away in a map's order, or bring them, and watch the score.

    deletion = int_0^1 S(x without its first t pixels) dt,  insertion = int_0^1 S(x of its first t) dt

    Pixels go in the order of the raw, signed map at the picture's size, the highest first, so that those
    that speak against the class come last; equal ones from the top left. ``hidden`` stands for pixels that
    are not there: the picture's blur by an eighth of its side, mid-grey, zero (black), its mean colour or
    noise. The integral is by trapezoids over the true shares after each of ``steps``; a step costs two
    forward passes of each picture, the baselines' as well. Low deletion and high insertion are good. No
    mask is needed: it asks the model, not people. But the model is asked about pictures such as it never
    saw, and its answers there are as much of the score as the map is.

    Raises InputError where the data set knows no classes, and for a method that gives no maps.

    Source: Petsiuk et al. 2018, section 3.2; in larger steps Samek et al. 2017.
    """
    assert seed is not None
    pool = Pool(model, dataset, pictures, target, needs_masks=False)
    sources = [from_method(method, params, seed), *baselines(pool.count, seed)]

    def points(seen: Explained) -> Tensor:
        return curves(seen, steps, hidden, read, seed).flatten(1)

    bounds = places_of(steps, pool.read(range(1))[0][0, 0].numel())
    every = Measure(("",) * 2 * len(bounds), (True,) * 2 * len(bounds), points)
    table = score([model], pool, sources, [every], budget=budget, examples=3)
    averages, _ = means(table.each[0], table.counts[0])
    fall, rise = averages.unflatten(1, (2, len(bounds))).unbind(1)
    each = areas(table.each.unflatten(2, (2, len(bounds))).movedim(3, -1), bounds)
    table = Table(each, table.counts[..., :2], table.images, table.masks, table.maps)
    measures = [faithfulness(steps, hidden, read, seed)]
    found = Scores.of(table, [model.name], sources, measures)
    fractions = torch.tensor(bounds, device=model.device, dtype=model.dtype) / bounds[-1]
    return Curves(**dict(found.fields()), fractions=fractions, deletion=fall, insertion=rise)


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [deletion_insertion]
