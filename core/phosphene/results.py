"""What methods give back: tensors that show themselves, save themselves and say how they came about."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import InputError, PhospheneError, UnknownName
from .images import colorize, enlarge, grid, min_max, overlay, to_display, write_png
from .registry import methods

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .models import Model

FORMAT = 1


class Provenance(BaseModel):
    """How a result came about: enough to make it again and to see whether it came out the same."""

    model_config = ConfigDict(frozen=True)

    method: str
    distribution: str
    params: dict[str, Any]
    inputs: dict[str, Any]
    model: dict[str, Any] | None
    seed: int | None
    versions: dict[str, str]
    device: str
    dtype: str
    batch_size: int | None
    started: str
    seconds: float


@dataclass(frozen=True)
class Panel:
    """One picture of a figure, any (C, H, W) that becomes (3, H, W) in [0, 1], with a title."""

    image: Tensor
    title: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", to_display(self.image))


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """The base of all results; a subclass adds tensors and ``panels``.

    ``per_image`` says whether row i belongs to image i, so that batches can be put together.
    """

    types: ClassVar[dict[str, type[Result]]] = {}
    per_image: ClassVar[bool] = False
    shared: ClassVar[frozenset[str]] = frozenset()

    provenance: Provenance | None = field(default=None, repr=False)
    #: The tensors and names that the method was given, so that it can be run again.
    inputs: Mapping[str, Any] = field(default_factory=dict, repr=False)
    #: The folder it was loaded from.
    uri: str | None = field(default=None, repr=False)

    def __init_subclass__(cls) -> None:
        Result.types[cls.__name__] = cls

    def panels(self) -> list[list[Panel]]:
        """The result as rows of pictures."""
        raise NotImplementedError(f"{type(self).__name__} must say how it looks: panels()")

    def pictures(self) -> Sequence[Tensor]:
        """Pictures worth a file of their own at their own size, (3, H, W) each."""
        return ()

    def lines(self) -> list[str]:
        """The result in a line of words per image, or per picture made; none where words say nothing."""
        return []

    def fields(self) -> Iterator[tuple[str, Any]]:
        """The result's own fields: everything but where it comes from."""
        for f in dataclasses.fields(self):
            if f.name not in ("provenance", "inputs", "uri"):
                yield f.name, getattr(self, f.name)

    @classmethod
    def restore(cls, fields: dict[str, Any], **rest: Any) -> Result:
        """The result again from its saved fields."""
        return cls(**fields, **rest)

    @classmethod
    def concatenate(cls, results: Sequence[Self]) -> Self:
        """Put the results of consecutive batches together."""
        merged: dict[str, Any] = {}
        for name, first in results[0].fields():
            values = [getattr(result, name) for result in results]
            if isinstance(first, Tensor):
                merged[name] = torch.cat(values)
            elif isinstance(first, tuple) and name not in cls.shared:
                merged[name] = tuple(itertools.chain(*values))
        return dataclasses.replace(results[0], **merged)

    def figure(self) -> Figure:
        """All panels as a matplotlib figure."""
        from matplotlib.figure import Figure

        rows = self.panels()
        if not any(rows):
            raise InputError(f"this {type(self).__name__} holds no pictures to show")
        columns = max(map(len, rows))
        ratio = rows[0][0].image.shape[1] / rows[0][0].image.shape[2]
        # Large pictures at their own size, and never more than the width of a page.
        side = min(max(2.2, max(p.image.shape[2] for row in rows for p in row) / 110), 14 / columns)
        figure = Figure(figsize=(side * columns, (side * ratio + 0.3) * len(rows)), dpi=110)
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for row, row_axes in zip(rows, axes, strict=True):
            for axis in row_axes:
                axis.set_axis_off()
            for panel, axis in zip(row, row_axes, strict=False):
                pixels = panel.image.permute(1, 2, 0).float().cpu().numpy()
                axis.imshow(pixels, interpolation="nearest" if max(pixels.shape) < 128 else "antialiased")
                axis.set_title(panel.title, fontsize=8)
        figure.tight_layout(pad=0.4)
        return figure

    def png(self) -> bytes:
        """The figure as a PNG file's bytes."""
        stream = io.BytesIO()
        self.figure().savefig(stream, format="png")
        return stream.getvalue()

    def _repr_html_(self) -> str:
        source = base64.b64encode(self.png()).decode()
        return f'<img alt="{type(self).__name__}" src="data:image/png;base64,{source}">'

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write PNGs for people (``picture.png``, ``pictures/``) and safetensors + JSON for programs.

        The folder appears whole or not at all; one that holds an earlier result is replaced.
        """
        with _appearing(Path(folder).resolve()) as place:
            tensors: dict[str, Tensor] = {}
            document = {
                "format": FORMAT,
                "type": type(self).__name__,
                "fields": {n: _encode(v, n, tensors) for n, v in self.fields()},
                "inputs": {n: _encode(v, f"inputs.{n}", tensors) for n, v in self.inputs.items()},
                "provenance": self.provenance.model_dump(mode="json") if self.provenance else None,
            }
            save_file(tensors, place / "arrays.safetensors")
            (place / "result.json").write_text(json.dumps(document, indent=2))
            (place / "picture.png").write_bytes(self.png())
            for number, picture in enumerate(self.pictures()):
                (place / "pictures").mkdir(exist_ok=True)
                write_png(picture, place / "pictures" / f"{number:03d}.png")
        return Path(folder)


def check_place(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that a result cannot be saved in: a file, one with other things, one in use."""
    folder = Path(folder).resolve()
    file = next((place for place in (folder, *folder.parents) if place.is_file()), None)
    if file is not None:
        raise InputError(f"{file} is a file; results are saved in a folder")
    if folder == Path.cwd():
        raise InputError(f"{folder} is the folder you work in; results are saved in one of their own")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "result.json").is_file():
        raise InputError(f"{folder} holds other things than a result; choose an empty or a new folder")


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A temporary sibling of ``folder`` to write into, which takes its place at the end."""
    check_place(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Everything is written inside one hidden folder, and an earlier result moves in there to be deleted.
    with tempfile.TemporaryDirectory(prefix=".phosphene-", dir=folder.parent) as hidden:
        new, old = Path(hidden, "new"), Path(hidden, "old")
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:  # an interruption, too, must not cost the earlier result
            if old.exists():
                old.rename(folder)
            raise


def _encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    match value:
        case Tensor():
            tensors[key] = _own_copy(value)
            return {"$tensor": key}
        case nn.Module():
            tensors.update({f"{key}.{n}": _own_copy(t) for n, t in value.state_dict().items()})
            return {"$network": key}
        case tuple() | list():
            return [_encode(v, f"{key}.{i}", tensors) for i, v in enumerate(value)]
        case Mapping():
            return {str(k): _encode(v, f"{key}.{k}", tensors) for k, v in value.items()}
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"{key}: a result cannot save a {type(value).__name__}")


def _own_copy(tensor: Tensor) -> Tensor:
    # safetensors refuses tensors that share memory, as a result's images and the input's often do.
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "$tensor" in value:
            return tensors[value["$tensor"]]
        if "$network" in value:
            prefix = value["$network"] + "."
            return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        return {k: _decode(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(_decode(v, tensors) for v in value)
    return value


def load_result(folder: str | os.PathLike[str]) -> Result:
    """A saved result, with its provenance and inputs. Nothing in the folder is executed."""
    folder = Path(folder)
    if not (folder / "result.json").is_file():
        raise InputError(f"{folder} holds no saved result (no result.json)")
    try:
        document = json.loads((folder / "result.json").read_text())
        tensors = load_file(folder / "arrays.safetensors")
        if document["format"] != FORMAT:
            raise InputError(
                f"{folder} was saved in format {document['format']}; this version reads {FORMAT}"
            )
        name, provenance = document["type"], document["provenance"]
        fields = {n: _decode(v, tensors) for n, v in document["fields"].items()}
        inputs = {n: _decode(v, tensors) for n, v in document["inputs"].items()}
    except PhospheneError:
        raise
    except Exception as error:  # whatever a damaged file makes the parsers say
        raise InputError(f"{folder} is not a whole result: {error}") from error
    if name not in Result.types and provenance:  # its plugin may bring it
        with contextlib.suppress(PhospheneError):
            _ = methods[provenance["method"]]
    if name not in Result.types:
        raise UnknownName("result type", name, Result.types)
    return Result.types[name].restore(
        fields,
        provenance=Provenance(**provenance) if provenance else None,
        inputs=inputs,
        uri=str(folder.resolve()),
    )


# --- the types -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class Attribution(Result):
    """How much each place of an image matters for a target.

    ``images`` (N, C, H, W) in [0, 1]; ``maps`` (N, h, w), raw: neither clipped nor normalised
    unless the method's parameters say so; ``targets`` what each map is about.
    """

    per_image: ClassVar[bool] = True
    shared: ClassVar[frozenset[str]] = frozenset({"layout"})

    images: Tensor
    maps: Tensor
    targets: tuple[str, ...]
    #: "overlay" for maps coarser than the picture, "map" for ones that show better alone.
    layout: Literal["overlay", "map"] = "overlay"

    def heat(self) -> Tensor:
        """The maps at the images' size (bilinear), each scaled to [0, 1]: (N, H, W)."""
        maps = self.maps.float()
        if maps.shape[1:] != self.images.shape[2:]:
            maps = F.interpolate(maps[:, None], self.images.shape[2:], mode="bilinear")[:, 0]
        # What speaks against the target is not heat, unless nothing speaks for it.
        return min_max(torch.where(maps.amax((1, 2), keepdim=True) > 0, maps.clamp(min=0), maps))

    def drawn(self) -> list[Tensor]:
        """Each map as a picture, (3, H, W)."""
        if self.layout == "overlay":
            return [overlay(to_display(i), h) for i, h in zip(self.images, self.heat(), strict=True)]
        if (self.maps < 0).any():
            return list(colorize(self.maps, symmetric=True))
        # A few pixels far above the rest would leave the picture black.
        tops = self.maps.flatten(1).float().quantile(0.99, dim=1).clamp(min=1e-30)
        return list(colorize((self.maps / tops[:, None, None]).clamp(max=1), cmap="inferno", limits=(0, 1)))

    def lines(self) -> list[str]:
        width = self.images.shape[3]
        peaks = zip(self.targets, self.heat().flatten(1).argmax(1).tolist(), strict=True)
        return [f"{n:03d}  {t}: strongest at x {p % width}, y {p // width}" for n, (t, p) in enumerate(peaks)]

    def panels(self) -> list[list[Panel]]:
        drawn = zip(self.images, self.drawn(), self.targets, strict=True)
        return _wrapped([[Panel(i), Panel(d, t)] for i, d, t in drawn], 4)

    def pictures(self) -> Sequence[Tensor]:
        return self.drawn()


def _wrapped(groups: list[list[Panel]], most: int) -> list[list[Panel]]:
    """Groups of panels laid side by side, at most ``most`` groups a row."""
    return [
        [panel for group in groups[start : start + most] for panel in group]
        for start in range(0, len(groups), most)
    ]


@dataclass(frozen=True, eq=False, kw_only=True)
class FilterBank(Result):
    """Filters of a layer as they are learned.

    ``weights`` (F, C, K, K) as they are, ``tiles`` (T, 3, K, K) in [0, 1] to look at, ``captions``
    what each tile is, ``columns`` how many stand in a row.
    """

    layer: str
    weights: Tensor
    tiles: Tensor
    captions: tuple[str, ...]
    columns: int = 8

    def drawn(self) -> Tensor:
        """All tiles in one picture, single weights large enough to be seen: (3, H, W)."""
        side = max(12, min(66, 1320 // self.columns))
        factor = max(1, side // max(self.tiles.shape[2:]))
        return grid(enlarge(self.tiles, factor), columns=self.columns, padding=3)

    def panels(self) -> list[list[Panel]]:
        size = "x".join(str(s) for s in self.weights.shape)
        return [[Panel(self.drawn(), f"{self.layer}: {size}")]]

    def pictures(self) -> Sequence[Tensor]:
        return [self.drawn()]


@dataclass(frozen=True, eq=False, kw_only=True)
class ActivationMaps(Result):
    """What chosen channels of a layer answer to images.

    ``images`` (N, C, H, W); ``maps`` (N, K, h, w) raw activations; ``scaled`` the same in [0, 1]
    for showing; ``channels`` their K numbers. Of more than nine, a figure shows each image's
    strongest.
    """

    per_image: ClassVar[bool] = True
    shared: ClassVar[frozenset[str]] = frozenset({"channels", "layer", "layout"})

    images: Tensor
    maps: Tensor
    scaled: Tensor
    channels: tuple[int, ...]
    layer: str
    layout: Literal["overlay", "map"] = "map"

    def panels(self) -> list[list[Panel]]:
        rows = []
        for image, maps, scaled in zip(self.images, self.maps, self.scaled, strict=True):
            row = [Panel(image, _shortened(self.layer))]
            strongest = maps.flatten(1).amax(1).sort(descending=True, stable=True).indices
            for k in strongest[:9].tolist() if len(maps) > 9 else range(len(maps)):
                shown = colorize(scaled[k], limits=(0, 1))
                if self.layout == "overlay":
                    shown = overlay(to_display(image), scaled[k], limits=(0, 1))
                row.append(Panel(shown, f"channel {self.channels[k]}"))
            rows.append(row)
        return rows


@dataclass(frozen=True, eq=False, kw_only=True)
class Patches(Result):
    """Where in a data set a layer's channels answered most.

    Entry i is a place: ``channels`` and ``scores`` (M,), the whole picture in ``images``
    (M, C, H, W), the unit's y and x in ``places`` (M, 2) on the layer's map of the size ``grid``,
    its receptive field in ``boxes`` (M, 4) as top, left, bottom, right (exclusive), clipped at the
    border, and the picture's id in the data set.
    """

    layer: str
    channels: tuple[int, ...]
    scores: Tensor
    images: Tensor
    places: Tensor
    grid: tuple[int, int]
    boxes: Tensor
    ids: tuple[str, ...]

    def crops(self) -> list[Tensor]:
        """The patches themselves, (C, h, w) each."""
        boxes = self.boxes.tolist()
        return [i[:, t:b, s:e] for i, (t, s, b, e) in zip(self.images, boxes, strict=True)]

    def lines(self) -> list[str]:
        best: dict[int, str] = {}
        for channel, score, name in zip(self.channels, self.scores.tolist(), self.ids, strict=True):
            best.setdefault(channel, f"{self.layer}[{channel}]: {score:.3g} in picture {name}")
        return list(best.values())

    def panels(self) -> list[list[Panel]]:
        sides = (self.boxes[:, 2:] - self.boxes[:, :2]).amax(0).tolist()
        factor = max(1, 64 // max(sides))
        whole = sides == list(self.images.shape[2:])  # the patches are the pictures
        rows: list[list[Panel]] = []
        for channel in dict.fromkeys(self.channels):
            patches: list[Panel] = []
            places: list[Panel] = []
            for i in (i for i, c in enumerate(self.channels) if c == channel):
                image, (top, left, bottom, right) = to_display(self.images[i]), self.boxes[i].tolist()
                # A clipped patch keeps its place: what lies beyond the picture's border stays white.
                patch = image.new_ones(3, *sides)
                y, x = (0 if top else sides[0] - bottom), (0 if left else sides[1] - right)
                patch[:, y : y + bottom - top, x : x + right - left] = image[:, top:bottom, left:right]
                unit = "" if patches else f"{_shortened(self.layer)}[{channel}] "
                title, place = f"{unit}{self.scores[i]:.2f}", self._located(i, image)
                patches.append(Panel(place if whole else enlarge(patch, factor), title))
                places.append(Panel(place, f"in {_shortened(self.ids[i])}"))
            rows += [patches] if whole else [patches, places]
        return rows

    def _located(self, i: int, image: Tensor) -> Tensor:
        """The picture of entry i: dimmed what the unit does not see, or, if it sees all, its cell framed."""
        (top, left, bottom, right), size = self.boxes[i].tolist(), image.shape[1:]
        if (top, left, bottom, right) != (0, 0, *size):
            dimmed = 0.35 * image + 0.3
            dimmed[:, top:bottom, left:right] = image[:, top:bottom, left:right]
            return dimmed
        (y, x), (rows, columns) = self.places[i].tolist(), self.grid
        top, bottom = y * size[0] // rows, -(-(y + 1) * size[0] // rows)
        left, right = x * size[1] // columns, -(-(x + 1) * size[1] // columns)
        frame = torch.zeros(size, dtype=torch.bool, device=image.device)
        frame[top:bottom, left:right] = True
        frame[top + 2 : bottom - 2, left + 2 : right - 2] = False
        return torch.where(frame, image.new_tensor([1.0, 0.0, 0.6])[:, None, None], image)


def _shortened(name: str, most: int = 18) -> str:
    """The end of a long name, short enough for a title."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


@dataclass(frozen=True, eq=False, kw_only=True)
class Neighbors(Result):
    """The nearest pictures of a data set in feature space, and beside them in raw pixels.

    ``images`` (N, C, H, W) the queries; ``indices``, ``distances`` (N, k), nearest first;
    ``neighbors`` (N, k, C, H, W). The same with ``pixel_`` for the comparison in pixel space.
    """

    images: Tensor
    neighbors: Tensor
    indices: Tensor
    distances: Tensor
    ids: tuple[tuple[str, ...], ...]
    pixel_neighbors: Tensor
    pixel_indices: Tensor
    pixel_distances: Tensor

    def lines(self) -> list[str]:
        rows = zip(self.ids, self.distances.tolist(), strict=True)
        found = [", ".join(f"{name} ({far:.3g})" for name, far in zip(*row, strict=True)) for row in rows]
        return [f"{n:03d}  nearest: {names}" for n, names in enumerate(found)]

    def panels(self) -> list[list[Panel]]:
        rows = []
        features, pixels = (self.neighbors, self.distances), (self.pixel_neighbors, self.pixel_distances)
        for n, image in enumerate(self.images):
            for what, (found, far) in (("features", features), ("pixels", pixels)):
                near = [Panel(f, f"{d:.2f}") for f, d in zip(found[n], far[n].tolist(), strict=True)]
                rows.append([Panel(image, f"by {what}"), *near])
        return rows


@dataclass(frozen=True, eq=False, kw_only=True)
class AdversarialExamples(Result):
    """Images, what an attack made of them, and what the model says of both.

    ``images``, ``adversarial`` (N, C, H, W) in [0, 1]; ``labels``, ``before``, ``after`` (N,)
    class indices wanted and predicted; ``confidence_before``, ``confidence_after`` (N,) of those
    predictions; ``success`` (N,) whether the attack reached its aim.
    """

    per_image: ClassVar[bool] = True

    images: Tensor
    adversarial: Tensor
    labels: Tensor
    before: Tensor
    after: Tensor
    confidence_before: Tensor
    confidence_after: Tensor
    success: Tensor
    names_before: tuple[str, ...]
    names_after: tuple[str, ...]

    @classmethod
    def judged(
        cls,
        model: Model,
        images: Tensor,
        adversarial: Tensor,
        labels: Tensor,
        logits_before: Tensor,
        logits_after: Tensor,
        *,
        targeted: bool,
    ) -> Self:
        """An attack's result, judged by the model's logits (N, K) for ``images`` and ``adversarial``."""
        confidence_before, before = logits_before.softmax(1).max(1)
        confidence_after, after = logits_after.softmax(1).max(1)
        return cls(
            images=images,
            adversarial=adversarial,
            labels=labels,
            before=before,
            after=after,
            confidence_before=confidence_before,
            confidence_after=confidence_after,
            success=after.eq(labels) if targeted else after.ne(labels),
            names_before=tuple(model.class_name(i) for i in before.tolist()),
            names_after=tuple(model.class_name(i) for i in after.tolist()),
        )

    def distance(self, norm: Literal["l1", "l2", "linf"]) -> Tensor:
        """(N,) how far each image was moved, in pixel units."""
        delta = (self.adversarial - self.images).flatten(1).abs()
        match norm:
            case "l1":
                return delta.sum(1)
            case "l2":  # not torch.norm, which in float32 is wrong by 2e-3 on three million pixels
                return delta.square().sum(1).sqrt()
            case "linf":
                return delta.amax(1)

    def lines(self) -> list[str]:
        moved = self.distance("linf").tolist()
        return [
            f"{n:03d}  {self.names_before[n]} {self.confidence_before[n]:.0%} -> "
            f"{self.names_after[n]} {self.confidence_after[n]:.0%}: "
            f"{'success' if self.success[n] else 'no success'}, largest change of a pixel {moved[n]:.4f}"
            for n in range(len(self.images))
        ]

    def panels(self) -> list[list[Panel]]:
        groups = []
        for n, largest in enumerate(self.distance("linf").tolist()):
            factor = 0.5 / largest if largest else 1.0
            difference = 0.5 + (self.adversarial[n] - self.images[n]) * factor
            before = f"{self.names_before[n]} {self.confidence_before[n]:.0%}"
            after = f"{self.names_after[n]} {self.confidence_after[n]:.0%}"
            change = Panel(difference, f"difference ×{factor:.0f}" if largest else "unchanged")
            groups.append([Panel(self.images[n], before), Panel(self.adversarial[n], after), change])
        return _wrapped(groups, 3)

    def pictures(self) -> Sequence[Tensor]:
        return tuple(self.adversarial)


@dataclass(frozen=True, eq=False, kw_only=True)
class Synthesis(Result):
    """Images made by optimisation: ``images`` (N, C, H, W) in [0, 1], ``scores`` (steps, N), one name each.

    ``sources`` (N, C, H, W) are the pictures they were made after, where there are such.
    """

    images: Tensor
    scores: Tensor
    targets: tuple[str, ...]
    sources: Tensor | None = None

    def lines(self) -> list[str]:
        ends = zip(self.targets, self.scores[0].tolist(), self.scores[-1].tolist(), strict=True)
        return [f"{n:03d}  {t}: score {first:.4g} -> {last:.4g}" for n, (t, first, last) in enumerate(ends)]

    def panels(self) -> list[list[Panel]]:
        made = [[Panel(i, t)] for i, t in zip(self.images, self.targets, strict=True)]
        if self.sources is None:
            return _wrapped(made, 5)
        return _wrapped([[Panel(i, "sample"), *m] for i, m in zip(self.sources, made, strict=True)], 3)

    def pictures(self) -> Sequence[Tensor]:
        return tuple(self.images)


@dataclass(frozen=True, eq=False, kw_only=True)
class Stylization(Result):
    """Images in other manners: ``images`` and ``stylized`` (N, 3, H, W) in [0, 1], ``style`` its name."""

    per_image: ClassVar[bool] = True
    shared: ClassVar[frozenset[str]] = frozenset({"style"})

    images: Tensor
    stylized: Tensor
    style: str

    def panels(self) -> list[list[Panel]]:
        pairs = zip(self.images, self.stylized, strict=True)
        return _wrapped([[Panel(i), Panel(s, self.style)] for i, s in pairs], 3)

    def pictures(self) -> Sequence[Tensor]:
        return tuple(self.stylized)


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainedNetwork(Result):
    """A network that a method trained, ready for its partner that applies it.

    ``network`` is built by ``method`` (an id) from ``config``; ``losses`` (steps,) its training;
    ``labels`` name what it learned; ``previews`` (P, 3, H, W) show what it does.
    """

    network: nn.Module
    method: str
    config: dict[str, Any]
    losses: Tensor
    labels: tuple[str, ...]
    previews: Tensor

    @classmethod
    def restore(cls, fields: dict[str, Any], **rest: Any) -> TrainedNetwork:
        """Rebuild the network through the method that made it, and fill in its weights."""
        method = methods[fields["method"]]
        if method.network is None:
            raise InputError(f"{method.spec.name} trains no network")
        network = method.network(**fields["config"])
        network.load_state_dict(fields.pop("network"), assign=True)  # in the precision it was saved in
        return cls(network=network.eval(), **fields, **rest)

    def panels(self) -> list[list[Panel]]:
        return _wrapped([[Panel(p, n)] for p, n in zip(self.previews, self.labels, strict=False)], 6)
