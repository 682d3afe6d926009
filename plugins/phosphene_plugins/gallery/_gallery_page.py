"""The gallery: every method on one small world, on one page that can be sent by mail."""

from __future__ import annotations

import json
import os
import shlex
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.fields import FieldInfo

from phosphene import (
    InputError,
    Method,
    MethodSpec,
    Model,
    PhospheneError,
    Result,
    load_model,
    methods,
    run,
)
from phosphene.builtin.scenes import CLASSES, draw_scenes
from phosphene.data import Localization, localization, open_dataset
from phosphene.parameter_text import option_name, read_option, value_text
from phosphene.registry import family_title
from phosphene.results import Attribution, Panel

from ..pages._single_file_page import rows_of, write_page

if TYPE_CHECKING:
    from phosphene import BrokenPlugin


#: How many unseen scenes maps are scored on, and how many passes through the model that may cost.
_SCENES = 200


_PASSES = 3_000


@dataclass(frozen=True)
class Exhibit:
    """One method's place in the gallery: what it showed, or why it could not, and how to do it again.

    ``curve``: of a defence that stands before a model, what attacks leave of the two.
    """

    call: str
    spec: MethodSpec
    command: str
    python: str
    seconds: float
    result: Result | None
    rows: list[list[Panel]]
    failure: str = ""
    curve: Exhibit | None = None


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
    broken = [b for b in methods.broken() if not wanted or b.plugin in wanted]
    seen = load_model(model or "builtin:shapes-vgg", **settings or {})
    for shown in images:  # what is not a picture is refused before the work
        if shown.startswith("builtin:") or Path(shown).is_dir():
            open_dataset(shown, seen.transform, seen.input_size[1:])
        else:
            seen.transform(shown)
    page.parent.mkdir(parents=True, exist_ok=True)
    exhibits = []
    for call, plugin in (item for plugins in methods.by_family().values() for item in plugins.items()):
        if plugin not in {b.plugin for b in broken} and (not wanted or plugin in wanted):
            exhibit = make_exhibit(call, seen, model, settings or {}, images)
            if methods[call].defense is not None:
                exhibit = replace(exhibit, curve=_curve(call, seen, settings or {}, images))
            exhibits.append(exhibit)
            tell(exhibit)
    attributing = {e.call: methods[e.call] for e in exhibits if isinstance(e.result, Attribution)}
    scores = _scores(attributing, seen) if attributing and seen.classes == CLASSES else {}
    gallery = Gallery(page, exhibits, scores, broken, model is None and not images)
    _write(page, gallery, seen)
    return gallery


def make_exhibit(
    call: str,
    seen: Model,
    uri: str | None = None,
    settings: Mapping[str, Any] = {},
    images: Sequence[str] = (),
) -> Exhibit:
    """Run one method as its spec's ``demo`` has it, whatever comes of it.

    ``seen`` is the model as it was loaded, ``uri`` and ``settings`` how; without a ``uri`` it is the
    one that a run takes by itself.
    """
    spec = methods[call].spec
    takes_model, takes_images = spec.input("model"), spec.input("images")
    inputs, shown = spec.demonstration()
    if takes_model and uri is not None:
        inputs[takes_model.name] = uri
    if takes_images and images:
        inputs[takes_images.name] = images[0] if len(images) == 1 else list(images)
    params = _seed(methods[call]) | shown
    result, rows, failure = None, [], ""
    clock = time.perf_counter()
    try:
        # The model as it was loaded, unless the demo is about another and nobody asked for one.
        own = takes_model is not None and uri is None and takes_model.name in inputs
        loaded = {takes_model.name: seen} if takes_model and not own else {}
        result = run(call, **inputs | params | loaded)
        if result.provenance and result.provenance.interrupted:
            raise KeyboardInterrupt  # it is meant for the whole page
        rows = rows_of(result)
    except Exception as error:  # a stranger's method may raise anything; the page tells it
        failure = str(error) if isinstance(error, PhospheneError) else f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - clock
    told = (call, spec, inputs, settings if takes_model else {}, params)
    return Exhibit(call, spec, _command(*told), _python(*told), seconds, result, rows, failure)


def _curve(call: str, seen: Model, settings: Mapping[str, Any], images: Sequence[str]) -> Exhibit | None:
    """What attacks leave of the model behind a defence, as its spec's ``demo`` has it."""
    if "robust_accuracy" not in methods or seen.source is None:
        return None
    defended = methods[call].defend(seen, **methods[call].spec.demonstration()[1])
    assert defended.source is not None
    return make_exhibit("robust_accuracy", defended, defended.source["uri"], settings, images)


def _seed(method: Method[..., Any]) -> dict[str, Any]:
    """A seed, where the method takes one, so that the page's pictures come out again."""
    return {method.seed: 0} if method.seed is not None else {}


Values = Mapping[str, Any]


def _command(call: str, spec: MethodSpec, inputs: Values, settings: Values, params: Values) -> str:
    """The words in a terminal that make this exhibit."""
    words = ["phosphene", "run", call]
    for name, value in inputs.items():
        for item in [value] if isinstance(value, str) else value:
            words += [option_name(name, spec.short_name), str(item)]
    for name, value in settings.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    for name, value in params.items():
        words += write_option(option_name(name, spec.short_name), value, spec.params.model_fields[name])
    return shlex.join(words)


def write_option(option: str, value: Any, field: FieldInfo) -> list[str]:
    """The words that the command line reads back as ``value``."""
    if field.annotation is bool:
        return [option if value else option.replace("--", "--no-", 1)]
    text = value_text(value) if read_option(value_text(value), field) == value else json.dumps(value)
    # Written with "=", so that a value that begins with a dash is not taken for an option.
    return [f"{option}={text}"] if text.startswith("-") else [option, text]


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
            if passes := method.passes({"model": model, "images": scenes.images[:1]}, params):
                forward, backward = passes
                count = max(1, min(_SCENES, _PASSES // max(1, forward + 2 * backward)))
            values = {"model": model, "images": scenes.images[:count], "target": scenes.labels[:count]}
            result = method(**{i.name: values[i.role] for i in spec.inputs}, **params)
            found[call] = localization(result.heat(), scenes.masks[:count])
        except Exception as error:  # likewise a stranger's
            warnings.warn(f"{call} could not be scored: {type(error).__name__}: {error}", stacklevel=2)
    return found


def _write(page: Path, gallery: Gallery, model: Model) -> None:
    """The page, its exhibits by family."""
    shelves = {
        family_title(f): list(found) for f, found in groupby(gallery.exhibits, lambda e: e.spec.family)
    }
    values = {"gallery": gallery, "shelves": shelves, "model": model}
    write_page(page, "phosphene_plugins.gallery", "gallery.html.j2", **values)
