"""Sanity check by weight randomization: similarity of maps before and after it."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, Any

import scipy.stats
import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Fold,
    Method,
    Reference,
    TensorDataset,
    hookimpl,
    load_model,
    max_batch,
    method,
    methods,
    report_progress,
)
from phosphene import Model as _Model
from phosphene.data import Batch, Rows, State
from phosphene.errors import ModelError
from phosphene.images import min_max
from phosphene.results import Attribution
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import InvariantTo

from ._cascade_result import Cascade
from ._evaluate_maps import EvaluationSet, MapSource, explained_class, method_source, positive_part
from ._map_similarity import map_similarity, rank_correlation, structural_similarity
from ._parameters import MapTarget, MaxImages, MethodName, MethodParams, TargetSource
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


def maps_are_those_of_networks_randomized_by_hand() -> None:
    """Stage k: the layers from the top down to the k-th, each drawn with the seed of its stage."""
    generator = torch.Generator().manual_seed(0)
    first, hidden, last = nn.Linear(16, 5), nn.Linear(5, 3), nn.Linear(3, 2)
    for layer in (first, hidden, last):
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    layers = {"flat": nn.Flatten(), "first": first, "relu": nn.ReLU(), "middle": nn.Sequential(hidden)}
    network = nn.Sequential(OrderedDict(layers | {"last": last}))
    model = load_model(network, input_size=(1, 4, 4), mean=[0.3], std=[0.4])
    images = torch.rand(5, 1, 4, 4, generator=generator)
    dataset = TensorDataset(images, ["0", "1", "1", "0", "1"])
    options: dict[str, Any] = {"samples": 2}
    with max_batch(2):
        result = sanity_check(model, dataset, method="smooth_grad", params=options, max_images=4, seed=5)
    copy, maps = model.copy(), []
    for stage in range(4):
        if stage:
            weights = copy.layers[result.stages[stage - 1]].parameters()
            generator = torch.Generator().manual_seed(5 + stage - 1)
            for weight in weights:
                noise = torch.randn(weight.shape, generator=generator)
                weight.data = weight.mean() + noise * weight.std(correction=0)
        # Batches of two, as above: every batch gets the noise of the seed.
        for start in (0, 2):
            batch = images[start : start + 2]
            attribution = methods["smooth_grad"](copy, batch, [start // 2, 1 - start // 2], seed=5, **options)
            assert isinstance(attribution, Attribution)
            maps.append(attribution.maps)
    expected = torch.cat(maps).view(4, 4, 4, 4)
    assert result.stages == ("last", "middle.0", "first")
    torch.testing.assert_close(result.images, images[:2])
    torch.testing.assert_close(result.maps, positive_part(expected[:, :2].flatten(0, 1)).view(4, 2, 4, 4))
    for stage in range(3):
        pairs = zip(expected[0].flatten(1), expected[stage + 1].flatten(1), strict=True)
        ranks = torch.tensor([scipy.stats.spearmanr(a, b).statistic for a, b in pairs])
        torch.testing.assert_close(result.rank[stage], ranks.float())
        similarity = structural_similarity(min_max(expected[stage + 1]), min_max(expected[0]))
        torch.testing.assert_close(result.ssim[stage], similarity)


def similarities_have_a_closed_form() -> None:
    """Rank correlations of two pixels and of constant maps; SSIM of constants and of checkerboards."""
    maps = torch.tensor([[0.0, 3.0], [0.0, 3.0], [2.0, 2.0], [2.0, 2.0]])[:, None]
    others = torch.tensor([[1.0, 2.0], [5.0, 4.0], [7.0, 7.0], [0.0, 3.0]])[:, None]
    torch.testing.assert_close(rank_correlation(maps, others), torch.tensor([1.0, -1.0, 1.0, 0.0]))
    # C1 = 1e-4 and C2 = 9e-4. On a checkerboard the local mean is 0.01, the local variance 1e-4.
    constant = torch.ones(1, 24, 24, dtype=torch.float64)
    row = torch.arange(24) % 2
    board = 0.02 * (row[:, None] ^ row).double()[None]
    pairs = [
        (0.1 * constant, 0.2 * constant, 0.0401 / 0.0501),
        (board, board, 1.0),
        (board, 0.01 * constant, 9 / 10),
        (board, 0.02 - board, 7 / 11),
    ]
    for a, b, expected in pairs:
        ssim = structural_similarity(a, b)
        torch.testing.assert_close(ssim, torch.full_like(ssim, expected), rtol=1e-4, atol=0)


def similarity_to_networks_randomized_by_hand() -> None:
    """Constant weights preserve the maps; else they are those of networks that are randomized by hand."""
    similarities_have_a_closed_form()
    maps_stay_where_all_weights_are_equal()
    maps_are_those_of_networks_randomized_by_hand()


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
    relations=[
        InvariantTo("logit_shift", fields=("rank",)),
    ],
    needs=["dataset"],
    oracle=similarity_to_networks_randomized_by_hand,
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
    examples = min(2, data.count)
    trained = _StageMaps(model, model, source, target, examples, None).run(
        data.dataset, data.size, data.count
    )
    trained_maps, maps, similarity = trained["maps"].tensor(), [trained["examples"].tensor()], []
    copy = model
    for stage, part in enumerate(parts):
        copy = copy.copy()  # another process may have the copy of the stage before
        randomize_weights(copy, part, torch.Generator().manual_seed(seed + stage))  # a seed for each stage
        fold = _StageMaps(model, copy, source, target, examples, trained_maps)
        state = fold.run(data.dataset, data.size, data.count)
        similarity.append(state["similarity"].tensor())
        maps.append(state["examples"].tensor())
    images, _ = data.read(range(examples))
    rank, ssim = torch.stack(similarity).to(images).unbind(2)
    return Cascade(
        name=source.name,
        stages=tuple(part[-1] for part in parts),
        rank=rank.contiguous(),
        ssim=ssim.contiguous(),
        images=images,
        maps=torch.stack(maps).to(images),
    )


@dataclass
class _StageMaps(Fold[State]):
    """The maps of the model ``copy``, or their similarity to those of the trained ``model``.

    ``trained`` (N, H, W): the maps of the trained model, or None for the model itself.
    """

    model: _Model
    copy: _Model
    source: MapSource
    target: TargetSource
    examples: int
    trained: Tensor | None
    title: str = "randomizing"

    def start(self) -> State:
        return {"maps" if self.trained is None else "similarity": Rows(), "examples": Rows()}

    def update(self, state: State, batch: Batch) -> State:
        first, stop = batch.indices[0], batch.indices[-1] + 1
        images = batch.images.to(self.model.device, self.model.dtype)
        with report_progress(False):
            target = explained_class(self.model, self.target, images, batch)
            maps = self.source.compute(self.copy, images, target, range(first, stop))
        if self.trained is None:
            state["maps"].write(first, maps)
        else:
            trained = self.trained[first:stop].to(maps)
            state["similarity"].write(first, torch.stack(map_similarity(maps, trained), 1))
        if first < self.examples:
            state["examples"].write(first, positive_part(maps[: self.examples - first]))
        return state


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [sanity_check]
