"""What all scores share: maps of a data set's pictures, by methods and by baselines, measured one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from phosphene import (
    Class,
    Dataset,
    Method,
    Model,
    batch_size,
    methods,
    progress_bar,
    report_progress,
    save_progress,
    saved_progress,
)
from phosphene.errors import InputError
from phosphene.results import Attribution

Target = Literal["label", "predicted"]


# The parameters that every score has.
MethodName = Annotated[str, Field(description="whose maps are scored: any method that gives an Attribution")]


MethodParams = Annotated[dict[str, Any], Field(description="that method's parameters")]


About = Annotated[Target, Field(description="what maps are about: the class that is known, or the model's")]


Pictures = Annotated[int, Field(ge=1, description="the first so many of the data set, or all it has")]


Budget = Annotated[
    int, Field(ge=1, description="passes of one method; an expensive one is scored on fewer pictures")
]


@dataclass(frozen=True)
class Explained:
    """Some pictures and their maps, as a measure sees them.

    ``images`` (n, C, H, W); ``maps`` (n, H, W), raw; ``target`` the class that each map is about;
    ``masks`` (n, H, W) bool where they are known; ``again(model)`` the same maps of another model.
    """

    model: Model
    images: Tensor
    maps: Tensor
    target: Class
    masks: Tensor | None
    again: Callable[[Model], Tensor] | None

    def objects(self) -> Tensor:
        """The masks; only measures that say ``needs_masks`` may ask."""
        assert self.masks is not None
        return self.masks


@dataclass(frozen=True)
class Measure:
    """One or several numbers of a map: ``function`` gives (n, columns), or None for what has no such."""

    columns: tuple[str, ...]
    higher: tuple[bool, ...]
    function: Callable[[Explained], Tensor | None]
    needs_masks: bool = False
    #: How often it has the maps made, beside the first time.
    reruns: int = 0


@dataclass(frozen=True)
class Source:
    """Where maps come from: ``explain(model, images, target, places in the data set)``, raw (n, H, W).

    ``passes`` is what one picture costs, forward and twice backward, where that is known.
    """

    name: str
    explain: Callable[[Model, Tensor, Class, range], Tensor]
    passes: Callable[[Model, Tensor], int | None] = lambda model, images: 0
    repeatable: bool = False


def from_method(name: str, params: Mapping[str, Any], seed: int) -> Source:
    """Maps of a registered method; InputError for one that gives none, or is asked what it has not."""
    method: Method[..., Any] = methods[name]
    roles = {declared.role for declared in method.spec.inputs}
    if not issubclass(method.result, Attribution) or not roles <= {"model", "images", "target"}:
        known = ", ".join(methods.by_family().get("attribution", ()))
        raise InputError(f"{method.spec.name} gives no maps of a model and pictures; these do: {known}")
    given = ({method.seed: seed} if method.seed is not None else {}) | dict(params)
    method.validate(given)

    def inputs(model: Model, images: Tensor, target: Any) -> dict[str, Any]:
        values = {"model": model, "images": images, "target": target}
        return {declared.name: values[declared.role] for declared in method.spec.inputs}

    def explain(model: Model, images: Tensor, target: Class, places: range) -> Tensor:
        maps: Tensor = method(**inputs(model, images, target), **given).maps
        return enlarged(maps.to(images), images)

    def passes(model: Model, images: Tensor) -> int | None:
        found = method.passes(inputs(model, images, None), method.validate(given))
        return None if found is None else found[0] + 2 * found[1]

    return Source(method.spec.short_name, explain, passes, repeatable=True)


def baselines(count: int, seed: int) -> list[Source]:
    """What any map must beat: a Gaussian about the picture's centre, and smooth random maps."""
    noise = torch.randn(count, 8, 8, generator=torch.Generator().manual_seed(seed))

    def centre(model: Model, images: Tensor, target: Class, places: range) -> Tensor:
        height, width = images.shape[2:]
        y, x = (torch.linspace(-1, 1, side, dtype=images.dtype) for side in (height, width))
        # A quarter of the picture's side is its standard deviation.
        return torch.exp(-2 * (y[:, None] ** 2 + x**2)).to(images).expand(len(images), -1, -1)

    def chance(model: Model, images: Tensor, target: Class, places: range) -> Tensor:
        return enlarged(noise[places.start : places.stop].to(images), images)

    return [Source("centre point", centre), Source("random maps", chance)]


def enlarged(maps: Tensor, images: Tensor) -> Tensor:
    """Maps (N, h, w) at the pictures' size, bilinearly."""
    if maps.shape[1:] == images.shape[2:]:
        return maps
    return F.interpolate(maps[:, None], images.shape[2:], mode="bilinear")[:, 0]


def evidence(maps: Tensor) -> Tensor:
    """What of raw maps (N, H, W) speaks for the target: the positive part, as ``Attribution.heat`` has it.

    Where nothing does, how far each place is above the lowest, and where all are equal, ones.
    """
    spread = maps - maps.amin((1, 2), keepdim=True)
    rest = torch.where(spread.amax((1, 2), keepdim=True) > 0, spread, 1)
    return torch.where(maps.amax((1, 2), keepdim=True) > 0, maps.clamp(min=0), rest)


def ranks(maps: Tensor) -> Tensor:
    """Each place's rank in its map (N, H, W), 0 the highest; of equal ones the upper, then the left first."""
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1).view_as(maps)


@dataclass(frozen=True)
class Table:
    """Measures of every picture: ``each`` (models, sources, columns, P), of which ``counts`` are known.

    The first pictures themselves, their masks and their maps, (models, sources, E, H, W).
    """

    each: Tensor
    counts: Tensor
    images: Tensor
    masks: Tensor | None
    maps: Tensor


class Pool:
    """The pictures of a data set that are scored, with what is known of them, read a batch at a time."""

    def __init__(
        self, model: Model, dataset: Dataset, pictures: int, target: Target, *, needs_masks: bool
    ) -> None:
        self.dataset, self.target = dataset, target
        self.count = min(pictures, len(dataset))
        self.size = batch_size(model)
        self._dtype, self._device = model.dtype, model.device
        if needs_masks and dataset.masks([0]) is None:
            raise InputError(
                "this score needs to know where the objects are, and the data set does not: put dog.mask.png "
                "beside dog.jpg, or give TensorDataset(images, objects=masks)"
            )
        if target == "label":
            labels = dataset.labels([0])
            if labels is None:
                raise InputError(
                    'the data set knows no classes: say target="predicted", or sort its pictures into a '
                    "folder for each class, or give TensorDataset(images, classes)"
                )
            model.class_index(labels[0])

    def batches(self) -> list[range]:
        """The places of each batch."""
        return [range(i, min(i + self.size, self.count)) for i in range(0, self.count, self.size)]

    def read(self, places: range) -> tuple[Tensor, Tensor | None]:
        """Pictures and masks."""
        images = self.dataset.read(places).to(self._device, self._dtype)
        masks = self.dataset.masks(places)
        return images, None if masks is None else masks.to(self._device)

    def classes(self, model: Model, images: Tensor, places: range) -> Class:
        """The class that each picture's map is about."""
        if self.target == "predicted":
            return Class(tuple(model(images).argmax(1).tolist()))
        labels = self.dataset.labels(places)
        assert labels is not None
        return Class(tuple(map(model.class_index, labels)))


def score(
    models: Sequence[Model],
    pool: Pool,
    sources: Sequence[Source],
    measures: Sequence[Measure],
    *,
    budget: int,
    examples: int,
) -> Table:
    """Measure the maps of every source on every model; goes on where it was cut off."""
    first, _ = pool.read(range(1))
    reruns = max(measure.reruns for measure in measures)
    # How many pictures each source is scored on.
    shares = [[_share(s.passes(m, first), budget, pool.count, reruns) for s in sources] for m in models]
    columns = sum(len(measure.columns) for measure in measures)
    shape = (len(models), len(sources), columns)
    few = min(examples, pool.count)
    state = saved_progress() or {
        "done": 0,
        "each": first.new_zeros(*shape, pool.count),
        "counts": torch.zeros(shape, dtype=torch.int64, device=first.device),
        "maps": first.new_zeros(*shape[:2], few, *first.shape[2:]),
    }
    each, counts, kept = (state[name].to(first.device) for name in ("each", "counts", "maps"))
    work = [(p, m, s) for p in pool.batches() for m in range(len(models)) for s in range(len(sources))]
    read: tuple[range, Tensor, Tensor | None] | None = None
    for done, (places, m, s) in enumerate(progress_bar(work, "scoring maps"), start=1):
        places = range(places.start, min(places.stop, shares[m][s]))
        if done <= state["done"] or not places:
            continue
        if read is None or read[0].start != places.start:
            whole = range(places.start, min(places.start + pool.size, pool.count))
            read = (whole, *pool.read(whole))
        images, masks = read[1][: len(places)], None if read[2] is None else read[2][: len(places)]
        with report_progress(False):  # one count for all, not one for each batch of each method
            target = pool.classes(models[m], images, places)
            source = sources[s]
            maps = source.explain(models[m], images, target, places)
            again = _again(source, images, target, places) if source.repeatable else None
            seen = Explained(models[m], images, maps, target, masks, again)
            column = 0
            for measure in measures:
                found = measure.function(seen)
                part = slice(column, column := column + len(measure.columns))
                if found is not None:
                    each[m, s, part, places.start : places.stop] = found.T.to(each)
                    counts[m, s, part] = places.stop
        shown = max(0, min(few, places.stop) - places.start)
        kept[m, s, places.start : places.start + shown] = evidence(maps[:shown])
        save_progress(done=done, each=each, counts=counts, maps=kept)
    images, masks = pool.read(range(few))
    return Table(each, counts, images, masks, kept)


def _again(source: Source, images: Tensor, target: Class, places: range) -> Callable[[Model], Tensor]:
    return lambda model: source.explain(model, images, target, places)


def _share(passes: int | None, budget: int, count: int, reruns: int) -> int:
    """How many pictures a source is scored on; all where its cost is not told."""
    return max(1, min(count, budget // max(1, (passes or 0) * (1 + reruns))))
