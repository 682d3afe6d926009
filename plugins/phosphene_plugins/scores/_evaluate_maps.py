"""Evaluation loop of the scores: metrics of attribution maps of methods and baselines over a data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from phosphene import (
    Class,
    Dataset,
    Fold,
    Method,
    Model,
    batch_size,
    methods,
    report_progress,
)
from phosphene.data import Batch, Rows, State
from phosphene.errors import InputError
from phosphene.images import enlarge_maps
from phosphene.results import Attribution
from phosphene.training import label_index

from ._parameters import TargetSource


@dataclass(frozen=True)
class ScoringContext:
    """A batch of images and their maps, as a metric receives them.

    ``images`` (n, C, H, W); ``maps`` (n, H, W), raw; ``target`` the class that each map explains; ``masks``
    (n, H, W) bool, the objects, None where the data set has none; ``recompute_maps(model)`` returns the same
    maps of another model, None for baselines, which depend on no model.
    """

    model: Model
    images: Tensor
    maps: Tensor
    target: Class
    masks: Tensor | None
    recompute_maps: Callable[[Model], Tensor] | None

    def object_masks(self) -> Tensor:
        """The masks; only for metrics with ``needs_masks``."""
        assert self.masks is not None
        return self.masks


@dataclass(frozen=True)
class Metric:
    """One or several numbers per map: ``function`` returns (n, columns), or None where it is undefined.

    ``higher_is_better`` has an entry for each column; ``recomputations`` is the number of times that the
    function computes all maps again, which counts towards the budget. The function is sent to other
    processes: an instance of a class at the top of a module, not a closure.
    """

    columns: tuple[str, ...]
    higher_is_better: tuple[bool, ...]
    function: Callable[[ScoringContext], Tensor | None]
    needs_masks: bool = False
    recomputations: int = 0


class MapSource(ABC):
    """A source of maps. It is sent to other processes, so it holds data and no functions."""

    name: str
    #: Whether the maps of another model differ.
    depends_on_model: ClassVar[bool] = False

    @abstractmethod
    def compute(self, model: Model, images: Tensor, target: Class, indices: range) -> Tensor:
        """Raw maps (n, H, W) of images; ``indices`` are their positions in the data set."""

    def passes(self, model: Model, images: Tensor) -> int | None:
        """The cost of one image in forward passes, a backward pass counting two; None where it is unknown."""
        return 0


@dataclass(frozen=True)
class MethodMaps(MapSource):
    """Maps of a registered method."""

    name: str
    method: str
    arguments: Mapping[str, Any]
    depends_on_model: ClassVar[bool] = True

    def compute(self, model: Model, images: Tensor, target: Class, indices: range) -> Tensor:
        result: Attribution = methods[self.method](**self._inputs(model, images, target), **self.arguments)
        return enlarge_maps(result.maps.to(images), images.shape[2:], result.centers)

    def passes(self, model: Model, images: Tensor) -> int | None:
        method = methods[self.method]
        cost = method.passes(self._inputs(model, images, None), method.validate(self.arguments))
        return None if cost is None else cost[0] + 2 * cost[1]

    def _inputs(self, model: Model, images: Tensor, target: Any) -> dict[str, Any]:
        values = {"model": model, "images": images, "target": target}
        return {declared.name: values[declared.role] for declared in methods[self.method].spec.inputs}


def method_source(name: str, params: Mapping[str, Any], seed: int) -> MapSource:
    """Maps of a registered method; InputError for one that returns none, or parameters it does not have."""
    method: Method[..., Any] = methods[name]
    roles = {declared.role for declared in method.spec.inputs}
    if not issubclass(method.result, Attribution) or not roles <= {"model", "images", "target"}:
        valid = ", ".join(methods.by_family()["attribution"])
        raise InputError(
            f"{method.spec.name} returns no maps of a model and images; these methods do: {valid}"
        )
    arguments = ({method.seed: seed} if method.seed is not None else {}) | dict(params)
    method.validate(arguments)
    return MethodMaps(method.spec.short_name, name, arguments)


@dataclass(frozen=True)
class CenterPoint(MapSource):
    """A Gaussian about the image's center, with a quarter of the image's side as standard deviation."""

    name: str = "center point"

    def compute(self, model: Model, images: Tensor, target: Class, indices: range) -> Tensor:
        height, width = images.shape[2:]
        y, x = (torch.linspace(-1, 1, side, dtype=images.dtype) for side in (height, width))
        return torch.exp(-2 * (y[:, None] ** 2 + x**2)).to(images).expand(len(images), -1, -1)


@dataclass(frozen=True)
class RandomMaps(MapSource):
    """Smooth random maps: ``noise`` (N, 8, 8) of each image, enlarged."""

    noise: Tensor
    name: str = "random maps"

    def compute(self, model: Model, images: Tensor, target: Class, indices: range) -> Tensor:
        return enlarge_maps(self.noise[indices.start : indices.stop].to(images), images.shape[2:])


def baseline_sources(count: int, seed: int) -> list[MapSource]:
    """Maps that ignore the model: a Gaussian about the image's center, and smooth random maps."""
    noise = torch.randn(count, 8, 8, generator=torch.Generator().manual_seed(seed))
    return [CenterPoint(), RandomMaps(noise)]


def positive_part(maps: Tensor) -> Tensor:
    """The evidence for the target in raw maps (N, H, W): their positive part, as in ``Attribution.heat``.

    For a map without positive values, its values minus their minimum; for a constant one, ones.
    """
    offset = maps - maps.amin((1, 2), keepdim=True)
    fallback = torch.where(offset.amax((1, 2), keepdim=True) > 0, offset, 1)
    return torch.where(maps.amax((1, 2), keepdim=True) > 0, maps.clamp(min=0), fallback)


def pixel_ranks(maps: Tensor) -> Tensor:
    """Each pixel's rank in its map (N, H, W), 0 for the maximum; ties in row-major order."""
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1).view_as(maps)


@dataclass(frozen=True)
class Evaluation:
    """Metrics of P images: ``values`` (models, sources, columns, P), the first ``counts`` are computed.

    ``images``, ``masks`` and ``maps`` (models, sources, E, H, W) are those of the first images.
    """

    values: Tensor
    counts: Tensor
    images: Tensor
    masks: Tensor | None
    maps: Tensor


class EvaluationSet:
    """The images of a data set that maps are scored on, with masks and labels, read in batches."""

    def __init__(
        self, model: Model, dataset: Dataset, max_images: int, target: TargetSource, *, needs_masks: bool
    ) -> None:
        self.dataset, self.target = dataset, target
        self.count = min(max_images, len(dataset))
        self.size = batch_size(model)
        self._dtype, self._device = model.dtype, model.device
        if needs_masks and dataset.masks([0]) is None:
            raise InputError(
                "this score needs masks of the objects, and the data set has none: put dog.mask.png beside "
                "dog.jpg, or pass TensorDataset(images, objects=masks)"
            )
        if target == "label":
            labels = dataset.labels([0])
            if labels is None:
                raise InputError(
                    'the data set has no labels: use target="predicted", or sort its images into a folder '
                    "for each class, or pass TensorDataset(images, classes)"
                )
            label_index(model, labels[0])

    def read(self, indices: range) -> tuple[Tensor, Tensor | None]:
        """Images (n, C, H, W) and masks (n, H, W), None for a data set without masks."""
        images = self.dataset.read(indices).to(self._device, self._dtype)
        masks = self.dataset.masks(indices)
        return images, None if masks is None else masks.to(self._device)


def explained_class(model: Model, target: TargetSource, images: Tensor, batch: Batch) -> Class:
    """The class that each image's map explains: the predicted one or that of its label."""
    if target == "predicted":
        return Class(tuple(model(images).argmax(1).tolist()))
    labels = batch.labels
    assert labels is not None
    return Class(tuple(label_index(model, label) for label in labels))


def evaluate_maps(
    models: Sequence[Model],
    data: EvaluationSet,
    sources: Sequence[MapSource],
    metrics: Sequence[Metric],
    *,
    budget: int,
    examples: int,
) -> Evaluation:
    """Every metric of every source's maps on every model; resumes from a checkpoint."""
    first, _ = data.read(range(1))
    recomputations = max(metric.recomputations for metric in metrics)
    limits = [
        [_image_limit(source.passes(model, first), budget, data.count, recomputations) for source in sources]
        for model in models
    ]
    columns = sum(len(metric.columns) for metric in metrics)
    shape = (len(models), len(sources), columns)
    examples = min(examples, data.count)
    values = first.new_zeros(*shape, data.count)
    counts = torch.zeros(shape, dtype=torch.int64, device=first.device)
    maps = first.new_zeros(*shape[:2], examples, *first.shape[2:])
    for m, model in enumerate(models):
        for s, source in enumerate(sources):
            title = f"scoring {source.name}"
            fold = MapScores(model, source, tuple(metrics), data.target, examples, title)
            state = fold.run(data.dataset, data.size, stop=limits[m][s])
            rows, some = state["values"].tensor(), state["maps"].tensor()
            values[m, s, :, : len(rows)] = rows.T.to(first)
            counts[m, s] = state["counts"].to(first.device)
            maps[m, s, : len(some)] = some.to(first)
    images, masks = data.read(range(examples))
    return Evaluation(values, counts, images, masks, maps)


@dataclass
class MapScores(Fold[State]):
    """The metrics of a source's maps on a model: ``values`` (n, columns), and ``counts``, where defined.

    ``maps`` (E, H, W) are those of the first ``examples`` images.
    """

    model: Model
    source: MapSource
    metrics: tuple[Metric, ...]
    target: TargetSource
    examples: int
    title: str
    # A batch takes many passes.
    # equivalent mutants: the result does not depend on how the batches are divided
    shard_batches = 1

    def start(self) -> State:
        columns = sum(len(metric.columns) for metric in self.metrics)
        counts = torch.zeros(columns, dtype=torch.int64)
        return {"values": Rows(), "maps": Rows(), "counts": counts}

    def update(self, state: State, batch: Batch) -> State:
        model, source, first = self.model, self.source, batch.indices[0]
        images, indices = batch.images.to(model.device, model.dtype), range(first, batch.indices[-1] + 1)
        masks = None if (objects := batch.masks) is None else objects.to(model.device)
        parts, counts = [], []
        with report_progress(False):  # one progress bar for a source, not one for each of its batches
            target = explained_class(model, self.target, images, batch)
            maps = source.compute(model, images, target, indices)
            recompute = _recompute(source, images, target, indices) if source.depends_on_model else None
            context = ScoringContext(model, images, maps, target, masks, recompute)
            for metric in self.metrics:
                result = metric.function(context)
                undefined = images.new_zeros(len(images), len(metric.columns))
                parts.append(undefined if result is None else result.to(images))
                counts += [0 if result is None else len(images)] * len(metric.columns)
        state["values"].write(first, torch.cat(parts, 1))
        if first < self.examples:
            state["maps"].write(first, positive_part(maps[: self.examples - first]))
        return state | {"counts": state["counts"] + torch.tensor(counts)}


def _recompute(source: MapSource, images: Tensor, target: Class, indices: range) -> Callable[[Model], Tensor]:
    """The source's maps of the same images and classes as a function of the model."""
    return lambda model: source.compute(model, images, target, indices)


def _image_limit(passes: int | None, budget: int, count: int, recomputations: int) -> int:
    """Number of images that can be scored in ``budget`` forward passes; all where the cost is unknown."""
    return max(1, min(count, budget // max(1, (passes or 0) * (1 + recomputations))))
