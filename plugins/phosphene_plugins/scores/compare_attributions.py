"""Comparison of attribution methods: a table of scores by method and model."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from phosphene import Method, Reference, TensorDataset, hookimpl, load_model, method
from phosphene.errors import InputError
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import InvariantTo, ScalesWith
from phosphene.testing import linear_model

from ._evaluate_maps import (
    EvaluationSet,
    baseline_sources,
    evaluate_maps,
    method_source,
    pixel_ranks,
    positive_part,
)
from ._parameters import Budget, MapTarget, MaxImages, Steps
from ._score_table import Scores
from ._weight_randomization import weight_randomization
from .deletion_insertion import curve_area_metric
from .mask_iou import overlap_metric
from .pointing_game import pointing_metric

Score = Literal["pointing_game", "mask_iou", "deletion_insertion", "sanity_check"]
METHODS = (
    *("grad_cam", "integrated_gradients", "gradient_x_input", "saliency", "smooth_grad"),
    *("guided_backprop", "occlusion"),
)
SCORES: tuple[Score, ...] = ("pointing_game", "mask_iou", "deletion_insertion", "sanity_check")


def columns_equal_the_scores_run_alone() -> None:
    """Every column equals that of the score run separately, with the parameters of each method."""
    from .deletion_insertion import deletion_insertion
    from .mask_iou import mask_iou
    from .pointing_game import pointing_game
    from .sanity_check import sanity_check

    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    model = load_model(network, input_size=(1, 8, 8), mean=[0.0], std=[1.0])
    objects = torch.rand(3, 8, 8, generator=generator) < 0.3
    dataset = TensorDataset(torch.rand(3, 1, 8, 8, generator=generator), ["0", "1", "0"], objects)
    table = compare_attributions(model, dataset, methods=["saliency"], scores=list(SCORES[:3]), seed=0)
    single = [
        score(model, dataset, method="saliency", seed=0).image_values
        for score in (pointing_game, mask_iou, deletion_insertion)
    ]
    torch.testing.assert_close(table.image_values, torch.cat(single, 2))
    assert table.columns[1] == "within 4 px"
    # Sanity: the rank correlation with the maps of a network whose only layer is drawn with the seed.
    options: dict[str, Any] = {"params": {"smooth_grad": {"samples": 2}}, "seed": 3}
    table = compare_attributions(
        model, dataset, methods=["smooth_grad", "saliency"], scores=["sanity_check"], **options
    )
    for row, (name, params) in enumerate((("smooth_grad", {"samples": 2}), ("saliency", {}))):
        cascade = sanity_check(model, dataset, method=name, params=params, seed=3)
        torch.testing.assert_close(table.image_values[0, row, 0], cascade.rank[0])
    assert table.counts[0, :, 0].tolist() == [3, 3, 0, 0] and table.higher_is_better == (False,)
    # A second model by its URI, in the first one's precision.
    double = linear_model(torch.rand(10, 3, 64, 64, dtype=torch.float64, generator=generator))
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64, generator=generator)
    uri = "builtin:shapes-vgg"
    options = {"methods": ["saliency"], "scores": ["sanity_check"], "target": "predicted", "seed": 0}
    table = compare_attributions(double, TensorDataset(images, ["0"]), models=[uri], **options)
    other = load_model(uri)
    other.module.double()
    alone = compare_attributions(other, TensorDataset(images, ["0"]), **options)
    torch.testing.assert_close(table.image_values[1], alone.image_values[0])
    assert table.models == (double.name, other.name)


def baselines_and_budget_in_closed_form() -> None:
    """The maps of the baselines, how many images a budget is enough for, and the evidence in a map."""
    weight = torch.arange(1.0, 129).view(2, 1, 8, 8)
    dataset = TensorDataset(torch.ones(3, 1, 8, 8), ["0", "1", "0"], torch.ones(3, 8, 8) > 0)
    options: dict[str, Any] = {"methods": ["saliency"], "seed": 4}
    # Saliency takes a forward and a backward pass, that counts two; the sanity check runs it twice.
    runs: list[tuple[Score, int, list[int]]] = [
        ("sanity_check", 12, [2, 0, 0]),
        ("sanity_check", 11, [1, 0, 0]),
        ("pointing_game", 6, [2, 3, 3]),
        ("pointing_game", 2, [1, 2, 2]),
    ]
    for score, budget, counts in runs:
        table = compare_attributions(linear_model(weight), dataset, scores=[score], budget=budget, **options)
        assert table.counts[0, :, 0].tolist() == counts, (score, budget)
    table = compare_attributions(linear_model(weight), dataset, scores=["pointing_game"], **options)
    assert table.names == ("saliency", "center point", "random maps")
    side = torch.linspace(-1, 1, 8).square()
    torch.testing.assert_close(table.maps[0, 1, 0], torch.exp(-2 * (side[:, None] + side)))
    noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(table.maps[0, 2], noise[: len(table.images)].clamp(min=0))
    maps = torch.tensor([[-1.0, 2.0], [-0.5, -0.2], [-3.0, -3.0], [0.0, 0.0]])[:, None]
    expected = torch.tensor([[0.0, 2.0], [0.0, 0.3], [1.0, 1.0], [1.0, 1.0]])[:, None]
    torch.testing.assert_close(positive_part(maps), expected)
    ranks = pixel_ranks(torch.tensor([[[0.0, 2.0], [1.0, 2.0]]]))
    assert ranks.tolist() == [[[3, 0], [2, 1]]]
    try:
        raise AssertionError(compare_attributions(linear_model(weight), dataset, methods=["activation_maps"]))
    except InputError as error:
        message = str(error)
    assert "guided_grad_cam" in message


def scores_and_baselines() -> None:
    """The columns of single scores; baselines and budget in closed form."""
    columns_equal_the_scores_run_alone()
    baselines_and_budget_in_closed_form()


@method(
    family="scores",
    references=[
        Reference(
            key="hedstrom2023",
            title="Quantus: An Explainable AI Toolkit for Responsible Evaluation of Neural Network "
            "Explanations and Beyond",
            authors="Hedström, Weber, Krakowczyk, Bareeva, Motzkus, Samek, Lapuschkin, Höhne",
            year=2023,
            url="https://arxiv.org/abs/2202.06861",
        )
    ],
    relations=[
        ScalesWith("logits", power=0, fields=("values", "image_values")),
        InvariantTo("logit_shift", fields=("values", "image_values")),
        InvariantTo("normalization", fields=("values", "image_values")),
    ],
    needs=["dataset"],
    oracle=scores_and_baselines,
    quick={
        "methods": ["grad_cam"],
        "models": [],
        "scores": ["pointing_game"],
        "params": {},
        "max_images": 2,
        "steps": 2,
        "budget": 40,
    },
    demo={
        "methods": ["grad_cam", "integrated_gradients", "saliency", "guided_backprop", "occlusion"],
        "max_images": 6,
        "steps": 8,
    },
)
def compare_attributions(
    model: Model,
    dataset: Dataset,
    *,
    methods: Annotated[
        list[str], Field(min_length=1, description="methods to compare: any that return an Attribution")
    ] = list(METHODS),  # noqa: B006
    models: Annotated[list[str], Field(description="URIs of further models to compare")] = [],  # noqa: B006
    scores: Annotated[list[Score], Field(min_length=1, description="scores to compute")] = list(SCORES),  # noqa: B006
    params: Annotated[
        dict[str, dict[str, Any]], Field(description="parameters of the methods, by method name")
    ] = {},  # noqa: B006
    target: MapTarget = "label",
    steps: Steps = 16,
    max_images: MaxImages = 200,
    budget: Budget = 20_000,
    examples: Annotated[int, Field(ge=1, le=20, description="images whose maps the figure includes")] = 3,
    seed: Seed = None,
) -> Scores:
    """Comparison of attribution methods by localization, faithfulness and sanity scores, on several models.

    table[model, method, score] = mean over images, +- standard error

    The columns are those of ``pointing_game``, ``mask_iou`` and ``deletion_insertion`` with their default
    parameters, and, of ``sanity_check``, the rank correlation of the maps with those of a fully randomized
    network. The last rows are baselines that ignore the model: a Gaussian about the image's center and smooth
    random maps. Further ``models`` must have the same input size and classes. A method is scored on as many
    images as ``budget`` forward passes allow; the table marks rows with fewer images than others. With
    ``out``, an interrupted comparison resumes.

    Returns:
        ``values`` and ``standard_errors`` (models, methods + 2, columns); ``image_values`` (..., P), those of
        every image.

    Raises:
        InputError, before any computation, for a data set without the masks or labels that a score needs, for
        a method that returns no maps, and for ``params`` of a method that is not compared.

    Example::
        from phosphene import run

        result = run(
            "compare_attributions", dataset="builtin:scenes/4", methods=["grad_cam", "saliency"],
            scores=["mask_iou"],
        )
        result.values.shape  # (1, 4, 2)

    Source:
        Hedström et al. 2023, where localization, faithfulness and randomization are categories of metrics.
    """
    assert seed is not None
    if surplus := params.keys() - {*methods}:
        raise InputError(f"params names {sorted(surplus)[0]!r}, which is not among methods={methods}")
    constructors = {
        "pointing_game": lambda: pointing_metric(radius=4),
        "mask_iou": lambda: overlap_metric(threshold=None),
        # equivalent mutants: a blurred baseline has no seed
        "deletion_insertion": lambda: curve_area_metric(steps, "blur", "probability", seed),
        "sanity_check": lambda: weight_randomization(seed),
    }
    metrics = [constructors[name]() for name in dict.fromkeys(scores)]
    needs_masks = any(metric.needs_masks for metric in metrics)
    data = EvaluationSet(model, dataset, max_images, target, needs_masks=needs_masks)
    sources = [method_source(name, params.get(name, {}), seed) for name in dict.fromkeys(methods)]
    sources += baseline_sources(data.count, seed)
    all_models = [model, *(_load_beside(model, uri) for uri in models)]
    evaluation = evaluate_maps(all_models, data, sources, metrics, budget=budget, examples=examples)
    return Scores.from_evaluation(evaluation, [m.name for m in all_models], sources, metrics)


def _load_beside(model: Model, uri: str) -> Model:
    """Another model of the same input size, on the first one's device and with its precision."""
    other = load_model(uri)
    if other.input_size != model.input_size:
        raise InputError(
            f"{uri} takes images of {other.input_size}, {model.name} of {model.input_size}: compare models "
            "that take the same images"
        )
    other.module.to(model.device, model.dtype)
    return other


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [compare_attributions]
