"""Evaluation loop of the scores: metrics of attribution maps of methods and baselines over a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phosphene import (
    Class,
    Dataset,
    Method,
    Model,
    batch_size,
    methods,
    report_progress,
    resumable,
)
from phosphene.errors import InputError
from phosphene.images import enlarge_maps
from phosphene.results import Attribution

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
    function computes all maps again, which counts towards the budget.
    """

    columns: tuple[str, ...]
    higher_is_better: tuple[bool, ...]
    function: Callable[[ScoringContext], Tensor | None]
    needs_masks: bool = False
    recomputations: int = 0


@dataclass(frozen=True)
class MapSource:
    """A source of maps: ``compute(model, images, target, indices)`` returns raw maps (n, H, W).

    ``indices`` are the images' positions in the data set. ``passes`` is the cost of one image in forward
    passes, a backward pass counting two, or None where it is unknown.
    """

    name: str
    compute: Callable[[Model, Tensor, Class, range], Tensor]
    passes: Callable[[Model, Tensor], int | None] = lambda model, images: 0
    depends_on_model: bool = False


def method_source(name: str, params: Mapping[str, Any], seed: int) -> MapSource:
    """Maps of a registered method; InputError for one that returns none, or parameters it does not have."""
    method: Method[..., Any] = methods[name]
    roles = {declared.role for declared in method.spec.inputs}
    if not issubclass(method.result, Attribution) or not roles <= {"model", "images", "target"}:
        valid = ", ".join(methods.by_family().get("attribution", ()))
        raise InputError(
            f"{method.spec.name} returns no maps of a model and images; these methods do: {valid}"
        )
    arguments = ({method.seed: seed} if method.seed is not None else {}) | dict(params)
    method.validate(arguments)

    def inputs(model: Model, images: Tensor, target: Any) -> dict[str, Any]:
        values = {"model": model, "images": images, "target": target}
        return {declared.name: values[declared.role] for declared in method.spec.inputs}

    def compute(model: Model, images: Tensor, target: Class, indices: range) -> Tensor:
        result: Attribution = method(**inputs(model, images, target), **arguments)
        return enlarge_maps(result.maps.to(images), images.shape[2:], result.centers)

    def passes(model: Model, images: Tensor) -> int | None:
        cost = method.passes(inputs(model, images, None), method.validate(arguments))
        return None if cost is None else cost[0] + 2 * cost[1]

    return MapSource(method.spec.short_name, compute, passes, depends_on_model=True)


def baseline_sources(count: int, seed: int) -> list[MapSource]:
    """Maps that ignore the model: a Gaussian about the image's center, and smooth random maps."""
    noise = torch.randn(count, 8, 8, generator=torch.Generator().manual_seed(seed))

    def center(model: Model, images: Tensor, target: Class, indices: range) -> Tensor:
        height, width = images.shape[2:]
        y, x = (torch.linspace(-1, 1, side, dtype=images.dtype) for side in (height, width))
        # The standard deviation is a quarter of the image's side.
        return torch.exp(-2 * (y[:, None] ** 2 + x**2)).to(images).expand(len(images), -1, -1)

    def random(model: Model, images: Tensor, target: Class, indices: range) -> Tensor:
        return enlarge_maps(noise[indices.start : indices.stop].to(images), images.shape[2:])

    return [MapSource("centre point", center), MapSource("random maps", random)]


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
            model.class_index(labels[0])

    def batches(self) -> list[range]:
        """The indices of each batch."""
        return [range(i, min(i + self.size, self.count)) for i in range(0, self.count, self.size)]

    def read(self, indices: range) -> tuple[Tensor, Tensor | None]:
        """Images (n, C, H, W) and masks (n, H, W), None for a data set without masks."""
        images = self.dataset.read(indices).to(self._device, self._dtype)
        masks = self.dataset.masks(indices)
        return images, None if masks is None else masks.to(self._device)

    def classes(self, model: Model, images: Tensor, indices: range) -> Class:
        """The class that each image's map explains."""
        if self.target == "predicted":
            return Class(tuple(model(images).argmax(1).tolist()))
        labels = self.dataset.labels(indices)
        assert labels is not None
        return Class(tuple(map(model.class_index, labels)))


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
    state = {
        "values": first.new_zeros(*shape, data.count),
        "counts": torch.zeros(shape, dtype=torch.int64, device=first.device),
        "maps": first.new_zeros(*shape[:2], examples, *first.shape[2:]),
    }
    work = [(b, m, s) for b in data.batches() for m in range(len(models)) for s in range(len(sources))]
    batch: tuple[range, Tensor, Tensor | None] | None = None
    for indices, m, s in resumable(work, state, "scoring maps"):
        scored = range(indices.start, min(indices.stop, limits[m][s]))
        if not scored:
            continue
        if batch is None or batch[0] != indices:
            batch = (indices, *data.read(indices))
        images, masks = batch[1][: len(scored)], None if batch[2] is None else batch[2][: len(scored)]
        with report_progress(False):  # one progress bar for all, not one for each batch of each method
            target = data.classes(models[m], images, scored)
            source = sources[s]
            maps = source.compute(models[m], images, target, scored)
            recompute = _recompute(source, images, target, scored) if source.depends_on_model else None
            context = ScoringContext(models[m], images, maps, target, masks, recompute)
            column = 0
            for metric in metrics:
                result = metric.function(context)
                part = slice(column, column := column + len(metric.columns))
                if result is not None:
                    state["values"][m, s, part, scored.start : scored.stop] = result.T.to(first)
                    state["counts"][m, s, part] = scored.stop
        count = max(0, min(examples, scored.stop) - scored.start)
        state["maps"][m, s, scored.start : scored.start + count] = positive_part(maps[:count])
    images, masks = data.read(range(examples))
    return Evaluation(state["values"], state["counts"], images, masks, state["maps"])


def _recompute(source: MapSource, images: Tensor, target: Class, indices: range) -> Callable[[Model], Tensor]:
    """The source's maps of the same images and classes as a function of the model."""
    return lambda model: source.compute(model, images, target, indices)


def _image_limit(passes: int | None, budget: int, count: int, recomputations: int) -> int:
    """Number of images that can be scored in ``budget`` forward passes; all where the cost is unknown."""
    return max(1, min(count, budget // max(1, (passes or 0) * (1 + recomputations))))
