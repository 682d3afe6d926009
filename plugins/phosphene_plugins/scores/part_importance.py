"""Part importance: an attribution map's sum over each part against the logit's drop without the part."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phosphene import Dataset as _Dataset
from phosphene import (
    Fold,
    Method,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    max_batch,
    method,
    report_progress,
)
from phosphene import Model as _Model
from phosphene.data import Batch, Parts, Rows, State
from phosphene.errors import InputError
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import InvariantTo, ScalesWith

from ._evaluate_maps import EvaluationSet, MapSource, baseline_sources, explained_class, method_source
from ._map_similarity import rank_correlation
from ._parameters import Budget, MapTarget, MaxImages, MethodName, MethodParams, TargetSource
from ._part_importance_result import PartImportance

#: Largest number of parts of an image.
MOST_PARTS = 64


def contributions_of_a_linear_model_are_its_drops() -> None:
    """Of a linear model without bias, gradient x input sums to the drop of every part that becomes 0."""
    weight = torch.zeros(2, 4, 6)
    weight[0] = torch.tensor([3.0, 3.0, -1.0, -1.0, 0.5, 0.5])  # columns of three parts
    weight[1] = -2 * weight[0]
    linear = nn.Linear(24, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight.flatten(1))
    module = nn.Sequential(nn.Flatten(), linear)
    model = load_model(module, input_size=(1, 4, 6), mean=[0.0], std=[0.25])
    masks = torch.arange(6).expand(4, 6) // 2 == torch.arange(3)[:, None, None]
    images = torch.tensor([0.5, 0.5, 0.25, 0.25])[:, None, None, None].expand(-1, 1, 4, 6)
    names = ("left", "middle", "right")
    parts = [Parts(names, masks, image * ~masks[:, None]) for image in images]
    # The second and the fourth image have two parts, and the third part is hidden.
    masks[2, :, 4:] = False
    parts[1::2] = [Parts(names[:2], masks[:2], own.without[:2]) for own in parts[1::2]]
    dataset = TensorDataset(images, ["0", "1"] * 2, object_parts=parts)
    # A part's 8 pixels of 0.5 / 0.25 = 2 each, or of 1.
    drops = torch.tensor([[48.0, -16.0, 8.0], [-96.0, 32.0, 0.0]])
    sums = torch.tensor([[48.0, -16.0, 0.0], [-96.0, 32.0, 0.0]])
    with max_batch(2):
        result = part_importance(model, dataset, method="gradient_x_input", seed=0)
    torch.testing.assert_close(result.drops, torch.cat([drops, drops / 2]))
    torch.testing.assert_close(result.sums[0], torch.cat([sums, sums / 2]))
    assert result.parts == (names, names[:2]) * 2 and result.classes == ("class 0", "class 1") * 2
    torch.testing.assert_close(result.rank_correlation[0], torch.ones(4))
    torch.testing.assert_close(result.top_part[0], torch.ones(4))
    torch.testing.assert_close(result.chance, torch.tensor([1 / 3, 1 / 2] * 2))
    # The first three images, their parts by number and their maps; the random maps differ.
    torch.testing.assert_close(result.images, images[:3])
    torch.testing.assert_close(result.maps[0], torch.stack([2 * weight[0], 2 * weight[1], weight[0]]))
    columns = torch.tensor([1, 1, 2, 2, 0, 0]).expand(3, 4, 6)
    assert torch.equal(result.part_maps, columns)
    # |gradient| is 3 in the left part and 1 in the middle: ranks (3, 2, 1) against drops' (3, 1, 2).
    with max_batch(1):
        result = part_importance(model, dataset, method="saliency", seed=0)
    torch.testing.assert_close(result.rank_correlation[0], torch.tensor([0.5, -1.0] * 2))
    torch.testing.assert_close(result.top_part[0], torch.tensor([1.0, 0.0] * 2))
    assert result.names == ("saliency", "center point", "random maps")
    # Seven passes an image: three for its map, one for its logit and three without a part each.
    for budget, count in ((6, 1), (20, 2), (21, 3), (1000, 4)):
        result = part_importance(model, dataset, method="gradient_x_input", budget=budget, seed=0)
        torch.testing.assert_close(result.sums[0], torch.cat([sums, sums / 2])[:count])
        assert len(result.drops) == count and len(result.images) == min(count, 3)
    # Sums that are equal count in part.
    assert top_part_hits(torch.tensor([2.0, 2.0, 1.0]), torch.tensor([3.0, 1.0, 3.0])) == 0.5


@dataclass
class _PartFold(Fold[State]):
    """Drops (n, P) of the target's logit without each part, and sums (n, S, P) over the parts by source.

    P is the largest number of parts; ``names`` has those of each image, by index, and ``classes`` its class.
    """

    model: _Model
    sources: tuple[MapSource, ...]
    target: TargetSource
    examples: int
    title = "measuring parts"
    shard_batches = 1  # a batch takes many passes

    def start(self) -> State:
        return {"drops": Rows(), "sums": Rows(), "maps": Rows(), "names": {}, "classes": {}}

    def update(self, state: State, batch: Batch) -> State:
        model, first = self.model, batch.indices[0]
        images, indices = batch.images.to(model.device, model.dtype), range(first, batch.indices[-1] + 1)
        parts = read_parts(batch.dataset, batch.indices)
        with report_progress(False):  # equivalent mutants: progress changes no result
            target = explained_class(model, self.target, images, batch)
            numbers = torch.as_tensor(target.index).expand(len(images)).tolist()
            drops = _padded(logit_drops(model, images, parts, numbers))
            maps = torch.stack([s.compute(model, images, target, indices) for s in self.sources], 1)
            sums = [_padded(part_sums(of_source, parts)) for of_source in maps.unbind(1)]
        state["drops"].write(first, drops)
        state["sums"].write(first, torch.stack(sums, 1))
        if first < self.examples:
            state["maps"].write(first, maps[: self.examples - first])
        names = {str(index): list(own.names) for index, own in zip(indices, parts, strict=True)}
        classes = {str(index): model.class_name(n) for index, n in zip(indices, numbers, strict=True)}
        return state | {"names": state["names"] | names, "classes": state["classes"] | classes}

    def merge(self, first: State, second: State) -> State:
        rows = super().merge(
            *({name: state[name] for name in ("drops", "sums", "maps")} for state in (first, second))
        )
        return rows | {name: first[name] | second[name] for name in ("names", "classes")}


def read_parts(dataset: _Dataset, indices: Sequence[int]) -> tuple[Parts, ...]:
    """The parts of these images; InputError for a data set without parts or a wrong number of them."""
    parts = dataset.parts(indices)
    if parts is None:
        raise InputError(
            "this score removes parts of objects, and the data set has none: use builtin:part-scenes, "
            "TensorDataset(images, classes, object_parts=...), or a Dataset with a method parts(indices)"
        )
    for index, own in zip(indices, parts, strict=True):
        if not 1 <= len(own.names) <= MOST_PARTS:
            raise InputError(
                f"image {index} has {len(own.names)} parts; the score takes 1 to {MOST_PARTS} of an image"
            )
    return parts


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows (P,) of different lengths as (n, ``MOST_PARTS``), with zeros at the end."""
    return torch.stack([nn.functional.pad(row.cpu(), (0, MOST_PARTS - len(row))) for row in rows])


@torch.no_grad()
def logit_drops(model: _Model, images: Tensor, parts: Sequence[Parts], target: Sequence[int]) -> list[Tensor]:
    """For each image, the target's logit minus that of the image without each part: (P,)."""
    drops = []
    for image, own, index in zip(images, parts, target, strict=True):
        inputs = torch.cat([image[None], own.without.to(image)])
        logits = torch.cat([model(some)[:, index] for some in inputs.split(batch_size(model))])
        drops.append(logits[0] - logits[1:])
    return drops


def part_sums(maps: Tensor, parts: Sequence[Parts]) -> list[Tensor]:
    """For each map (H, W), its sum over the visible pixels of each part: (P,)."""
    return [(m * own.masks.to(m.device)).sum((1, 2)) for m, own in zip(maps, parts, strict=True)]


def top_part_hits(sums: Tensor, drops: Tensor) -> Tensor:
    """Whether the largest of sums (P,) is the largest of drops; ties count in part."""
    best = sums == sums.max()
    return (best & (drops == drops.max())).sum() / best.sum()


@method(
    family="scores",
    references=[
        Reference(
            key="hesse2023",
            title="FunnyBirds: A Synthetic Vision Dataset for a Part-Based Analysis of Explainable AI "
            "Methods",
            authors="Hesse, Schaub-Meyer, Roth",
            year=2023,
            url="https://arxiv.org/abs/2308.06248",
        )
    ],
    relations=[
        ScalesWith("logits", power=1, fields=("drops",)),
        InvariantTo("logit_shift", fields=("drops",)),
        InvariantTo("normalization", fields=("drops",)),
    ],
    needs=["dataset"],
    oracle=contributions_of_a_linear_model_are_its_drops,
    quick={"method": "grad_cam", "params": {}, "max_images": 2, "budget": 40},
    defaults={"model": "builtin:parts-resnet", "dataset": "builtin:part-scenes/12"},
)
def part_importance(
    model: Model,
    dataset: Dataset,
    *,
    method: MethodName = "grad_cam",
    params: MethodParams = {},  # noqa: B006
    target: MapTarget = "label",
    max_images: MaxImages = 100,
    budget: Budget = 20_000,
    seed: Seed = None,
) -> PartImportance:
    """Part importance: an attribution map's sum over each part against the logit's drop without that part.

    d_p = f_c(x) - f_c(x without p),  e_p = sum_(ij in p) M_ij,  score = corr( rank e_p, rank d_p )

    x without p is the same scene drawn again without the part, so d_p is the part's true effect on the
    network, and no pixels are replaced by a baseline. M is the raw, signed map at the image's size, summed
    over the part's visible pixels. The score is Spearman's rank correlation over an image's parts, and how
    often the map's most important part is the one with the largest drop. Two baselines are scored beside the
    method, as in ``pointing_game``: large parts have large sums and often large drops, so that the rank
    correlation of a map that does not depend on the network can be above 0. A drop is the effect of one
    part alone; of two parts that each suffice, both have drops of about 0.

    Returns:
        ``drops`` (N, P) and ``sums`` (3, N, P) of each image's parts; ``rank_correlation`` and ``top_part``
        (3, N), of the method and the baselines; ``chance`` (N,), the top part's probability by chance.

    Raises:
        InputError for a data set without parts or labels, and for a method that returns no maps.

    Example::
        from phosphene import run

        result = run("part_importance", dataset="builtin:part-scenes/4", method="grad_cam")
        result.rank_correlation.mean(1)  # of the method, the center point and random maps

    Source:
        Hesse et al. 2023, section 4.2 (single deletion), with the rank correlation not rescaled to [0, 1].
    """
    assert seed is not None
    parts_of_first = len(read_parts(dataset, [0])[0].names)
    data = EvaluationSet(model, dataset, max_images, target, needs_masks=False)
    source = method_source(method, params, seed)
    sources = (source, *baseline_sources(data.count, seed))
    first, _ = data.read(range(1))
    passes = (source.passes(model, first) or 0) + 1 + parts_of_first
    count = max(1, min(data.count, budget // passes))
    examples = min(3, count)
    fold = _PartFold(model, sources, target, examples)
    state = fold.run(dataset, data.size, stop=count)
    names = tuple(tuple(state["names"][str(index)]) for index in range(count))
    width = max(map(len, names))
    drops, sums = state["drops"].tensor()[:, :width], state["sums"].tensor()[:, :, :width].transpose(0, 1)
    correlations, hits = torch.zeros(2, len(sources), count, dtype=drops.dtype)
    for n, own in enumerate(names):
        true = drops[n, : len(own)]
        for s in range(len(sources)):
            explained = sums[s, n, : len(own)]
            correlations[s, n] = rank_correlation(explained[None, None], true[None, None])[0]
            hits[s, n] = top_part_hits(explained, true)
    images, _ = data.read(range(examples))
    parts = read_parts(dataset, range(examples))
    part_maps = torch.zeros(images[:, 0].shape, dtype=torch.int64)
    for n, image_parts in enumerate(parts):
        for number, mask in enumerate(image_parts.masks.cpu(), start=1):
            part_maps[n][mask] = number
    return PartImportance(
        names=tuple(s.name for s in sources),
        classes=tuple(state["classes"][str(index)] for index in range(count)),
        parts=names,
        drops=drops.contiguous().to(images),
        sums=sums.contiguous().to(images),
        rank_correlation=correlations.to(images),
        top_part=hits.to(images),
        chance=torch.tensor([1 / len(own) for own in names]).to(images),
        images=images,
        part_maps=part_maps.to(images.device),
        maps=state["maps"].tensor().transpose(0, 1).contiguous().to(images),
    )


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [part_importance]
