"""The gallery: an example result of every method on one self-contained HTML page."""

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
from phosphene.files import check_output_file
from phosphene.parameter_text import option_name, read_option, value_text
from phosphene.registry import family_title
from phosphene.results import Attribution, Panel

from ..pages._single_file_page import is_page, panel_rows, write_page

if TYPE_CHECKING:
    from phosphene import BrokenPlugin


#: Number of test scenes on which attributions are scored, and the largest number of passes per method for it.
SCORED_SCENES = 200
MAX_PASSES = 3_000


@dataclass(frozen=True)
class Exhibit:
    """The example of one method: its result or error message, and the command and Python code that repeat it.

    ``curve``: for a defense that wraps a model, the robust accuracy of the wrapped model.
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
    """A written gallery: its page, examples, localization scores by method, and broken plugins."""

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
    report: Callable[[Exhibit], None] = lambda _: None,
) -> Gallery:
    """Run every registered method and write ``out/index.html``, one file that contains all images.

    ``model``: a URI, with further arguments of ``load_model`` in ``settings``; ``images``: files or folders.
    Default: the bundled network and scenes. ``report`` is called after each method. For a method
    that fails, the page has its error message.
    """
    if settings and model is None:
        raise InputError("the settings are options of a model: set model as well")
    page = Path(out) / "index.html"
    check_output_file(page, is_page)
    selected = {methods.resolve(name) for name in only}
    broken = [b for b in methods.broken() if not selected or b.plugin in selected]
    loaded = load_model(model or "builtin:shapes-vgg", **settings or {})
    for image in images:  # an unreadable image is refused before any method runs
        if image.startswith("builtin:") or Path(image).is_dir():
            open_dataset(image, loaded.transform, loaded.input_size[1:])
        else:
            loaded.transform(image)
    page.parent.mkdir(parents=True, exist_ok=True)
    exhibits = []
    for call, plugin in (item for plugins in methods.by_family().values() for item in plugins.items()):
        if plugin not in {b.plugin for b in broken} and (not selected or plugin in selected):
            exhibit = make_exhibit(call, loaded, model, settings or {}, images)
            if methods[call].defense is not None:
                exhibit = replace(exhibit, curve=_robustness_curve(call, loaded, settings or {}, images))
            exhibits.append(exhibit)
            report(exhibit)
    attributions = {
        e.call: methods[e.call]
        for e in exhibits
        if isinstance(e.result, Attribution) and (model is not None or not _has_own_model(e.spec))
    }
    scored = attributions if loaded.classes == CLASSES else {}
    scores = _localization_scores(scored, loaded)
    gallery = Gallery(page, exhibits, scores, broken, model is None and not images)
    _write(page, gallery, loaded)
    return gallery


def make_exhibit(
    call: str,
    loaded: Model,
    uri: str | None = None,
    settings: Mapping[str, Any] = {},
    images: Sequence[str] = (),
) -> Exhibit:
    """Run one method with the parameters of its spec's ``demo``; an error becomes part of the example.

    ``loaded`` is the model, ``uri`` and ``settings`` what it was loaded from; without a ``uri`` it is the
    default model of a run.
    """
    spec = methods[call].spec
    takes_model, takes_images = spec.input("model"), spec.input("images")
    inputs, demo_params = spec.demonstration()
    if takes_model and uri is not None:
        inputs[takes_model.name] = uri
    if takes_images and images:
        inputs[takes_images.name] = images[0] if len(images) == 1 else list(images)
    params = _seed(methods[call]) | demo_params
    result, rows, failure = None, [], ""
    clock = time.perf_counter()
    try:
        # A demo may name a model of its own, which is used unless the caller chose one.
        demo_model = takes_model is not None and uri is None and takes_model.name in inputs
        model = {takes_model.name: loaded} if takes_model and not demo_model else {}
        result = run(call, **inputs | params | model)
        if result.provenance and result.provenance.interrupted:
            raise KeyboardInterrupt  # Ctrl-C stops the gallery, not only this method
        rows = panel_rows(result)
    except Exception as error:  # a plugin may raise anything; the page shows the message
        failure = str(error) if isinstance(error, PhospheneError) else f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - clock
    arguments = (call, spec, inputs, settings if takes_model else {}, params)
    return Exhibit(call, spec, _command(*arguments), _python(*arguments), seconds, result, rows, failure)


def _has_own_model(spec: MethodSpec) -> bool:
    """Whether a method's demo names a model, as that of a method for transformers does."""
    takes_model = spec.input("model")
    return takes_model is not None and takes_model.name in spec.demo


def _robustness_curve(
    call: str, loaded: Model, settings: Mapping[str, Any], images: Sequence[str]
) -> Exhibit | None:
    """Robust accuracy of the model with a defense, with the parameters of the defense's ``demo``."""
    if "robust_accuracy" not in methods or loaded.source is None:
        return None
    defended = methods[call].defend(loaded, **methods[call].spec.demonstration()[1])
    assert defended.source is not None
    return make_exhibit("robust_accuracy", defended, defended.source["uri"], settings, images)


def _seed(method: Method[..., Any]) -> dict[str, Any]:
    """A fixed seed for a method with a seed, so that the page is reproducible."""
    return {method.seed: 0} if method.seed is not None else {}


Values = Mapping[str, Any]


def _command(call: str, spec: MethodSpec, inputs: Values, settings: Values, params: Values) -> str:
    """The command line that repeats this example."""
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
    """The command-line words that are parsed as ``value``."""
    if field.annotation is bool:
        return [option if value else option.replace("--", "--no-", 1)]
    text = value_text(value) if read_option(value_text(value), field) == value else json.dumps(value)
    # Joined with "=", so that a value that begins with a dash is not parsed as an option.
    return [f"{option}={text}"] if text.startswith("-") else [option, text]


def _python(call: str, spec: MethodSpec, inputs: Values, settings: Values, params: Values) -> str:
    """The Python code that repeats this example."""
    arguments = {name: repr(value) for name, value in {**inputs, **params}.items()}
    lines = ["from phosphene import run", ""]
    model = spec.input("model")
    if settings and model:
        options = "".join(f", {name}={value!r}" for name, value in settings.items())
        load = f"model = load_model({arguments[model.name]}{options})"
        lines = ["from phosphene import load_model, run", "", load]
        arguments[model.name] = "model"
    words = ", ".join([f'"{call}"', *(f"{name}={value}" for name, value in arguments.items())])
    lines += [f"result = run({words})", f'result.save("phosphene-out/{spec.short_name}")']
    return "\n".join(lines)


def _localization_scores(
    attributions: Mapping[str, Method[..., Any]], model: Model
) -> dict[str, Localization]:
    """Pointing-game scores of every attribution method for the true class of test scenes."""
    scores: dict[str, Localization] = {}
    scenes = draw_scenes(SCORED_SCENES, split="test")
    height, width = model.input_size[1:]
    for call, method in attributions.items():
        spec = method.spec
        if not {declared.role for declared in spec.inputs} <= {"model", "images", "target"}:
            continue
        try:
            params = method.validate(_seed(method))
            count = SCORED_SCENES
            if passes := method.passes({"model": model, "images": scenes.images[:1]}, params):
                forward, backward = passes
                count = max(1, min(SCORED_SCENES, MAX_PASSES // max(1, forward + 2 * backward)))
            values = {"model": model, "images": scenes.images[:count], "target": scenes.labels[:count]}
            result = method(**{i.name: values[i.role] for i in spec.inputs}, **params)
            scores[call] = localization(result.heat(), scenes.masks[:count])
        except Exception as error:  # a plugin may raise anything
            warnings.warn(f"{call} could not be scored: {type(error).__name__}: {error}", stacklevel=2)
    return scores


def _write(page: Path, gallery: Gallery, model: Model) -> None:
    """Write the page, the examples grouped by family."""
    by_family = groupby(gallery.exhibits, lambda exhibit: exhibit.spec.family)
    sections = {family_title(family): list(exhibits) for family, exhibits in by_family}
    values = {"gallery": gallery, "sections": sections, "model": model}
    write_page(page, "phosphene_plugins.gallery", "gallery.html.j2", **values)
