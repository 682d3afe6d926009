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
from .images import colorize, enlarge, min_max, overlay, symmetric, to_display, write_png
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
    #: Whether it is worth a file of its own at its own size: what the method made.
    made: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", to_display(self.image))


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """The base of all results; a subclass adds fields and ``panels``, and the rest comes by itself.

    A field is a tensor, a network, or what JSON holds of words, numbers, tuples and mappings.
    """

    types: ClassVar[dict[str, type[Result]]] = {}
    #: The fields whose row i belongs to image i, so that batches can be put together; () where none does.
    per_image: ClassVar[tuple[str, ...]] = ()
    #: How many groups of panels stand side by side.
    abreast: ClassVar[int] = 1

    provenance: Provenance | None = field(default=None, repr=False)
    #: The tensors and names that the method was given, so that it can be run again.
    inputs: Mapping[str, Any] = field(default_factory=dict, repr=False)
    #: The folder it was loaded from.
    uri: str | None = field(default=None, repr=False)

    def __init_subclass__(cls) -> None:
        Result.types[cls.__name__] = cls

    def panels(self) -> list[list[Panel]]:
        """The result as groups of pictures: one for each image, unit or whatever it is about."""
        raise NotImplementedError(f"{type(self).__name__} must say how it looks: panels()")

    def rows(self) -> list[list[Panel]]:
        """The panels as they are laid out: ``abreast`` groups a row."""
        groups = self.panels()
        starts = range(0, len(groups), self.abreast)
        return [list(itertools.chain(*groups[start : start + self.abreast])) for start in starts]

    def lines(self) -> list[str]:
        """The result in words: what stands over the panels, a line for each group."""
        titles = [", ".join(panel.title for panel in group if panel.title) for group in self.panels()]
        return [f"{number:03d}  {line}" for number, line in enumerate(titles)]

    def fields(self) -> Iterator[tuple[str, Any]]:
        """The result's own fields: everything but where it comes from."""
        for f in dataclasses.fields(self):
            if f.name not in ("provenance", "inputs", "uri"):
                yield f.name, getattr(self, f.name)

    @classmethod
    def restore(cls, fields: dict[str, Any], **rest: Any) -> Result:
        """The result again from its saved fields; a network comes as its tensors by name."""
        return cls(**fields, **rest)

    @classmethod
    def concatenate(cls, results: Sequence[Self]) -> Self:
        """Put the results of consecutive batches together."""
        merged: dict[str, Any] = {}
        for name in cls.per_image:
            values = [getattr(result, name) for result in results]
            tensors = isinstance(values[0], Tensor)
            merged[name] = torch.cat(values) if tensors else tuple(itertools.chain(*values))
        return dataclasses.replace(results[0], **merged)

    def figure(self) -> Figure:
        """All panels as a matplotlib figure. Raises InputError where there are none."""
        from matplotlib.figure import Figure

        rows = self.rows()
        if not any(rows):
            raise InputError(f"this {type(self).__name__} holds no pictures to show")
        columns = max(map(len, rows))
        _, height, width = rows[0][0].image.shape
        # Large pictures at their own size, and never more than the width of a page.
        side = min(max(2.2, max(p.image.shape[2] for row in rows for p in row) / 110), 14 / columns)
        figure = Figure(figsize=(side * columns, (side * height / width + 0.3) * len(rows)), dpi=110)
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for row, row_axes in zip(rows, axes, strict=True):
            for panel, axis in itertools.zip_longest(row, row_axes):
                axis.set_axis_off()
                if panel is not None:
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
        picture = base64.b64encode(self.png()).decode()
        return f'<img alt="{type(self).__name__}" src="data:image/png;base64,{picture}">'

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
            made = [panel.image for group in self.panels() for panel in group if panel.made]
            for number, picture in enumerate(made):
                (place / "pictures").mkdir(exist_ok=True)
                write_png(picture, place / "pictures" / f"{number:03d}.png")
        return Path(folder)


def check_place(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that a result cannot be saved in: a file, one with other things, one in use."""
    folder = Path(folder).resolve()
    for place in (folder, *folder.parents):
        if place.is_file():
            raise InputError(f"{place} is a file; results are saved in a folder")
    if folder == Path.cwd():
        raise InputError(f"{folder} is the folder you work in; choose another")
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
    """A value as JSON holds it; tensors go aside, each a copy, for safetensors refuses shared memory."""
    match value:
        case Tensor():
            tensors[key] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            return {"$tensor": key}
        case nn.Module():
            _encode(value.state_dict(), key, tensors)
            return {"$network": key}
        case tuple() | list():
            return [_encode(v, f"{key}.{i}", tensors) for i, v in enumerate(value)]
        case Mapping():
            return {str(k): _encode(v, f"{key}.{k}", tensors) for k, v in value.items()}
    return value


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    match value:
        case {"$tensor": key}:
            return tensors[key]
        case {"$network": key}:
            return {n.removeprefix(f"{key}."): t for n, t in tensors.items() if n.startswith(f"{key}.")}
        case dict():
            return {k: _decode(v, tensors) for k, v in value.items()}
        case list():
            return tuple(_decode(v, tensors) for v in value)
    return value


def load_result(folder: str | os.PathLike[str]) -> Result:
    """A saved result, with its provenance and inputs. Nothing in the folder is executed.

    Raises InputError where there is no whole result, UnknownName where nobody knows its type.
    """
    folder = Path(folder)
    if not (folder / "result.json").is_file():
        raise InputError(f"{folder} holds no saved result (no result.json)")
    try:
        document = json.loads((folder / "result.json").read_text())
        if document["format"] != FORMAT:
            raise ValueError(f"saved in format {document['format']}; this version reads {FORMAT}")
        tensors = load_file(folder / "arrays.safetensors")
        fields, inputs = (_decode(document[part], tensors) for part in ("fields", "inputs"))
        provenance = Provenance(**document["provenance"]) if document["provenance"] else None
        name = document["type"]
    except Exception as error:  # whatever a damaged file makes the parsers say
        raise InputError(f"{folder} is not a whole result: {error}") from error
    if name not in Result.types and provenance:  # its plugin may bring it
        with contextlib.suppress(PhospheneError):
            _ = methods[provenance.method]
    if name not in Result.types:
        raise UnknownName("result type", name, Result.types)
    return Result.types[name].restore(fields, provenance=provenance, inputs=inputs, uri=str(folder.resolve()))


@dataclass(frozen=True, eq=False, kw_only=True)
class Attribution(Result):
    """How much each place of an image matters for a target.

    ``images`` (N, C, H, W) in [0, 1]; ``maps`` (N, h, w), raw: neither clipped nor normalised
    unless the method's parameters say so; ``targets`` what each map is about.
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "maps", "targets")
    abreast: ClassVar[int] = 4

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

    def panels(self) -> list[list[Panel]]:
        drawn = zip(self.images, self._drawn(), self.targets, strict=True)
        return [[Panel(image), Panel(picture, target, made=True)] for image, picture, target in drawn]

    def _drawn(self) -> list[Tensor]:
        if self.layout == "overlay":
            return [overlay(to_display(i), h) for i, h in zip(self.images, self.heat(), strict=True)]
        # A few pixels far above the rest would leave the picture black, or white.
        tops = self.maps.abs().flatten(1).float().quantile(0.99, dim=1).clamp(min=1e-30)
        tops = tops[:, None, None]
        if (self.maps < 0).any():
            return list(colorize(symmetric(self.maps.clamp(-tops, tops)), "RdBu_r"))
        return list(colorize(self.maps / tops, "inferno"))


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

    def panels(self) -> list[list[Panel]]:
        from torchvision.utils import make_grid

        # Single weights are to be seen.
        side = max(12, min(66, 1320 // self.columns))
        tiles = enlarge(self.tiles, max(1, side // max(self.tiles.shape[2:])))
        size = "x".join(str(s) for s in self.weights.shape)
        picture = make_grid(tiles, self.columns, padding=3, pad_value=1)
        return [[Panel(picture, f"{self.layer}: {size}", made=True)]]


@dataclass(frozen=True, eq=False, kw_only=True)
class ActivationMaps(Result):
    """What chosen channels of a layer answer to images.

    ``images`` (N, C, H, W); ``maps`` (N, K, h, w) raw activations; ``scaled`` the same in [0, 1]
    for showing; ``channels`` their K numbers. Of more than nine, a figure shows each image's
    strongest.
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "maps", "scaled")

    images: Tensor
    maps: Tensor
    scaled: Tensor
    channels: tuple[int, ...]
    layer: str
    layout: Literal["overlay", "map"] = "map"

    def panels(self) -> list[list[Panel]]:
        groups = []
        for image, maps, scaled in zip(self.images, self.maps, self.scaled, strict=True):
            strongest = maps.flatten(1).amax(1).sort(descending=True, stable=True).indices[:9].tolist()
            group = [Panel(image, _shortened(self.layer))]
            for k in strongest if len(maps) > 9 else range(len(maps)):
                alone = self.layout == "map"
                shown = colorize(scaled[k]) if alone else overlay(to_display(image), scaled[k])
                group.append(Panel(shown, f"channel {self.channels[k]}"))
            groups.append(group)
        return groups


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

    def panels(self) -> list[list[Panel]]:
        groups: list[list[Panel]] = []
        for channel in dict.fromkeys(self.channels):
            entries = [self._drawn(i) for i, c in enumerate(self.channels) if c == channel]
            groups += [[patch for patch, _ in entries], [place for _, place in entries]]
        return groups

    def _drawn(self, i: int) -> tuple[Panel, Panel]:
        """Entry i: its patch, and the picture dimmed around it, or around its cell if the unit sees all."""
        image, (top, left, bottom, right) = to_display(self.images[i]), self.boxes[i].tolist()
        sides = (self.boxes[:, 2:] - self.boxes[:, :2]).amax(0).tolist()
        # A clipped patch keeps its place: what lies beyond the picture's border stays white.
        patch = image.new_ones(3, *sides)
        y, x = (0 if top else sides[0] - bottom), (0 if left else sides[1] - right)
        patch[:, y : y + bottom - top, x : x + right - left] = image[:, top:bottom, left:right]
        height, width = image.shape[1:]
        if (top, left, bottom, right) == (0, 0, height, width):
            (y, x), (rows, columns) = self.places[i].tolist(), self.grid
            top, bottom = y * height // rows, -(-(y + 1) * height // rows)
            left, right = x * width // columns, -(-(x + 1) * width // columns)
        place = 0.35 * image + 0.3
        place[:, top:bottom, left:right] = image[:, top:bottom, left:right]
        channel, score = self.channels[i], f"{self.scores[i]:.2f}"
        unit = f"{_shortened(self.layer)}[{channel}] " if i == self.channels.index(channel) else ""
        patch = enlarge(patch, max(1, 64 // max(sides)))
        return Panel(patch, unit + score), Panel(place, f"in {_shortened(self.ids[i])}")


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

    def panels(self) -> list[list[Panel]]:
        groups = []
        features, pixels = (self.neighbors, self.distances), (self.pixel_neighbors, self.pixel_distances)
        for n, image in enumerate(self.images):
            for what, (found, far) in (("features", features), ("pixels", pixels)):
                near = [Panel(f, f"{d:.2f}") for f, d in zip(found[n], far[n].tolist(), strict=True)]
                groups.append([Panel(image, f"by {what}"), *near])
        return groups


@dataclass(frozen=True, eq=False, kw_only=True)
class AdversarialExamples(Result):
    """Images, what an attack made of them, and what the model says of both.

    ``images``, ``adversarial`` (N, C, H, W) in [0, 1]; ``labels``, ``before``, ``after`` (N,)
    class indices wanted and predicted; ``confidence_before``, ``confidence_after`` (N,) of those
    predictions; ``success`` (N,) whether the attack reached its aim.
    """

    per_image: ClassVar[tuple[str, ...]] = (
        *("images", "adversarial", "labels", "before", "after", "confidence_before", "confidence_after"),
        *("success", "names_before", "names_after"),
    )
    abreast: ClassVar[int] = 3

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
        cls, model: Model, images: Tensor, adversarial: Tensor, labels: Tensor, *both: Tensor, targeted: bool
    ) -> Self:
        """An attack's result, judged by the model's logits (N, K) before and after it."""
        said: dict[str, Any] = {}
        for when, logits in zip(("before", "after"), both, strict=True):
            said[f"confidence_{when}"], said[when] = logits.softmax(1).max(1)
            said[f"names_{when}"] = tuple(model.class_name(i) for i in said[when].tolist())
        success = said["after"].eq(labels) if targeted else said["after"].ne(labels)
        return cls(images=images, adversarial=adversarial, labels=labels, success=success, **said)

    def distance(self, norm: Literal["l1", "l2", "linf"]) -> Tensor:
        """(N,) how far each image was moved, in pixel units."""
        # In double precision: torch's float32 norm is wrong by 2e-3 on three million pixels.
        delta = (self.adversarial - self.images).flatten(1).double()
        return delta.norm(float(norm.removeprefix("l")), dim=1).to(self.images)

    def panels(self) -> list[list[Panel]]:
        groups = []
        for n, largest in enumerate(self.distance("linf").tolist()):
            factor = 0.5 / largest if largest else 1.0
            difference = 0.5 + (self.adversarial[n] - self.images[n]) * factor
            before = f"{self.names_before[n]} {self.confidence_before[n]:.0%}"
            after = f"-> {self.names_after[n]} {self.confidence_after[n]:.0%}"
            change = Panel(difference, f"difference ×{factor:.0f}" if largest else "unchanged")
            attacked = Panel(self.adversarial[n], after, made=True)
            groups.append([Panel(self.images[n], before), attacked, change])
        return groups


@dataclass(frozen=True, eq=False, kw_only=True)
class Synthesis(Result):
    """Images made by optimisation: ``images`` (N, C, H, W) in [0, 1], ``scores`` (steps, N), one name each.

    ``sources`` (N, C, H, W) are the pictures they were made after, where there are such.
    """

    abreast: ClassVar[int] = 5

    images: Tensor
    scores: Tensor
    targets: tuple[str, ...]
    sources: Tensor | None = None

    def panels(self) -> list[list[Panel]]:
        groups = [[Panel(i, t, made=True)] for i, t in zip(self.images, self.targets, strict=True)]
        if self.sources is None:
            return groups
        return [[Panel(s, "sample"), *group] for s, group in zip(self.sources, groups, strict=True)]


@dataclass(frozen=True, eq=False, kw_only=True)
class Stylization(Result):
    """Images in other manners: ``images`` and ``stylized`` (N, 3, H, W) in [0, 1], ``style`` its name."""

    per_image: ClassVar[tuple[str, ...]] = ("images", "stylized")
    abreast: ClassVar[int] = 3

    images: Tensor
    stylized: Tensor
    style: str

    def panels(self) -> list[list[Panel]]:
        pairs = zip(self.images, self.stylized, strict=True)
        return [[Panel(image), Panel(stylized, self.style, made=True)] for image, stylized in pairs]


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainedNetwork(Result):
    """A network that a method trained, ready for its partner that applies it.

    ``network`` is built by ``method`` (an id) from ``config``; ``losses`` (steps,) its training;
    ``labels`` name what it learned; ``previews`` (P, 3, H, W) show what it does.
    """

    abreast: ClassVar[int] = 6

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
        with torch.device("meta"):  # its own beginning would cost time and random numbers
            network = method.network(**fields["config"])
        network.load_state_dict(fields.pop("network"), assign=True)  # in the precision it was saved in
        return cls(network=network.eval(), **fields, **rest)

    def panels(self) -> list[list[Panel]]:
        return [[Panel(preview, name)] for preview, name in zip(self.previews, self.labels, strict=False)]
