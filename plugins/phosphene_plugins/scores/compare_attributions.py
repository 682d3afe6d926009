"""The comparison: methods by scores by models, in one table and one picture."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from phosphene import Method, Reference, TensorDataset, hookimpl, load_model, method
from phosphene.errors import InputError
from phosphene.roles import Dataset, Model, Seed

from ._evaluate_maps import About, Budget, Pictures, Pool, baselines, from_method, score
from ._score_table import Scores
from .deletion_insertion import Steps, faithfulness
from .mask_iou import overlap
from .pointing_game import pointing
from .sanity_check import forgetting

Score = Literal["pointing_game", "mask_iou", "deletion_insertion", "sanity_check"]
METHODS = (
    *("grad_cam", "integrated_gradients", "gradient_x_input", "saliency", "smooth_grad"),
    *("guided_backprop", "occlusion"),
)
SCORES: tuple[Score, ...] = ("pointing_game", "mask_iou", "deletion_insertion", "sanity_check")


def rows_are_what_the_scores_say_alone() -> None:
    """Every column is what the score gives by itself."""
    from .deletion_insertion import deletion_insertion
    from .mask_iou import mask_iou
    from .pointing_game import pointing_game

    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    model = load_model(network, input_size=(1, 8, 8), mean=[0.0], std=[1.0])
    objects = torch.rand(3, 8, 8, generator=generator) < 0.3
    dataset = TensorDataset(torch.rand(3, 1, 8, 8, generator=generator), ["0", "1", "0"], objects)
    whole = compare_attributions(model, dataset, methods=["saliency"], scores=list(SCORES[:3]), seed=0)
    alone = [
        s(model, dataset, method="saliency", seed=0) for s in (pointing_game, mask_iou, deletion_insertion)
    ]
    torch.testing.assert_close(whole.each, torch.cat([found.each for found in alone], 2))


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
    needs=["dataset"],
    oracle=rows_are_what_the_scores_say_alone,
    quick={
        "methods": ["grad_cam"],
        "models": [],
        "scores": ["pointing_game"],
        "params": {},
        "pictures": 2,
        "steps": 2,
        "budget": 40,
    },
    demo={
        "methods": ["grad_cam", "integrated_gradients", "saliency", "guided_backprop", "occlusion"],
        "pictures": 6,
        "steps": 8,
    },
)
def compare_attributions(
    model: Model,
    dataset: Dataset,
    *,
    methods: Annotated[
        list[str], Field(min_length=1, description="whose maps are compared: any that give an Attribution")
    ] = list(METHODS),  # noqa: B006
    models: Annotated[list[str], Field(description="further models, by URI")] = [],  # noqa: B006
    scores: Annotated[list[Score], Field(min_length=1, description="what is measured")] = list(SCORES),  # noqa: B006
    params: Annotated[
        dict[str, dict[str, Any]], Field(description="parameters of the methods, by a method's name")
    ] = {},  # noqa: B006
    target: About = "label",
    steps: Steps = 16,
    pictures: Pictures = 200,
    budget: Budget = 20_000,
    examples: Annotated[int, Field(ge=1, le=20, description="pictures whose maps are shown")] = 3,
    seed: Seed = None,
) -> Scores:
    """Score methods against each other and against baselines, on one or several models.

    table[model, method, score] = mean over pictures, +- standard error

    The columns are those of ``pointing_game``, ``mask_iou`` and ``deletion_insertion`` with what they take
    for granted, and of ``sanity_check`` the rank correlation of the maps with those of a wholly random
    network. The last rows are what any method must beat: a Gaussian about the centre, and smooth random
    maps. Further ``models`` must take the same pictures and know the same classes. A method is scored on as
    many pictures as ``budget`` passes pay for; the table tells where these are fewer. Given an ``out``, a
    comparison that was cut off goes on where it was.

    Raises InputError, before any work, where the data set lacks masks or classes that a score needs, for a
    method that gives no maps, and for params of a method that is not compared.
    """
    assert seed is not None
    if strangers := params.keys() - {*methods}:
        raise InputError(f"params speaks of {sorted(strangers)[0]!r}, which is not among methods={methods}")
    making = {
        "pointing_game": lambda: pointing(radius=4),
        "mask_iou": lambda: overlap(threshold=None),
        "deletion_insertion": lambda: faithfulness(steps, "blur", "probability", seed),
        "sanity_check": lambda: forgetting(seed),
    }
    measures = [making[name]() for name in dict.fromkeys(scores)]
    needs_masks = any(measure.needs_masks for measure in measures)
    pool = Pool(model, dataset, pictures, target, needs_masks=needs_masks)
    compared = [from_method(name, params.get(name, {}), seed) for name in dict.fromkeys(methods)]
    sources = [*compared, *baselines(pool.count, seed)]
    seen = [model, *(_beside(model, uri) for uri in models)]
    table = score(seen, pool, sources, measures, budget=budget, examples=examples)
    return Scores.of(table, [m.name for m in seen], sources, measures)


def _beside(model: Model, uri: str) -> Model:
    """Another model, where the first one is."""
    other = load_model(uri)
    if other.input_size != model.input_size:
        raise InputError(
            f"{uri} takes pictures of {other.input_size}, {model.name} of {model.input_size}: compare models "
            "that take the same pictures"
        )
    other.module.to(model.device, model.dtype)
    return other


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [compare_attributions]
