"""``Result``: the base class of results, with fields, panels and figures."""

from __future__ import annotations

import base64
import dataclasses
import functools
import html
import io
import itertools
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import InputError, PhospheneError, UnknownName, type_name, value_repr
from ..files.documents import list_files
from ..files.output_folders import atomic_folder
from ..files.system import error_text
from ..files.tensors import save_tensors
from ..images.charts import hide_axes, plain_label, printable, show_text_literally
from ..images.color import to_display
from ..images.io import write_gif, write_mp4, write_png
from ..images.map_style import is_styled, map_style
from ..optimize.image_optimizer import pad_rows
from ..torch_state import cpu_by_default

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
from .provenance import Provenance
from .saving import FORMAT, encode
from .tables import Table, arrays, data_frame, image_table, write_csv, write_parquet

#: Largest resolution of a figure, dots per inch.
_MAX_DPI = 2400

#: Suffixes of figures, and the metadata that would differ between two files of the same figure.
FIGURE_SUFFIXES: dict[str, dict[str, Any]] = {
    ".png": {},
    ".pdf": {"CreationDate": None},
    ".svg": {"Date": None},
}

#: Which table of a result: its own, or what a detector finds in its images.
Rows = Literal["results", "detections"]

#: Loads a method by its name: the training method that rebuilds a saved network.
FindMethod = Callable[[str], Any]


@dataclass(frozen=True)
class Panel:
    """One image of a figure with a title; any (C, H, W) is converted to (3, H, W) in [0, 1]."""

    image: Tensor
    title: str = ""
    #: Whether the image is an output of the method: ``save`` then writes it to a file, at its own size.
    is_output: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", to_display(self.image))
        object.__setattr__(self, "title", printable(self.title))

    @classmethod
    def difference(cls, image: Tensor, changed: Tensor) -> Panel:
        """The change from one image to another, amplified to the full range; gray where nothing changed."""
        delta = changed - image
        largest = float(delta.abs().max())
        factor = 0.5 / max(largest, 1e-9)  # 0.5 / a denormal number overflows
        return cls(0.5 + delta * factor, f"difference ×{factor:.0f}" if largest else "unchanged")


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG, PDF or SVG, by the file's suffix; text in PDF and SVG stays text.

    Raises InputError for another suffix and for a file that cannot be written.
    """
    from matplotlib import rc_context

    file = Path(path)
    if (suffix := file.suffix.lower()) not in FIGURE_SUFFIXES:
        raise UnknownName("suffix of a figure", suffix or str(file), FIGURE_SUFFIXES)
    try:
        # Fonts as TrueType, which journals ask for, and the same names inside SVG in every run.
        with rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "phosphene"}):
            figure.savefig(file, format=suffix[1:], metadata=FIGURE_SUFFIXES[suffix])
    except OSError as error:
        raise InputError(f"the figure cannot be written to {file}: {error_text(error)}") from error
    return file


def _refuse_option(name: str) -> None:
    """Raise an error for an option that ``figure`` does not have, with the nearest one."""
    options = ("cmap", "alpha", "columns", "titles", "dpi")
    if re.fullmatch("colou?r(_?map)?s?", name):
        listed = ", ".join(options)
        raise InputError(f"no option of a figure {name!r}; figure() has {listed} - did you mean 'cmap'?")
    raise UnknownName("option of a figure", name, options, "figure()")


@contextmanager
def _explain_saved_fields(result: Result) -> Iterator[None]:
    """The errors of drawing a result that was loaded: its fields have the right types, but do not match."""
    try:
        yield
    except PhospheneError:
        raise
    except Exception as error:  # a figure may raise anything for fields that its method never computes
        if result.uri is None:
            raise
        reason = textwrap.shorten(f"{type(error).__name__} {error}", 200, placeholder=" ...")
        raise InputError(f"the fields saved in {result.uri} cannot be drawn together: {reason}") from error


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """Base class of results. A subclass is a frozen dataclass with fields and ``panels()``.

    A field is a tensor, a network, or JSON: strings, numbers, tuples and mappings. A field that is not saved
    has ``metadata={"saved": False}``. Figures, saving, loading and ``repr`` follow from the fields.
    """

    types: ClassVar[dict[str, type[Result]]] = {}
    #: The fields whose row i belongs to image i, which ``concatenate`` joins along the first axis.
    per_image: ClassVar[tuple[str, ...]] = ()
    #: The fields (steps, N, ...) whose column i belongs to image i, joined along the second axis.
    per_step: ClassVar[tuple[str, ...]] = ()
    #: Shapes of fields, such as {"images": "N C H W", "targets": "N"}: the same letter is the same size.
    shapes: ClassVar[Mapping[str, str]] = {}
    #: How many groups of panels a row of the figure has.
    groups_per_row: ClassVar[int] = 1

    provenance: Provenance | None = field(default=None, repr=False, metadata={"saved": False})
    #: The method's inputs, tensors and names, from which ``replay`` runs it again.
    inputs: Mapping[str, Any] = field(default_factory=dict, repr=False, metadata={"saved": False})
    #: The folder it was loaded from.
    uri: str | None = field(default=None, repr=False, metadata={"saved": False})

    def __init_subclass__(cls) -> None:
        Result.types[cls.__name__] = cls
        if "figure" in vars(cls):  # the name that ``draw`` had
            cls.draw = vars(cls)["figure"]  # type: ignore[method-assign]
            del cls.figure
        for name in ("panels", "draw", "lines"):
            if name in vars(cls):
                setattr(cls, name, cpu_by_default()(vars(cls)[name]))
        if "panels" in vars(cls):
            setattr(cls, "panels", _computed_once(vars(cls)["panels"]))  # noqa: B010
        if "__repr__" not in vars(cls):  # the dataclass decorator would write one that prints whole tensors
            setattr(cls, "__repr__", cls.__repr__)  # noqa: B010

    def __repr__(self) -> str:
        """The type and the method, and for each field its shape, dtype and range."""
        method = f" of {self.provenance.method}" if self.provenance else ""
        fields = [(name, describe(value)) for name, value in self.fields()]
        width = max((len(name) for name, _ in fields), default=0)
        return "\n".join([f"{type(self).__name__}{method}", *(f"  {n:{width}}  {t}" for n, t in fields)])

    def panels(self) -> list[list[Panel]]:
        """Groups of images with titles: a group for each input image, unit or row of the figure."""
        raise NotImplementedError(f"{type(self).__name__} must define panels()")

    def rows(self) -> list[list[Panel]]:
        """The rows of the figure, ``groups_per_row`` groups each."""
        groups = self.panels()
        starts = range(0, len(groups), self.groups_per_row)
        return [list(itertools.chain(*groups[start : start + self.groups_per_row])) for start in starts]

    def lines(self) -> list[str]:
        """The result as text: the panels' titles, a line for each group."""
        titles = [", ".join(panel.title for panel in group if panel.title) for group in self.panels()]
        return [f"{number:03d}  {line}" for number, line in enumerate(titles)]

    @property
    def frame_seconds(self) -> float:
        """Seconds for which ``save`` shows each of the ``animation_frames``."""
        return 0.1

    def animation_frames(self) -> list[Tensor]:
        """Frames (3, H, W) of the optimization in order; ``save`` writes them as a GIF. None by default."""
        return []

    def fields(self) -> Iterator[tuple[str, Any]]:
        """Names and values of the saved fields, without provenance and inputs."""
        for f in dataclasses.fields(self):
            if f.metadata.get("saved", True):
                yield f.name, getattr(self, f.name)

    @classmethod
    def restore(cls, fields: dict[str, Any], find_method: FindMethod, **rest: Any) -> Result:
        """The result from its saved fields; a network is a mapping of its tensors by name."""
        return cls(**fields, **rest)

    @classmethod
    def concatenate(cls, results: Sequence[Self]) -> Self:
        """One result from those of consecutive batches."""
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

    def select(self, rows: Sequence[int]) -> Self:
        """The result of some images alone: their rows, in this order.

        Its ``inputs`` are empty, since they are those of all images. Raises InputError for a result without
        a row per image.
        """
        if not self.per_image:
            raise InputError(f"{type_name(self)} has no row for each image")
        selected: dict[str, Any] = {"inputs": {}}
        for name in self.per_image:
            value = getattr(self, name)
            if value is not None:
                tensor = isinstance(value, Tensor)
                selected[name] = value[list(rows)] if tensor else tuple(value[row] for row in rows)
        for name in self.per_step:
            if (value := getattr(self, name)) is not None:
                selected[name] = value[:, list(rows)]
        return dataclasses.replace(self, **selected)

    @cpu_by_default()
    def figure(
        self,
        *,
        cmap: str | None = None,
        alpha: float | None = None,
        columns: int | None = None,
        titles: Sequence[str] | Literal[False] | None = None,
        dpi: float | None = None,
        **unknown: Any,
    ) -> Figure:
        """The result as a matplotlib figure: all panels, or the chart of a result type that has one.

        Args:
            cmap: matplotlib's name of the color map of maps, such as "viridis".
            alpha: opacity of maps that are laid over images, 0 to 1; default: 1/2, less below a quarter of
                the largest value, and 0 at 0.
            columns: number of panels in a row, rounded down to complete groups.
            titles: a title for each panel, in order; False for none.
            dpi: dots per inch.

        Raises:
            UnknownName: an option that does not exist, with the nearest one.
            InputError: an option without an effect on this result, or a result without images to draw.

        Example::
            from phosphene import run

            result = run("grad_cam", images="builtin:scenes/2")
            result.figure(cmap="viridis", alpha=0.7, dpi=300).savefig("maps.png")
        """
        if unknown:
            _refuse_option(next(iter(unknown)))
        if dpi is not None and not (isinstance(dpi, (int, float)) and 1 <= dpi <= _MAX_DPI):
            raise InputError(f"dpi is a number from 1 to {_MAX_DPI}, not {value_repr(dpi)}")
        with map_style(cmap, alpha) as style, _explain_saved_fields(self):
            if columns is None and titles is None:
                drawn = self.draw()
            elif type(self).draw is Result.draw:
                drawn = self._draw_rows(self._titled_rows(columns, titles))
            else:
                option = "titles" if columns is None else "columns"
                raise InputError(f"{option}= has no effect: this {type(self).__name__} is drawn as a chart")
        for option, value, used in (("cmap", cmap, style.used_cmap), ("alpha", alpha, style.used_alpha)):
            if value is not None and not used:
                what = "maps" if option == "cmap" else "maps that are laid over images"
                raise InputError(f"{option}= has no effect: this {type(self).__name__} shows no {what}")
        if dpi is not None:
            drawn.set_dpi(dpi)
            setattr(drawn, "_original_dpi", dpi)  # noqa: B010  (at which savefig saves)
        show_text_literally(drawn)
        return drawn

    def draw(self) -> Figure:
        """Draw the figure. A result type that has a chart overrides it."""
        return self._draw_rows(self.rows())

    def _titled_rows(
        self, columns: int | None, titles: Sequence[str] | Literal[False] | None
    ) -> list[list[Panel]]:
        """The rows of the figure with another number of columns, and other titles."""
        rows = self.rows()
        if columns is not None:
            if isinstance(columns, bool) or not isinstance(columns, int) or columns < 1:
                raise InputError(f"columns is a number of panels, 1 or more, not {value_repr(columns)}")
            groups = self.panels()
            widest = max(map(len, groups), default=1)
            per_row = max(1, columns // widest)
            starts = range(0, len(groups), per_row)
            rows = [list(itertools.chain(*groups[start : start + per_row])) for start in starts]
        if titles is None:
            return rows
        count = sum(map(len, rows))
        texts = [""] * count if titles is False else titles
        if isinstance(texts, str) or len(texts) != count:
            passed = 1 if isinstance(texts, str) else len(texts)
            raise InputError(
                f"titles need a text for each of the {count} panels, not {passed}; False for none"
            )
        remaining = iter(texts)
        return [[dataclasses.replace(panel, title=next(remaining)) for panel in row] for row in rows]

    def _draw_rows(self, rows: list[list[Panel]]) -> Figure:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import TightLayoutEngine

        if not any(rows):
            raise InputError(f"this {type(self).__name__} has no images to draw")
        columns = max(map(len, rows))
        _, height, width = rows[0][0].image.shape
        # Inches: large images at their own size, the figure at most 14 wide.
        side = min(max(2.2, max(p.image.shape[2] for row in rows for p in row) / 110), 14 / columns)
        figure = Figure(figsize=(side * columns, (side * height / width + 0.3) * len(rows)), dpi=110)
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for row, row_axes in zip(rows, axes, strict=True):
            for panel, axis in itertools.zip_longest(row, row_axes):
                hide_axes(axis)
                if panel is not None:
                    pixels = panel.image.permute(1, 2, 0).float().cpu().numpy()
                    axis.imshow(pixels, interpolation="nearest" if max(pixels.shape) < 128 else "antialiased")
                    axis.set_title(plain_label(panel.title, max(40, int(24 * side))), fontsize=8)
        show_text_literally(figure)  # before the layout, which measures the titles
        # Not figure.tight_layout, after which savefig draws the figure twice.
        TightLayoutEngine(pad=0.4).execute(figure)
        return figure

    def png(self) -> bytes:
        """The figure as the bytes of a PNG file."""
        stream = io.BytesIO()
        with _explain_saved_fields(self):
            self.figure().savefig(stream, format="png")
        return stream.getvalue()

    def save_figure(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write the figure as PNG, PDF or SVG, by the file's suffix; ``options`` are those of ``figure``.

        Text in PDF and SVG stays text, and the same result is the same file. Raises InputError for another
        suffix and for a file that cannot be written.
        """
        figure = self.figure(**options)
        with _explain_saved_fields(self):
            return write_figure(figure, path)

    def alt_text(self) -> str:
        """A line that describes the figure to people who do not see it: type, method and titles."""
        method = f" of {self.provenance.method}" if self.provenance else ""
        text = f"{type(self).__name__}{method}: {'; '.join(' '.join(line.split()) for line in self.lines())}"
        return textwrap.shorten(text, 300, placeholder=" ...")

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        """The figure and its description, for notebooks."""
        picture = base64.b64encode(self.png()).decode()
        data = {"text/plain": repr(self), "text/html": self._image_tag(picture), "image/png": picture}
        return data, {"image/png": {"alt": self.alt_text()}}

    def _repr_html_(self) -> str:
        return self._image_tag(base64.b64encode(self.png()).decode())

    def _image_tag(self, picture: str) -> str:
        return f'<img alt="{html.escape(self.alt_text())}" src="data:image/png;base64,{picture}">'

    def to_numpy(self) -> dict[str, Any]:
        """The tensors as NumPy arrays by field name; several tensors of a field as a tuple or mapping."""
        return arrays(dict(self.fields()))

    def table(self) -> Table:
        """The result as a table, values by column: a row for each image, unless the type says otherwise.

        The column ``file`` names the images that were read from files. Images, maps and other fields of more
        than two axes are left out. Raises InputError for a result
        without a table.
        """
        rows = [name for name, axes in self.shapes.items() if axes.split()[0] == "N"]
        table = image_table(dict(self.fields()), list(dict.fromkeys([*self.per_image, *rows])))
        if not table:
            raise InputError(f"{type_name(self)} has no table; to_numpy() returns its tensors")
        files = self.provenance.files if self.provenance else ()
        if len(files) == len(table["image"]):
            table = {"image": table["image"], "file": list(files), **table}
        return table

    def detections(self) -> Table:
        """The objects that the model finds in the images, a row for each; of an attack also those after it.

        Columns: ``image``, ``file`` where the images were files, ``version`` ("original" or "adversarial"),
        ``class``, ``score`` and the box ``x0``, ``y0``, ``x1``, ``y1`` in pixels. Raises InputError for a
        result of a model that is no detector.
        """
        table = self.provenance.detections if self.provenance else {}
        if not table:
            raise InputError(
                f"this {type(self).__name__} has no table of detections: it is not the result of a detector "
                "(task 'detection') on images"
            )
        files = self.provenance.files if self.provenance else ()
        if not files:
            return dict(table)
        return {"image": table["image"], "file": [files[number] for number in table["image"]], **table}

    def _table_of(self, rows: Rows) -> Table:
        if rows not in ("results", "detections"):
            raise UnknownName("table", str(rows), ("results", "detections"))
        return self.detections() if rows == "detections" else self.table()

    def to_pandas(self, rows: Rows = "results") -> pandas.DataFrame:
        """``table()`` or ``detections()`` as a data frame. Raises MissingExtra without pandas."""
        return data_frame(self._table_of(rows))

    def to_csv(self, path: str | os.PathLike[str], rows: Rows = "results") -> Path:
        """Write ``table()``, or ``detections()``, as CSV. Raises InputError where it cannot be written."""
        return write_csv(self._table_of(rows), path)

    def to_parquet(self, path: str | os.PathLike[str], rows: Rows = "results") -> Path:
        """Write ``table()`` or ``detections()`` as Parquet. Raises MissingExtra without pyarrow."""
        return write_parquet(self._table_of(rows), path)

    @cpu_by_default()
    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``picture.png`` (the figure), ``pictures/``, and safetensors + JSON for ``load_result``.

        A result with frames also has a ``film.gif`` and, with the extra ``video``, a ``film.mp4``.

        The folder appears complete or not at all. One that holds an earlier result is replaced: the files of
        that result are deleted, all other files in the folder stay.

        Raises:
            InputError: a folder that contains other files and no result, one that cannot be written to (see
                ``check_output_folder``), or a full disk.
        """
        try:
            with reuse_panels(), atomic_folder(folder) as new:
                self._write(new)
        except (OSError, SafetensorError) as error:
            raise InputError(f"the result cannot be saved in {folder}: {error_text(error)}") from error
        return Path(folder)

    def _write(self, folder: Path) -> None:
        """Write all files of the result into an empty folder."""
        tensors: dict[str, Tensor] = {}
        document = {
            "format": FORMAT,
            "type": type(self).__name__,
            "fields": {n: encode(v, n, tensors) for n, v in self.fields()},
            "inputs": {n: encode(v, f"inputs.{n}", tensors) for n, v in self.inputs.items()},
            "provenance": self.provenance.model_dump(mode="json") if self.provenance else None,
        }
        save_tensors(tensors, folder / "arrays.safetensors")
        (folder / "picture.png").write_bytes(self.png())
        outputs = [panel.image for group in self.panels() for panel in group if panel.is_output]
        for number, image in enumerate(outputs):
            (folder / "pictures").mkdir(exist_ok=True)
            write_png(image, folder / "pictures" / f"{number:03d}.png")
        if frames := self.animation_frames():
            write_gif(frames, folder / "film.gif", seconds=self.frame_seconds)
            if find_spec("imageio_ffmpeg"):
                write_mp4(frames, folder / "film.mp4", seconds=self.frame_seconds)
        # The files that a later result in this folder replaces; others in it stay.
        document["files"] = sorted(["result.json", *list_files(folder)])
        (folder / "result.json").write_text(json.dumps(document, indent=2))


#: The panels that were computed inside ``reuse_panels``, by result and function, each with its result.
_panels: ContextVar[dict[Any, tuple[Result, list[list[Panel]]]] | None] = ContextVar(
    "phosphene_panels", default=None
)


@contextmanager
def reuse_panels() -> Iterator[None]:
    """Inside, the panels of a result are computed once; the outermost block releases them at its end."""
    token = _panels.set({} if (outer := _panels.get()) is None else outer)
    try:
        yield
    finally:
        _panels.reset(token)


def _computed_once(panels: Callable[[Any], list[list[Panel]]]) -> Callable[[Any], list[list[Panel]]]:
    @functools.wraps(panels)
    def compute(self: Any) -> list[list[Panel]]:
        computed = _panels.get()
        if computed is None or is_styled():
            return panels(self)
        key = (id(self), panels)
        if key not in computed:
            computed[key] = (self, panels(self))  # with the result, whose id is then of no other
        return computed[key][1]

    return compute


def describe(value: Any) -> str:
    """A field's value in a line: a tensor's dtype, shape and range, a network's type, else the short repr."""
    match value:
        case Tensor():
            kind = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
            if not value.numel() or value.is_complex():
                return kind
            if value.dtype == torch.bool:
                return f"{kind}, {int(value.sum())} true"
            low, high = (v.item() for v in value.detach().aminmax())
            return f"{kind} in [{low:.4g}, {high:.4g}]"
        case nn.Module():
            return f"{type(value).__name__} with {sum(p.numel() for p in value.parameters()):,} parameters"
        case Mapping() if any(isinstance(item, (Tensor, nn.Module)) for item in value.values()):
            return ", ".join(f"{name}: {describe(item)}" for name, item in value.items())
        case tuple() | list() if any(isinstance(item, (Tensor, nn.Module)) for item in value):
            return f"{len(value)} items: {', '.join(map(describe, value))}"
    return textwrap.shorten(repr(value), 100, placeholder=" ...")


def shorten_title(name: str, most: int = 18) -> str:
    """The last ``most`` characters of a long name, for a title."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def side_by_side_frames(frames: Tensor | None) -> list[Tensor]:
    """Frames (F, N, C, H, W), uint8, as images in [0, 1] with all N images in a row."""
    return [] if frames is None else [torch.cat(list(frame), -1) / 255 for frame in frames]
