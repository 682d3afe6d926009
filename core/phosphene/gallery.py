"""``phosphene demo``: every method on one small world, on one page that can be sent by mail."""

from __future__ import annotations

import base64
import io
import os
import shlex
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from .builtin.scenes import CLASSES, draw_scenes
from .declaration import Method
from .errors import InputError, PhospheneError
from .families import rank, title
from .images import data_uri
from .inputs import make_images
from .localization import Localization, localization
from .models import Model, load_model
from .options import option_name, parameter_schemas, write_option
from .registry import BrokenPlugin, methods
from .results import Attribution, Result
from .run_command import input_option
from .running import run
from .spec import MethodSpec

#: How many unseen scenes maps are scored on, and how many passes through the model that may cost.
_SCENES = 200
_PASSES = 6_000


@dataclass(frozen=True)
class Picture:
    """A picture on the page: a data URI, its caption, and its width and height in pixels."""

    address: str
    caption: str
    width: int
    height: int


@dataclass(frozen=True)
class Exhibit:
    """One method's place in the gallery: what it showed, or why it could not, and how to do it again."""

    call: str
    spec: MethodSpec
    command: str
    python: str
    seconds: float
    result: Result | None
    rows: list[list[Picture]]
    failure: str = ""


@dataclass(frozen=True)
class Gallery:
    """What was shown, where the page lies, how well maps point at objects, and which plugins are broken."""

    page: Path
    exhibits: list[Exhibit]
    scores: dict[str, Localization]
    broken: list[BrokenPlugin]
    bundled: bool


def make_gallery(
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    settings: Mapping[str, Any] | None = None,
    images: Sequence[str] = (),
    only: Sequence[str] = (),
    tell: Callable[[Exhibit], None] = lambda _: None,
) -> Gallery:
    """Run every registered method and write ``out/index.html``, one file with all pictures in it.

    ``model``: a URI, with what ``load_model`` is to be told of it in ``settings``; ``images``: files
    or folders. Without them the bundled network looks at bundled scenes. ``tell`` hears of each
    method as it is done. A method that fails is shown with what it said.
    """
    if settings and model is None:
        raise InputError("the settings are about a model: say which")
    page = Path(out) / "index.html"
    if page.parent.exists() and not page.parent.is_dir():
        raise InputError(f"{out} is a file; the page needs a folder")
    wanted = {methods.resolve(name) for name in only}
    working = {methods.resolve(name): method for name, method in methods.load_all().items()}
    seen = load_model(model or "builtin:shapes-vgg", **settings or {})
    shown = images[0] if len(images) == 1 else list(images)
    if images:
        make_images(shown, seen, {})  # refuses what is not a picture before the work
    page.parent.mkdir(parents=True, exist_ok=True)
    exhibits = []
    for plugins in methods.by_family().values():
        for call, plugin in plugins.items():
            if plugin in working and (not wanted or plugin in wanted):
                exhibits.append(_exhibit(call, working[plugin], seen, model, settings or {}, shown))
                tell(exhibits[-1])
    attributing = {e.call: methods[e.call] for e in exhibits if isinstance(e.result, Attribution)}
    scores = _scores(attributing, seen) if attributing and seen.classes == CLASSES else {}
    broken = [b for b in methods.broken() if not wanted or b.plugin in wanted]
    gallery = Gallery(page, exhibits, scores, broken, model is None and not images)
    _write(page, gallery, seen)
    return gallery


def _exhibit(
    call: str,
    method: Method[..., Any],
    seen: Model,
    uri: str | None,
    settings: Mapping[str, Any],
    images: str | list[str],
) -> Exhibit:
    """Run one method, whatever comes of it."""
    spec = method.spec
    takes_model, takes_images = spec.input("model"), spec.input("images")
    inputs: dict[str, Any] = {}
    if takes_model and uri is not None:
        inputs[takes_model.name] = uri
    if takes_images and images:
        inputs[takes_images.name] = images
    params = _seed(method) | spec.demo
    result, rows, failure = None, [], ""
    clock = time.perf_counter()
    try:
        result = run(call, **inputs | params | ({takes_model.name: seen} if takes_model else {}))
        rows = _rows(result)
    except Exception as error:  # a stranger's method may raise anything; the page tells it
        failure = str(error) if isinstance(error, PhospheneError) else f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - clock
    told = (call, spec, inputs, settings if takes_model else {}, params)
    return Exhibit(call, spec, _command(*told), _python(*told), seconds, result, rows, failure)


def _rows(result: Result) -> list[list[Picture]]:
    """A result's panels; where it draws a figure of its own (a chart, say), that."""
    if type(result).figure is not Result.figure:
        width, height = Image.open(io.BytesIO(png := result.png())).size
        return [[Picture("data:image/png;base64," + base64.b64encode(png).decode(), "", width, height)]]
    rows = [row for row in result.panels() if row]
    if not rows:
        raise InputError(f"this {type(result).__name__} holds no pictures to show")
    return [
        [Picture(data_uri(p.image), p.title, p.image.shape[2], p.image.shape[1]) for p in row] for row in rows
    ]


def _seed(method: Method[..., Any]) -> dict[str, Any]:
    """A seed, where the method takes one, so that the page's pictures come out again."""
    return {method.seed: 0} if method.seed is not None else {}


Values = Mapping[str, Any]


def _command(call: str, spec: MethodSpec, inputs: Values, settings: Values, params: Values) -> str:
    """The words in a terminal that make this exhibit."""
    words = ["phosphene", "run", call]
    for declared in spec.inputs:
        value = inputs.get(declared.name, [])
        for item in [value] if isinstance(value, str) else value:
            words += [input_option(declared), item]
    taken = spec.params.model_fields
    for name, value in settings.items():
        words += [f"--model-{option_name(name)}" if name in taken else f"--{option_name(name)}"]
        if value is not True:
            words += [value if isinstance(value, str) else ",".join(map(str, value))]
    schemas = parameter_schemas(spec.params_schema)
    for name, value in params.items():
        words += write_option(name, value, schemas[name])
    return shlex.join(words)


def _python(call: str, spec: MethodSpec, inputs: Values, settings: Values, params: Values) -> str:
    """The lines of Python that make this exhibit."""
    given = {name: repr(value) for name, value in {**inputs, **params}.items()}
    lines = ["from phosphene import run", ""]
    declared = spec.input("model")
    if settings and declared:
        told = "".join(f", {name}={value!r}" for name, value in settings.items())
        loading = f"model = load_model({given[declared.name]}{told})"
        lines = ["from phosphene import load_model, run", "", loading]
        given[declared.name] = "model"
    arguments = ", ".join([f'"{call}"', *(f"{name}={value}" for name, value in given.items())])
    lines += [f"result = run({arguments})", f'result.save("phosphene-out/{spec.short_name}")']
    return "\n".join(lines)


def _scores(attributing: Mapping[str, Method[..., Any]], model: Model) -> dict[str, Localization]:
    """The pointing game for every method that gives maps, about each scene's true class."""
    found: dict[str, Localization] = {}
    scenes = draw_scenes(_SCENES, split="test")
    height, width = model.input_size[1:]
    for call, method in attributing.items():
        spec = method.spec
        if not {declared.role for declared in spec.inputs} <= {"model", "images", "target"}:
            continue
        try:
            params = method.validate(_seed(method))
            count = _SCENES
            if spec.cost:
                forward, backward = spec.cost.of(params, images=1, height=height, width=width)
                count = max(1, min(_SCENES, _PASSES // max(1, forward + 2 * backward)))
            values = {"model": model, "images": scenes.images[:count], "target": scenes.labels[:count]}
            result = method(**{i.name: values[i.role] for i in spec.inputs}, **params)
            found[call] = localization(result.heat(), scenes.masks[:count])
        except Exception as error:  # likewise a stranger's
            warnings.warn(f"{call} could not be scored: {type(error).__name__}: {error}", stacklevel=2)
    return found


def _write(page: Path, gallery: Gallery, model: Model) -> None:
    """The page, under its name only when it is whole."""
    shelves: dict[str, list[Exhibit]] = {}
    for exhibit in sorted(gallery.exhibits, key=lambda e: rank(e.spec.family)):
        shelves.setdefault(title(exhibit.spec.family), []).append(exhibit)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("phosphene"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("gallery.html.j2").render(
        gallery=gallery, shelves=shelves, model=model, version=version("phosphene")
    )
    partial = page.with_name(f".{page.name}.part")
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, page)
