"""``Result``: the base class of results, with fields, panels and figures."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from ..images.color import to_display
from ..images.io import write_gif, write_mp4, write_png
from ..optimize.image_optimizer import pad_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from .provenance import Provenance
from .saving import FORMAT, atomic_folder, encode


@dataclass(frozen=True)
class Panel:
    """One picture of a figure, any (C, H, W) that becomes (3, H, W) in [0, 1], with a title."""

    image: Tensor
    title: str = ""
    #: Whether it is worth a file of its own at its own size: what the method made.
    is_output: bool = False

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
    groups_per_row: ClassVar[int] = 1

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
        """The panels as they are laid out: ``groups_per_row`` groups a row."""
        groups = self.panels()
        starts = range(0, len(groups), self.groups_per_row)
        return [list(itertools.chain(*groups[start : start + self.groups_per_row])) for start in starts]

    def lines(self) -> list[str]:
        """The result in words: what stands over the panels, a line for each group."""
        titles = [", ".join(panel.title for panel in group if panel.title) for group in self.panels()]
        return [f"{number:03d}  {line}" for number, line in enumerate(titles)]

    def animation_frames(self) -> list[Tensor]:
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
                merged[name] = torch.cat(pad_rows(values), 1)
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
        with atomic_folder(Path(folder).resolve()) as place:
            tensors: dict[str, Tensor] = {}
            document = {
                "format": FORMAT,
                "type": type(self).__name__,
                "fields": {n: encode(v, n, tensors) for n, v in self.fields()},
                "inputs": {n: encode(v, f"inputs.{n}", tensors) for n, v in self.inputs.items()},
                "provenance": self.provenance.model_dump(mode="json") if self.provenance else None,
            }
            save_file(tensors, place / "arrays.safetensors")
            (place / "result.json").write_text(json.dumps(document, indent=2))
            (place / "picture.png").write_bytes(self.png())
            made = [panel.image for group in self.panels() for panel in group if panel.is_output]
            for number, picture in enumerate(made):
                (place / "pictures").mkdir(exist_ok=True)
                write_png(picture, place / "pictures" / f"{number:03d}.png")
            if film := self.animation_frames():
                write_gif(film, place / "film.gif")
                if find_spec("imageio_ffmpeg"):
                    write_mp4(film, place / "film.mp4")
        return Path(folder)


def shorten_title(name: str, most: int = 18) -> str:
    """The end of a long name, short enough for a title."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def side_by_side_frames(frames: Tensor | None) -> list[Tensor]:
    """Frames (F, N, C, H, W) as pictures with all N images in a row."""
    return [] if frames is None else [torch.cat(list(frame), -1) / 255 for frame in frames]
