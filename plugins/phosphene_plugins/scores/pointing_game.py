"""Pointing game: whether an attribution map's maximum lies in the object."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phosphene import Class, InputError, Method, Reference, TensorDataset, hookimpl, load_model, method
from phosphene.data import peak_hits
from phosphene.images import colorize
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import InvariantTo, ScalesWith

from ._evaluate_maps import (
    Evaluation,
    EvaluationSet,
    Metric,
    RandomMaps,
    ScoringContext,
    baseline_sources,
    evaluate_maps,
    method_source,
    pixel_ranks,
    positive_part,
)
from ._parameters import Budget, MapTarget, MaxImages, MethodName, MethodParams, Radius
from ._score_table import Scores, score_method


@dataclass(frozen=True)
class _PeakHits:
    radius: int

    def __call__(self, context: ScoringContext) -> Tensor:
        return peak_hits(positive_part(context.maps), context.object_masks(), radius=self.radius)


def pointing_metric(radius: int) -> Metric:
    """Hits inside the object, and at most ``radius`` pixels from it."""
    return Metric(("pointing", f"within {radius} px"), (True, True), _PeakHits(radius), needs_masks=True)


def model_of_one_pixel_hits_objects_at_that_pixel() -> None:
    """A model with weight on one pixel alone hits an object at that pixel and misses distant ones."""
    weight = torch.zeros(7, 10)
    weight[4, 3] = 2.0
    linear = nn.Linear(70, 2)
    with torch.no_grad():
        linear.weight.copy_(weight.flatten().expand(2, -1))
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 7, 10), mean=[0.0], std=[1.0])
    objects = torch.zeros(3, 7, 10, dtype=torch.bool)
    objects[0, 4, 3] = objects[1, 4, 5] = objects[2, 1, 3] = True
    dataset = TensorDataset(torch.rand(3, 1, 7, 10), ["0", "1", "0"], objects)
    result = pointing_game(model, dataset, method="saliency", radius=2, seed=0)
    assert result.image_values[0, 0].tolist() == [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    torch.testing.assert_close(result.values[0, 0], torch.tensor([1 / 3, 2 / 3]))
    torch.testing.assert_close(result.standard_errors[0, 0], torch.tensor([1 / 3, 1 / 3]))
    torch.testing.assert_close(result.maps[0, 0], weight.expand(3, -1, -1))
    assert result.columns == ("pointing", "within 2 px") and result.higher_is_better == (True, True)
    assert pointing_metric(2).needs_masks
    sources_and_limits_by_hand(model, dataset)


def sources_and_limits_by_hand(model: Model, dataset: TensorDataset) -> None:
    """Baselines cost no pass; the costliest metric limits the images; images of the model's precision."""
    center, noise = baseline_sources(3, 5)
    images = torch.rand(2, 1, 9, 5, dtype=torch.float64)
    for source in (center, noise):
        assert source.passes(model, images) == 0
    maps = center.compute(model, images, Class(0), range(2))
    # A Gaussian with a quarter of the side as standard deviation: from -1 to 1, half a unit.
    rows, columns = (torch.tensor([2 * n / (side - 1) - 1 for n in range(side)]).double() for side in (9, 5))
    expected = torch.exp(-((rows[:, None] / 0.5) ** 2 + (columns / 0.5) ** 2) / 2)
    torch.testing.assert_close(maps, expected.expand(2, -1, -1), rtol=0, atol=1e-12)
    assert maps.dtype == torch.float64 and maps[0, 4, 2] == 1
    double = TensorDataset(dataset.read(range(3)).double(), ["0", "1", "0"], dataset.masks(range(3)))
    data = EvaluationSet(model, double, 3, "label", needs_masks=True)
    read, masks = data.read(range(1, 3))
    objects = dataset.masks([1, 2])
    assert read.dtype == torch.float32 and masks is not None and objects is not None
    assert torch.equal(masks, objects)
    cheap = pointing_metric(0)
    costly = dataclasses.replace(cheap, recomputations=3)
    # A gradient costs three passes, and 4 of them 12: of 24 passes, two images.
    source = method_source("attribution.saliency", {}, 0)
    for metrics, count in (([cheap], 3), ([cheap, costly], 2), ([costly, cheap], 2)):
        result = evaluate_maps([model], data, [source, center], metrics, budget=24, examples=1)
        assert result.counts[0, :, 0].tolist() == [count, 3], metrics
    refusal = ""
    try:
        method_source("attacks.fgsm", {}, 0)
    except InputError as error:
        refusal = str(error)
    assert isinstance(noise, RandomMaps) and noise.noise.shape == (3, 8, 8)
    ranks = pixel_ranks(torch.tensor([[[1.0, 3.0], [1.0, 2.0]], [[5.0, 5.0], [7.0, 5.0]]]))
    assert ranks.tolist() == [[[2, 0], [3, 1]], [[1, 2], [0, 3]]]
    unlabeled = TensorDataset(dataset.read(range(3)))
    EvaluationSet(model, unlabeled, 3, "predicted", needs_masks=False)
    without: tuple[tuple[MapTarget, bool, str], ...] = (
        ("label", False, "has no labels"),
        ("predicted", True, "needs masks"),
    )
    for target, needs_masks, message in without:
        missing = ""
        try:
            EvaluationSet(model, unlabeled, 3, target, needs_masks=needs_masks)
        except InputError as error:
            missing = str(error)
        assert message in missing, missing
    values = torch.tensor([[-0.3, 0.2], [-0.3, -0.1], [-2.0, -2.0], [0.0, 0.0]]).view(4, 1, 2)
    expected = torch.tensor([[0, 0.2], [0, 0.2], [1, 1], [1, 1]]).view(4, 1, 2)
    torch.testing.assert_close(positive_part(values), expected)
    table_by_hand()
    assert "fgsm returns no maps" in refusal and "grad_cam, " in refusal


def table_by_hand() -> None:
    """Two models, three sources, two columns; means of the first values, and undefined ones."""
    values = torch.arange(48.0, dtype=torch.float64).view(2, 3, 2, 4).square()
    counts = torch.full((2, 3, 2), 3)
    counts[1, 2, 1], counts[0, 1, 0], counts[0, 0, 1] = 0, 2, 1
    maps, images = torch.rand(2, 3, 1, 4, 5), torch.rand(1, 3, 4, 5)
    metric = Metric(("up", "down"), (True, False), _PeakHits(1))
    sources = [method_source("attribution.saliency", {}, 0), *baseline_sources(1, 0)]
    evaluation = Evaluation(values, counts, images, None, maps)
    scores = Scores.from_evaluation(evaluation, ["a", "b"], sources, [metric])
    assert scores.value("random maps", "down", "b") is None and scores.value("center point", "up") == 72.5
    # The means of 8 and 9, and of 24, 25 and 26, all squared.
    assert scores.value("saliency", "up", "b") == (24**2 + 25**2 + 26**2) / 3 and scores.counts is counts
    assert scores.values[1, 2, 1] == 0 and scores.standard_errors[0, 0, 1] == 0
    table = scores.table()
    assert table["model"] == ["a"] * 6 + ["b"] * 6 and table["score"] == ["up", "down"] * 6
    assert table["method"] == [name for name in scores.names for _ in range(2)] * 2
    assert table["mean"][2] == 72.5 and table["mean"][11] is None and table["standard_error"][11] is None
    # The deviation of 64 and 81 is 8.5 sqrt(2), and their mean's error 8.5.
    assert abs(table["standard_error"][2] - 8.5) < 1e-12 and table["images"] == counts.flatten().tolist()
    assert table["higher_is_better"] == [True, False] * 6
    colored = scores.colored_maps(1, 0)
    for row, single in zip(colored, maps[1, :, 0], strict=True):
        assert torch.equal(row, colorize((single / single.flatten().quantile(0.99))[None], "inferno")[0])


@method(
    family="scores",
    references=[
        Reference(
            key="zhang2018",
            title="Top-Down Neural Attention by Excitation Backprop",
            authors="Zhang, Bargal, Lin, Brandt, Shen, Sclaroff",
            year=2018,
            url="https://arxiv.org/abs/1608.00507",
        )
    ],
    relations=[
        ScalesWith("logits", power=0, fields=("values", "image_values")),
        InvariantTo("logit_shift", fields=("values", "image_values")),
        InvariantTo("normalization", fields=("values", "image_values")),
    ],
    needs=["dataset"],
    oracle=model_of_one_pixel_hits_objects_at_that_pixel,
    quick={"method": "grad_cam", "params": {}, "max_images": 2, "budget": 40},
    demo={"max_images": 24},
)
def pointing_game(
    model: Model,
    dataset: Dataset,
    *,
    method: MethodName = "grad_cam",
    params: MethodParams = {},  # noqa: B006
    target: MapTarget = "label",
    radius: Radius = 4,
    max_images: MaxImages = 200,
    budget: Budget = 20_000,
    seed: Seed = None,
) -> Scores:
    """Pointing game: how often an attribution map's maximum lies in the object.

    score = mean over images of  1[ argmax_ij M_ij in the object ]

    M is the map's positive part, at the image's size; where several pixels share the maximum, the fraction
    of them in the object counts. Two baselines are scored beside the method: a Gaussian about the image's
    center and smooth random maps. The score assumes that the model uses the object: a map that is faithful
    to a model that uses the background scores low.

    Returns:
        ``values`` (1, 3, 2): a row each for the method and the baselines; the columns are hits inside the
        object, and at most ``radius`` pixels from it.

    Raises:
        InputError for a data set without masks or labels, and for a method that returns no maps.

    Example::
        from phosphene import run

        result = run("pointing_game", dataset="builtin:scenes/4")
        result.value("grad_cam", "pointing")

    Source:
        Zhang et al. 2018, section 4.1; the second column is their tolerance.
    """
    return score_method(
        model, dataset, pointing_metric(radius), method=method, params=params, target=target,
        max_images=max_images, budget=budget, seed=seed,
    )  # fmt: skip


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [pointing_game]
