"""What every result can do: show itself, save itself, and say how it came about."""

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
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..builtin.networks import WEIGHTS
from ..errors import InputError, PhospheneError, UnknownName
from ..images import to_display, write_gif, write_mp4, write_png
from ..pixels import as_long
from ..registry import methods

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    #: Where it stood when Ctrl-C ended it early ("after 12 of 200 steps"); None for what is whole.
    interrupted: str | None = None


@dataclass(frozen=True)
class Panel:
    """One picture of a figure, any (C, H, W) that becomes (3, H, W) in [0, 1], with a title."""

    image: Tensor
    title: str = ""
    #: Whether it is worth a file of its own at its own size: what the method made.
    made: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", to_display(self.image))

    @classmethod
    def difference(cls, image: Tensor, changed: Tensor) -> Panel:
        """What was changed, amplified until a pixel is black or white: grey where nothing was."""
        delta = changed - image
        largest = float(delta.abs().max())
        factor = 0.5 / max(largest, 1e-9)  # a change of one denormal number would have none
        return cls(0.5 + delta * factor, f"difference ×{factor:.0f}" if largest else "unchanged")


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """The base of all results; a subclass adds fields and ``panels``, and the rest comes by itself.

    A field is a tensor, a network, or what JSON holds of words, numbers, tuples and mappings; one that is
    no part of what is saved has ``metadata={"saved": False}``.
    """

    types: ClassVar[dict[str, type[Result]]] = {}
    #: The fields whose row i belongs to image i, so that batches can be put together; () where none does.
    per_image: ClassVar[tuple[str, ...]] = ()
    #: The fields (steps, N, ...) whose column i belongs to image i.
    per_step: ClassVar[tuple[str, ...]] = ()
    #: How many groups of panels stand side by side.
    abreast: ClassVar[int] = 1

    provenance: Provenance | None = field(default=None, repr=False, metadata={"saved": False})
    #: The tensors and names that the method was given, so that it can be run again.
    inputs: Mapping[str, Any] = field(default_factory=dict, repr=False, metadata={"saved": False})
    #: The folder it was loaded from.
    uri: str | None = field(default=None, repr=False, metadata={"saved": False})

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

    def film(self) -> list[Tensor]:
        """Pictures (3, H, W) of how it came about, in order, if there are any: ``save`` makes a GIF."""
        return []

    def fields(self) -> Iterator[tuple[str, Any]]:
        """The result's own fields: everything but where it comes from."""
        for f in dataclasses.fields(self):
            if f.metadata.get("saved", True):
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
            if values[0] is not None:
                tensors = isinstance(values[0], Tensor)
                merged[name] = torch.cat(values) if tensors else tuple(itertools.chain(*values))
        for name in cls.per_step:
            values = [getattr(result, name) for result in results]
            if values[0] is not None:
                merged[name] = torch.cat(as_long(values), 1)
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

        What was drawn with ``frames`` also has a ``film.gif`` and, with the extra ``video``, a ``film.mp4``.

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
            if film := self.film():
                write_gif(film, place / "film.gif")
                if find_spec("imageio_ffmpeg"):
                    write_mp4(film, place / "film.mp4")
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
    """A saved result, with its provenance and inputs, or a bundled one ("builtin:shapes-styles").

    Nothing in the folder is executed. Raises InputError where there is no whole result, UnknownName where
    nobody knows its type or its bundled name.
    """
    if str(folder).startswith("builtin:"):
        name = str(folder).removeprefix("builtin:")
        known = [path.parent.name for path in WEIGHTS.glob("*/result.json")]
        if name not in known:
            raise UnknownName("bundled result", name, sorted(known))
        return dataclasses.replace(load_result(WEIGHTS / name), uri=str(folder))  # not this machine's place
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


def shortened(name: str, most: int = 18) -> str:
    """The end of a long name, short enough for a title."""
    return name if len(name) <= most else f"…{name[1 - most :]}"
