"""Deletion and insertion: areas under the score as pixels are removed or added in a map's order."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Class, Method, Reference, TensorDataset, hookimpl, load_model, method, methods
from phosphene.images import Baseline, baseline_images, gaussian_blur
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import InvariantTo, ScalesWith

from ._curve_result import Curves
from ._evaluate_maps import (
    Evaluation,
    EvaluationSet,
    Metric,
    ScoringContext,
    baseline_sources,
    evaluate_maps,
    method_source,
    pixel_ranks,
    positive_part,
)
from ._parameters import Budget, MapTarget, MaxImages, MethodName, MethodParams, Steps
from ._score_table import Scores, means_and_errors

ClassScore = Literal["probability", "logit"]


def score_curves(
    context: ScoringContext, steps: int, baseline: Baseline, score: ClassScore, seed: int
) -> Tensor:
    """The score after each step of deletion, then of insertion: (n, 2, steps + 1)."""
    images = context.images
    replacement = baseline_images(images, baseline, sigma=min(images.shape[2:]) / 8, seed=seed)
    ranks = pixel_ranks(context.maps)[:, None]

    def score_of(batch: Tensor) -> Tensor:
        if score == "logit":
            return context.target.evaluate(context.model, batch)
        return context.target.score(context.model.probabilities(batch))

    full, empty = score_of(images), score_of(replacement)
    inner_counts = changed_counts(steps, ranks[0].numel())[1:-1]
    deletion = [score_of(torch.where(ranks < count, replacement, images)) for count in inner_counts]
    insertion = [score_of(torch.where(ranks < count, images, replacement)) for count in inner_counts]
    return torch.stack(
        [torch.stack([full, *deletion, empty], 1), torch.stack([empty, *insertion, full], 1)], 1
    )


def changed_counts(steps: int, pixels: int) -> list[int]:
    """How many pixels are changed after each step, from 0 to all; never more steps than pixels."""
    steps = min(steps, pixels)
    return [round(pixels * step / steps) for step in range(steps + 1)]


def curve_areas(curves: Tensor, counts: list[int]) -> Tensor:
    """The area under curves (..., steps + 1) over the fraction of changed pixels, by the trapezoidal rule."""
    fractions = torch.tensor(counts, dtype=curves.dtype, device=curves.device) / counts[-1]
    return torch.trapezoid(curves, fractions)


@dataclass(frozen=True)
class _Curves:
    """Both curves, point after point: (n, 2 (steps + 1))."""

    steps: int
    baseline: Baseline
    score: ClassScore
    seed: int

    def __call__(self, context: ScoringContext) -> Tensor:
        return score_curves(context, self.steps, self.baseline, self.score, self.seed).flatten(1)


class _CurveAreas(_Curves):
    """The areas under both curves: (n, 2)."""

    def __call__(self, context: ScoringContext) -> Tensor:
        counts = changed_counts(self.steps, context.maps[0].numel())
        return curve_areas(super().__call__(context).unflatten(1, (2, len(counts))), counts)


def curve_area_metric(steps: int, baseline: Baseline, score: ClassScore, seed: int) -> Metric:
    """The areas under the deletion and the insertion curve."""
    areas = _CurveAreas(steps, baseline, score, seed)
    return Metric(("deletion", "insertion"), (False, True), areas)


def seed_of_the_noise_and_of_the_maps() -> None:
    """SmoothGrad's maps of a hidden layer and the noise that pixels are replaced by have the seed."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 2))
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    model = load_model(network, input_size=(1, 4, 4), mean=[0.0], std=[1.0])
    images = torch.rand(2, 1, 4, 4, generator=generator)
    result = deletion_insertion(
        model, TensorDataset(images, ["0", "0"]), method="smooth_grad", params={"samples": 2},
        baseline="noise", score="logit", steps=40, seed=5,
    )  # fmt: skip
    maps: Any = methods["smooth_grad"](model, images, 0, samples=2, seed=5)
    torch.testing.assert_close(result.maps[0, 0], positive_part(maps.maps))
    scores = model(baseline_images(images, "noise", sigma=0.5, seed=5))[:, 0]
    torch.testing.assert_close(result.deletion[0, -1], scores.mean().detach())
    torch.testing.assert_close(result.fractions, torch.arange(17) / 16)  # no more steps than pixels
    curve = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    assert abs(float(curve_areas(curve, [0, 1, 3])) - 2.5) < 1e-12


def curves_of_an_additive_model_are_cumulative_sums() -> None:
    """Where the score is a sum over pixels, every step removes what its pixels contribute."""
    weight = torch.randn(16, generator=torch.Generator().manual_seed(0))
    linear = nn.Linear(16, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([weight, -weight]))
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 2, 8), mean=[0.0], std=[1.0])
    images = torch.rand(5, 1, 2, 8, generator=torch.Generator().manual_seed(1))
    dataset = TensorDataset(images, ["0"] * 5)
    contributions = weight * images.flatten(1)
    options: dict[str, Any] = {"method": "gradient_x_input", "seed": 0}
    result = deletion_insertion(model, dataset, steps=16, baseline="zero", score="logit", **options)
    ordered = contributions.sort(1, descending=True).values
    sums = torch.cat([torch.zeros(5, 1), ordered.cumsum(1)], 1)
    areas = torch.stack([ordered.sum(1) - torch.trapezoid(sums) / 16, torch.trapezoid(sums) / 16])
    torch.testing.assert_close(result.insertion[0], sums.mean(0))
    torch.testing.assert_close(result.deletion[0], (ordered.sum(1, keepdim=True) - sums).mean(0))
    torch.testing.assert_close(result.image_values[0, 0], areas)
    torch.testing.assert_close(result.fractions, torch.arange(17) / 16)
    assert result.columns == ("deletion", "insertion") and result.higher_is_better == (False, True)
    assert result.maps.shape == (1, 3, 3, 2, 8)
    torch.testing.assert_close(result.maps[0, 0], contributions[:3].view(3, 2, 8).clamp(min=0))
    torch.testing.assert_close(result.values[0, 0], areas.mean(1))
    torch.testing.assert_close(result.standard_errors[0, 0], areas.std(1) / 5**0.5)
    # The two logits are opposite: the probability is the sigmoid of twice the first. Steps of 8 pixels.
    result = deletion_insertion(model, dataset, steps=2, baseline="zero", **options)
    torch.testing.assert_close(result.insertion[0], (2 * sums[:, ::8]).sigmoid().mean(0))
    result = deletion_insertion(model, dataset, score="logit", **options)
    torch.testing.assert_close(result.insertion[0, 0], model(gaussian_blur(images, 0.25))[:, 0].mean())
    one = ScoringContext(model, images[:1], contributions[:1].view(1, 2, 8), Class((0,)), None, None)
    computed = curve_area_metric(16, "zero", "logit", 0).function(one)
    assert computed is not None
    torch.testing.assert_close(computed, areas[:, :1].T)


def curves_and_areas() -> None:
    """The curves of an additive model in closed form, and what is drawn at random."""
    curves_of_an_additive_model_are_cumulative_sums()
    seed_of_the_noise_and_of_the_maps()


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
    relations=[
        InvariantTo("logit_shift", fields=("values", "deletion", "insertion")),
        InvariantTo("normalization", fields=("values", "deletion", "insertion")),
        ScalesWith("logits", power=1, fields=("values", "deletion", "insertion"), where={"score": "logit"}),
    ],
    needs=["dataset"],
    oracle=curves_and_areas,
    quick={"method": "grad_cam", "params": {}, "max_images": 2, "budget": 40, "steps": 3},
    demo={"max_images": 8},
)
def deletion_insertion(
    model: Model,
    dataset: Dataset,
    *,
    method: MethodName = "grad_cam",
    params: MethodParams = {},  # noqa: B006
    target: MapTarget = "label",
    steps: Steps = 16,
    baseline: Annotated[Baseline, Field(description="content of the removed pixels")] = "blur",
    score: Annotated[ClassScore, Field(description="value of the class that is measured")] = "probability",
    max_images: MaxImages = 100,
    budget: Budget = 20_000,
    seed: Seed = None,
) -> Curves:
    """Deletion and insertion: areas under the score as pixels are removed or added in the map's order.

    deletion = int_0^1 S(x without its first t) dt,  insertion = int_0^1 S(x with only its first t) dt

    The first t are a fraction t of the pixels in the order of the raw, signed map at the image's size,
    highest first, so that evidence against the class comes last; ties in row-major order. ``baseline``
    replaces the removed pixels: "blur" (sigma: 1/8 of the shorter side), "gray" (0.5), "zero" (black), "mean"
    (the image's mean color) or "noise". The score is evaluated after each of ``steps`` equal portions, and
    the integral is by the trapezoidal rule. A step costs two forward passes per image for every map, the
    baselines' included. A faithful map has a low deletion and a high insertion area. No masks are needed, but
    partly removed images are unlike the training data, and the model's response to them is part of the score.

    Returns:
        ``values`` (1, 3, 2): a row each for the method, a central Gaussian and random maps; the columns are
        the two areas. ``deletion`` and ``insertion`` (3, steps + 1) are the mean curves.

    Raises:
        InputError for a data set without labels, and for a method that returns no maps.

    Example::
        from phosphene import run

        result = run("deletion_insertion", dataset="builtin:scenes/4", steps=4)
        result.insertion.shape  # (3, 5)

    Source:
        Petsiuk et al. 2018, section 3.2; in larger steps Samek et al. 2017.
    """
    assert seed is not None
    data = EvaluationSet(model, dataset, max_images, target, needs_masks=False)
    sources = [method_source(method, params, seed), *baseline_sources(data.count, seed)]
    counts = changed_counts(steps, data.read(range(1))[0][0, 0].numel())
    # One column per point of the two curves: the areas are computed from the evaluated curves below.
    # equivalent mutants: of these columns only the number is used
    curves = _Curves(steps, baseline, score, seed)
    points = Metric(("",) * 2 * len(counts), (True,) * 2 * len(counts), curves)
    evaluation = evaluate_maps([model], data, sources, [points], budget=budget, examples=3)
    averages, _ = means_and_errors(evaluation.values[0], evaluation.counts[0])
    deletion, insertion = averages.unflatten(1, (2, len(counts))).unbind(1)
    areas = curve_areas(evaluation.values.unflatten(2, (2, len(counts))).movedim(3, -1), counts)
    evaluation = Evaluation(
        areas, evaluation.counts[..., :2], evaluation.images, evaluation.masks, evaluation.maps
    )
    metrics = [curve_area_metric(steps, baseline, score, seed)]
    table = Scores.from_evaluation(evaluation, [model.name], sources, metrics)
    fractions = torch.tensor(counts, device=model.device, dtype=model.dtype) / counts[-1]
    return Curves(**dict(table.fields()), fractions=fractions, deletion=deletion, insertion=insertion)


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [deletion_insertion]
