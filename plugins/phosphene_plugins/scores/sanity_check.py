"""Sanity check by weight randomization: similarity of maps before and after it."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from phosphene import (
    Method,
    Reference,
    TensorDataset,
    hookimpl,
    load_model,
    method,
    report_progress,
    resumable,
)
from phosphene.errors import ModelError
from phosphene.roles import Dataset, Model, Seed

from ._cascade_result import Cascade
from ._evaluate_maps import EvaluationSet, method_source, positive_part
from ._map_similarity import map_similarity
from ._parameters import MapTarget, MaxImages, MethodName, MethodParams
from ._weight_randomization import layers_with_weights, randomize_weights, split_stages


def maps_stay_where_all_weights_are_equal() -> None:
    """A linear model's gradient x input changes, but constant weights are redrawn as the same constant."""
    linear = nn.Linear(64, 2)
    network = nn.Sequential(nn.Flatten(), linear)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = load_model(network, input_size=(1, 8, 8), mean=[0.25], std=[0.5])
    dataset = TensorDataset(images, ["0", "1"])
    expected = linear.weight.detach()[0].view(8, 8) * images[0, 0] / 0.5
    result = sanity_check(model, dataset, method="gradient_x_input", seed=0)
    torch.testing.assert_close(result.maps[0, 0], expected.clamp(min=0))
    assert (result.rank < 0.6).all()
    nn.init.constant_(linear.weight, 0.5)
    result = sanity_check(model, dataset, method="gradient_x_input", seed=0)
    torch.testing.assert_close(result.rank, torch.ones(1, 2))
    torch.testing.assert_close(result.ssim, torch.ones(1, 2))


@method(
    family="scores",
    references=[
        Reference(
            key="adebayo2018",
            title="Sanity Checks for Saliency Maps",
            authors="Adebayo, Gilmer, Muelly, Goodfellow, Hardt, Kim",
            year=2018,
            url="https://arxiv.org/abs/1810.03292",
        )
    ],
    needs=["dataset"],
    oracle=maps_stay_where_all_weights_are_equal,
    quick={"method": "grad_cam", "params": {}, "max_images": 2, "stages": 2},
    demo={"max_images": 8},
)
def sanity_check(
    model: Model,
    dataset: Dataset,
    *,
    method: MethodName = "grad_cam",
    params: MethodParams = {},  # noqa: B006
    target: MapTarget = "label",
    stages: Annotated[
        int, Field(ge=1, le=200, description="largest number of stages, each of about as many layers")
    ] = 6,
    max_images: MaxImages = 32,
    seed: Seed = None,
) -> Cascade:
    """Sanity check: similarity of attribution maps while weights are randomized from the top layer down.

    rank_k = corr( rank M(x; w), rank M(x; w_1 ... w_k random) ),  and SSIM of the maps scaled to [0, 1]

    Cascading randomization: layer after layer, from the logits down, the weights are drawn from normal
    distributions with each tensor's own mean and deviation, and stay random. The raw, signed maps are
    compared at the image's size. A map that stays the same depends on the image, not on what was learned; a
    map that changes is not thereby proved right. SSIM is high for two maps that are both mostly flat.
    ``target`` "predicted" is the trained network's prediction throughout. A copy is randomized, never the
    model itself.

    Returns:
        ``rank`` and ``ssim`` (stages, N), the similarity to the trained network's maps after each stage.

    Raises:
        InputError for a data set without labels and for a method that returns no maps; ModelError for a
        network without weights.

    Example::
        from phosphene import run

        result = run("sanity_check", dataset="builtin:scenes/4", stages=2)
        result.rank.shape  # (2, 4)

    Source:
        Adebayo et al. 2018, section 3 (cascading randomization).
    """
    assert seed is not None
    data = EvaluationSet(model, dataset, max_images, target, needs_masks=False)
    source = method_source(method, params, seed)
    if not (layers := layers_with_weights(model)):
        raise ModelError(f"{model.name} has no layer with weights that could be randomized")
    parts = split_stages(layers, stages)
    first, _ = data.read(range(1))
    examples = min(2, data.count)
    state = {
        "trained": first.new_zeros(data.count, *first.shape[2:]),
        "similarity": first.new_zeros(2, len(parts), data.count),
        "maps": first.new_zeros(1 + len(parts), examples, *first.shape[2:]),
    }
    copy, randomized = model.copy(), 0
    work = [(stage, indices) for stage in range(1 + len(parts)) for indices in data.batches()]
    for stage, indices in resumable(work, state, "randomizing"):
        while randomized < stage:
            # A seed for each stage: a resumed run draws the same weights.
            generator = torch.Generator().manual_seed(seed + randomized)
            randomize_weights(copy, parts[randomized], generator)
            randomized += 1
        images, _ = data.read(indices)
        with report_progress(False):
            maps = source.compute(copy, images, data.classes(model, images, indices), indices)
        rows = slice(indices.start, indices.stop)
        if stage == 0:
            state["trained"][rows] = maps
        else:
            state["similarity"][:, stage - 1, rows] = torch.stack(
                map_similarity(maps, state["trained"][rows])
            )
        count = max(0, min(examples, indices.stop) - indices.start)
        state["maps"][stage, indices.start : indices.start + count] = positive_part(maps[:count])
    return Cascade(
        name=source.name,
        stages=tuple(part[-1] for part in parts),
        rank=state["similarity"][0],
        ssim=state["similarity"][1],
        images=data.read(range(examples))[0],
        maps=state["maps"],
    )


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [sanity_check]
