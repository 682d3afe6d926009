"""Facets: the different things that one unit answers to, a prototype drawn for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Class,
    InputError,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    method,
    progress_bar,
    save_progress,
    saved_progress,
    scores,
)
from phosphene.results import Panel, Synthesis
from phosphene.roles import Dataset, Frames, Model, Seed, Target
from phosphene.spec import Cost, PixelRange, minimum, param, size
from phosphene.targets import Objective, Predicted

from ..embeddings._features import FeatureLayer, k_means, represent
from ._activation_maximization import (
    L2,
    BlurEvery,
    BlurSigma,
    Jitter,
    LearningRate,
    Moved,
    Steps,
    Variation,
    preferred,
)

#: How many of a facet's pictures are shown.
SHOWN = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class Facets(Synthesis):
    """Units' facets: prototypes ``images`` (K, C, H, W), begun at ``sources``, means of each one's pictures.

    ``sizes`` (K,) says how many pictures a facet has, ``answers`` (K,) their mean score, and ``shown`` (K,)
    how many of the ``examples`` (E, C, H, W), called ``ids``, are its own, the nearest to its middle first.
    """

    per_image: ClassVar[tuple[str, ...]] = (
        *("images", "targets", "sources", "sizes", "answers", "examples", "shown", "ids"),
    )
    groups_per_row: ClassVar[int] = 1

    sizes: Tensor
    answers: Tensor
    examples: Tensor
    shown: Tensor
    ids: tuple[str, ...]

    def panels(self) -> list[list[Panel]]:
        groups = []
        parts = self.examples.split(self.shown.tolist())
        for n, (group, examples) in enumerate(zip(super().panels(), parts, strict=True)):
            told = f"{float(self.answers[n]):.3g} -> {float(self.scores[-1, n]):.3g}"
            begun = Panel(group[0].image, f"mean of its pictures ({int(self.sizes[n])})")
            made = Panel(group[1].image, f"{self.targets[n]}: {told}", is_output=True)
            groups.append([made, begun, *map(Panel, examples)])
        return groups


class _Larger(nn.Module):
    """The larger of two numbers: a unit with two facets."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(1, keepdim=True)


def two_templates_make_two_facets() -> None:
    """S = max(w_1.I, w_2.I), less lambda ||I - m||^2, has two best pictures: m + w_i / (2 lambda)."""
    weight = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    weight[0, :, :2], weight[1, :, 2:] = 0.4, 0.4
    linear = nn.Linear(48, 2, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(weight.flatten(1))
        (head := nn.Linear(1, 2).double()).weight.copy_(torch.tensor([[1.0], [-1.0]]))
    network = nn.Sequential(nn.Flatten(), linear, _Larger(), head)
    model = load_model(network, mean=[0.5] * 3, std=[1.0] * 3, input_size=(3, 4, 4))
    random = torch.Generator().manual_seed(0)
    base = 0.1 * torch.rand(24, 3, 4, 4, dtype=torch.float64, generator=random)
    base[:8, :, :2] += 0.8
    base[8:13, :, 2:] += 0.8
    found = facets(model, Class(0), TensorDataset(base), layer="1", k=2, top=13, l2=1.0, blur_every=0,
                   jitter=0, parametrization="pixels", lr=0.01, steps=150, seed=0)  # fmt: skip
    assert found.sizes.tolist() == [8, 5], "not the two heaps"
    assert (found.images - (0.5 + weight / 2)).abs().max() < 0.02, "not at m + w_i / (2 lambda)"


@method(
    family="synthesis",
    title="Facets of a unit",
    references=[
        Reference(
            key="nguyen2016facets",
            title="Multifaceted Feature Visualization: Uncovering the Different Types of Features Learned By "
            "Each Neuron in Deep Neural Networks",
            authors="Nguyen, Yosinski, Clune",
            year=2016,
            url="https://arxiv.org/abs/1602.03616",
        )
    ],
    invariants=[PixelRange(), PixelRange(field="sources")],
    needs=["gradients", "dataset"],
    cost=Cost(
        forward=size.dataset + size.images * (minimum(param.top, size.dataset) + param.steps),
        backward=size.images * param.steps,
    ),
    oracle=two_templates_make_two_facets,
    quick={"k": 2, "top": 4, "steps": 4},
    demo={
        "dataset": "builtin:scenes/300",
        "target": "relu4_2[60]",
        "k": 3,
        "top": 40,
        "blur_every": 8,
        "jitter": 2,
        "steps": 60,
        "lr": 0.03,
    },
)
def facets(
    model: Model,
    target: Target,
    dataset: Dataset,
    *,
    layer: FeatureLayer = None,
    k: Annotated[int, Field(ge=1, le=100, description="how many facets")] = 4,
    top: Annotated[int, Field(ge=1, le=10_000, description="pictures with the highest score to sort")] = 80,
    nearest: Annotated[
        int, Field(ge=1, le=10_000, description="pictures next to a facet's middle, whose mean is the start")
    ] = 15,
    l2: L2 = 1e-3,
    total_variation: Variation = 0.0,
    blur_every: BlurEvery = 4,
    blur_sigma: BlurSigma = 0.8,
    jitter: Jitter = 4,
    parametrization: Moved = "fourier",
    steps: Steps = 100,
    lr: LearningRate = 0.01,
    frames: Frames = 0,
    seed: Seed = None,
) -> Facets:
    """Draw a prototype of every kind of picture that a unit answers to, not of one kind alone.

    I_f = argmax_I S(I) - l2 ||I - m||^2 - total_variation TV(I),  from the mean of facet f

    Of a data set the ``top`` pictures with the highest S are sorted into ``k`` heaps by k-means on what the
    classifier is given, or on a named ``layer`` averaged over its places: the facets. Each one's prototype is
    found by the ascent of ``class_visualization`` from the mean of its ``nearest`` pictures, which decides
    into which of the score's maxima it climbs. A heap is a claim of k-means, which finds k of them in
    anything: the examples beside a prototype show whether it is one kind.

    Prototypes (K, C, H, W) in [0, 1], K = k for each class of the target, or for its unit, the largest facet
    first; ``scores`` (steps, K) are S at every step. Heaps without a picture, of equal ones, are left out.
    Raises InputError for more facets than pictures, and for no target: which class is predicted is another
    thing for each picture. Source: Nguyen, Yosinski, Clune 2016, with k-means on the features themselves.
    """
    if isinstance(target, Predicted):  # which is another class for each picture
        raise InputError('facets are of one unit or of named classes: say target="star", for one')
    count = min(top, len(dataset))
    if k > count:
        raise InputError(f"{count} pictures make at most {count} facets, not {k}")
    each = isinstance(target, Class) and isinstance(target.index, tuple)
    units = list(map(Class, target.index)) if each else [target]
    made: list[Facets] = []
    for unit, told in zip(units, answers(model, dataset, units), strict=True):
        told, order = told.sort(descending=True, stable=True)
        places = order[:count].tolist()
        pictures = dataset.read(places).to(model.device, model.dtype)
        with torch.no_grad():
            features = torch.cat([represent(model, p, layer) for p in pictures.split(batch_size(model))])
        groups, _, _ = k_means(features, k, (seed or 0) % 2**32)
        heaps = sorted(((groups == n).nonzero()[:, 0] for n in groups.unique()), key=len, reverse=True)
        ordered = [heap[(features[heap] - features[heap].mean(0)).norm(dim=1).argsort()] for heap in heaps]
        starts = torch.stack([pictures[heap[:nearest]].mean(0) for heap in ordered])
        drawn = preferred(
            model,
            partial(scores, model, target=unit),
            len(starts),
            starts,
            l2=l2,
            total_variation=total_variation,
            blur_every=blur_every,
            blur_sigma=blur_sigma,
            jitter=jitter,
            parametrization=parametrization,
            seed=seed,
            steps=steps,
            lr=lr,
            frames=frames,
        )
        (name,) = unit.names(model, 1)
        shown = torch.cat([heap[:SHOWN] for heap in ordered])
        made.append(
            Facets(
                **drawn._asdict(),
                targets=tuple(f"{name}, facet {n + 1}" for n in range(len(starts))),
                sources=starts,
                sizes=groups.new_tensor([len(heap) for heap in heaps]),
                answers=torch.stack([told[:count][heap.cpu()].mean() for heap in heaps]).to(starts),
                examples=pictures[shown],
                shown=groups.new_tensor([min(SHOWN, len(heap)) for heap in heaps]),
                ids=tuple(dataset.id(places[n]) for n in shown.tolist()),
            )
        )
    return Facets.concatenate(made)


@torch.no_grad()
def answers(model: Model, dataset: Dataset, units: Sequence[Objective]) -> Tensor:
    """What every picture of a data set scores with each unit, (U, N); a run that was cut off goes on."""
    done = saved_progress()
    found, start = done.get("answers", torch.empty(len(units), 0)), done.get("read", 0)
    size = batch_size(model)
    for batch in progress_bar(
        dataset.batches(size, start), "top pictures", -(-(len(dataset) - start) // size)
    ):
        images = batch.images.to(model.device, model.dtype)
        if isinstance(units[0], Class):
            logits = model(images)
            new = torch.stack([unit.score(logits) for unit in units])
        else:
            new = torch.stack([scores(model, images, unit) for unit in units])
        found = torch.cat([found.to(new), new], 1)
        save_progress(**done | {"answers": found, "read": batch.indices[-1] + 1})
    return found.cpu()


@hookimpl
def phosphene_methods():
    return [facets]
