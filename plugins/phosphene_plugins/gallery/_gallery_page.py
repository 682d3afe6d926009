"""The gallery: an example result of every method on one self-contained HTML page."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic.fields import FieldInfo

from phosphene import (
    DivergenceError,
    InputError,
    Method,
    MethodSpec,
    Model,
    ModelError,
    PhospheneError,
    Result,
    UnknownName,
    load_model,
    methods,
    run,
)
from phosphene.builtin.part_scenes import PART_CLASSES
from phosphene.builtin.scenes import CLASSES, SIZE, draw_scenes
from phosphene.data import Localization, localization, open_dataset
from phosphene.files import check_output_file
from phosphene.parameter_text import option_name, read_option, value_text
from phosphene.registry import family_title
from phosphene.results import Attribution, Panel
from phosphene.roles import ROLES, image_files, read_images

from ..pages._single_file_page import is_page, panel_rows, write_page

if TYPE_CHECKING:
    from phosphene import BrokenPlugin


#: Number of test scenes on which attributions are scored, and the largest number of passes per method for it.
SCORED_SCENES = 200
MAX_PASSES = 3_000

#: Largest number of the user's images on a card.
IMAGES_PER_CARD = 4

#: Parameters of demos that number channels of one network, and those that suit the bundled images' 64 pixels.
CHANNEL_PARAMETERS = frozenset({"channels"})
PIXEL_PARAMETERS = frozenset({"window", "stride", "smooth", "jitter", "octaves"})

#: Parameters that say where a data set's classes come from, and their values for its own labels.
LABEL_PARAMETERS = frozenset({"target", "labels"})
_OWN_LABELS = ("label", "truth")

#: How the URIs of bundled trained networks begin, other than those of textures and data sets.
_BUNDLED_NETWORK = "builtin:shapes-"

#: How the URIs of bundled scenes begin whose classes a network of the same scenes has.
_BUNDLED_SCENES = ("builtin:scenes", "builtin:part-scenes")


@dataclass(frozen=True)
class Source:
    """The network and the images of a gallery: ``model`` loaded from ``uri`` and ``settings``.

    ``uri`` is None for the network of each method's demo. ``images`` are files, folders or patterns, and
    ``files`` the first images among them, at most one card's; both are empty for the bundled ones.
    ``predicted`` is the class number of each of these, where the model is a classifier.
    """

    model: Model
    uri: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    predicted: tuple[int, ...] = ()

    @classmethod
    def read(
        cls, uri: str | None, settings: Mapping[str, Any], images: Sequence[str], count: int = IMAGES_PER_CARD
    ) -> Source:
        """Load the network and find the images. Raises InputError for an image that cannot be read."""
        model = load_model(uri or ROLES["model"].default, **settings)
        bundled = tuple(image for image in images if image.startswith("builtin:"))
        files = image_files([i for i in images if i not in bundled]) if len(bundled) < len(images) else ()
        source = cls(model, uri, settings, tuple(images), (*bundled, *files[:count])[:count])
        if not source.files:
            return source
        pixels = read_images(list(source.files), model)
        if model.task not in (None, "classification"):
            return source
        try:
            with torch.no_grad():
                predicted = model(pixels.to(model.device, model.dtype)).argmax(1)
        except ModelError:  # a network without logits: methods of classes refuse it on their cards
            return source
        return replace(source, predicted=tuple(predicted.tolist()))

    @property
    def knows_scenes(self) -> bool:
        """Whether the network has the classes of bundled scenes, of either kind."""
        return self.model.classes in (CLASSES, PART_CLASSES)

    def is_demo_model(self, spec: MethodSpec) -> bool:
        """Whether the network is that of the method's demo, whose layers the demo names."""
        return self.uri is None or self.uri == _demo_model(spec)

    def has_demo_classes(self, spec: MethodSpec) -> bool:
        """Whether the network has the classes of that of the method's demo."""
        of_parts = _demo_model(spec) == "builtin:parts-resnet"
        return self.uri is None or self.model.classes == (PART_CLASSES if of_parts else CLASSES)

    def own_scenes(self, value: Any) -> Any:
        """Bundled scenes of a demo, replaced by those that a network of the user's was trained on."""
        if isinstance(value, dict):
            return value | {"files": self.own_scenes(value["files"])}
        if self.uri is None or not isinstance(value, str) or not value.startswith(_BUNDLED_SCENES):
            return value
        kind = "part-scenes" if self.model.classes == PART_CLASSES else "scenes"
        return re.sub(r"^builtin:(part-)?scenes", f"builtin:{kind}", value)

    def dataset(self) -> str | list[str]:
        """The images as a data set: one folder, whose subfolders are classes, or all of several."""
        return self.images[0] if len(self.images) == 1 else list(self.images)

    @property
    def has_labels(self) -> bool:
        """Whether the images are one folder with a subfolder for each class, or a bundled data set."""
        if len(self.images) != 1 or not (
            self.images[0].startswith("builtin:") or Path(self.images[0]).is_dir()
        ):
            return not self.images
        dataset = open_dataset(self.images[0], self.model.transform, self.model.input_size[1:])
        return dataset.labels([0]) is not None

    def card_files(self, demo: Any) -> list[str]:
        """The files of a card, no more than its demo has images."""
        demo = demo["files"] if isinstance(demo, dict) else demo
        number = re.fullmatch(r"builtin:[\w-]+/(\d+)", demo) if isinstance(demo, str) else None
        return list(self.files[: int(number[1])] if number else self.files)

    def card_images(self, demo: Any, own_size: bool) -> Any:
        """The images of a card; with ``own_size`` they are read in the size of the model's input."""
        files = self.card_files(demo)
        chosen = files[0] if len(files) == 1 else files
        return {"files": chosen, "size": self.model.input_size[1:]} if own_size else chosen


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
    source: Source
    interrupted: bool = False

    @property
    def contents(self) -> str:
        """Which methods the page has: every one, or how many."""
        if len(self.exhibits) + len(self.broken) == len(methods.plugins):
            return "Every registered method"
        count = f"{len(self.exhibits)} of {len(methods.plugins)} registered methods"
        return f"{count} (the run was interrupted)" if self.interrupted else count

    @property
    def bundled(self) -> bool:
        """Whether network and images are the bundled ones, with which every method runs."""
        return self.source.uri is None and not self.source.images

    @property
    def warning(self) -> str:
        """What a reader must know before the cards: that the network was not trained for the images."""
        if self.source.images or self.source.knows_scenes:
            return ""
        return (
            "The images are the bundled drawn scenes, whose objects are no classes of this network: "
            "pass images of its kind with --image"
        )


def make_gallery(
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    settings: Mapping[str, Any] | None = None,
    images: Sequence[str] = (),
    count: int = IMAGES_PER_CARD,
    only: Sequence[str] = (),
    report: Callable[[Exhibit], None] = lambda _: None,
) -> Gallery:
    """Run every registered method and write ``out/index.html``, one file that contains all images.

    ``model``: a URI, with further arguments of ``load_model`` in ``settings``; ``images``: files, folders or
    glob patterns, of which a card has the first ``count`` and a data set all. Default: the bundled network
    and scenes. ``report`` is called after each method. For a method that fails, the page has its error
    message. The page is written also after KeyboardInterrupt, with the methods that ran before.
    """
    if settings and model is None:
        raise InputError("the settings are options of a model: set model as well")
    page = Path(out) / "index.html"
    check_output_file(page, is_page)
    selected = {methods.resolve(name) for name in only}
    broken = [b for b in methods.broken() if not selected or b.plugin in selected]
    source = Source.read(model, settings or {}, images, count)
    page.parent.mkdir(parents=True, exist_ok=True)
    gallery = Gallery(page, [], {}, broken, source)
    try:
        for call, plugin in (item for plugins in methods.by_family().values() for item in plugins.items()):
            if plugin not in {b.plugin for b in broken} and (not selected or plugin in selected):
                exhibit = make_exhibit(call, source)
                if methods[call].defense is not None and not exhibit.failure:
                    exhibit = replace(exhibit, curve=_robustness_curve(call, source))
                gallery.exhibits.append(exhibit)
                report(exhibit)
    except KeyboardInterrupt as error:
        _write(page, replace(gallery, interrupted=True))
        cards = f"{len(gallery.exhibits)} method{'s' if len(gallery.exhibits) != 1 else ''}"
        error.add_note(f"interrupted; the page has {cards}: {page.resolve().as_uri()}")
        raise
    if source.model.classes == CLASSES:
        attributions = {
            e.call: methods[e.call]
            for e in gallery.exhibits
            if isinstance(e.result, Attribution) and (model is not None or not _has_own_model(e.spec))
        }
        gallery.scores.update(_localization_scores(attributions, source.model))
    _write(page, gallery)
    return gallery


def make_exhibit(call: str, source: Source) -> Exhibit:
    """Run one method with the parameters of its spec's ``demo``; an error becomes part of the example.

    Parameters that name layers, channels or classes of the demo's network are not used with another one,
    nor is a radius of an attack above the method's default.
    """
    method, spec = methods[call], methods[call].spec
    takes_model = spec.input("model")
    inputs, missing = _card_inputs(spec, source)
    params = _seed(method) | _demo_parameters(method, source)
    result, rows, failure = None, [], missing
    clock = time.perf_counter()
    try:
        # A demo may name a model of its own, which is used unless the caller chose one.
        demo_model = takes_model is not None and source.uri is None and takes_model.name in inputs
        model = {takes_model.name: source.model} if takes_model and not demo_model else {}
        if not missing:
            result, params = _run_on_network(call, inputs | model, params, source)
            if result.provenance and result.provenance.interrupted:
                raise KeyboardInterrupt  # Ctrl-C stops the gallery, not only this method
            rows = panel_rows(result)
    except Exception as error:  # a plugin may raise anything; the page shows the message
        failure = str(error) if isinstance(error, PhospheneError) else f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - clock
    arguments = (call, spec, inputs, source.settings if takes_model else {}, params)
    return Exhibit(call, spec, _command(*arguments), _python(*arguments), seconds, result, rows, failure)


def _card_inputs(spec: MethodSpec, source: Source) -> tuple[dict[str, Any], str]:
    """The inputs of a card, and what its method needs that the gallery lacks, as a sentence or "".

    The bundled inputs of the demo belong to networks trained on the bundled scenes. Another network gets the
    user's images, also as data set, the classes predicted for them as targets of a method without images, and
    the demo's textures; a required input for which there is only a bundled trained network, or another
    data set of scenes, is lacking.
    """
    inputs, _ = spec.demonstration()
    takes_images = spec.input("images")
    lacking = ""
    for declared in spec.inputs:
        name, role = declared.name, ROLES[declared.role]
        bundled = source.own_scenes(inputs.get(name, role.default if declared.required else None))
        if name in inputs or bundled != role.default and bundled is not None:
            inputs[name] = bundled
        if declared.role == "model":
            if source.uri is not None:
                inputs[name] = source.uri
        elif declared.role == "images":
            if source.files:
                own_size = declared.own_size or spec.input("model") is None
                inputs[name] = source.card_images(inputs.get(name), own_size)
        elif source.has_demo_classes(spec):
            continue
        elif declared.role == "target":
            inputs.pop(name, None)
            if source.predicted and not takes_images:
                inputs[name] = list(dict.fromkeys(source.predicted))
        elif declared.role == "labels" and name in inputs:  # classes to attack towards, one for each image
            inputs.pop(name)
            if source.predicted and takes_images:
                count = len(source.card_files(spec.demo.get(takes_images.name)))
                classes = source.model.class_count or 1
                inputs[name] = [(k + 1) % classes for k in source.predicted[:count]]
        elif bundled is None:
            continue
        elif declared.role == "dataset" and str(bundled).startswith(_BUNDLED_SCENES):
            if source.images:
                inputs[name] = source.dataset()
        elif _BUNDLED_NETWORK in str(bundled) or "builtin:biased-scenes" in str(bundled):
            if not declared.required:  # such as weights to start from
                inputs.pop(name)
                continue
            inputs[name] = role.metavar
            what = re.split(r",| \(", role.help)[0]
            lacking = lacking or (
                f"{bundled} is of the bundled scenes, not of this network's images: "
                f"pass {option_name(name, spec.short_name)}, a {what}"
            )
    return inputs, lacking


def _demo_parameters(method: Method[..., Any], source: Source) -> dict[str, Any]:
    """The demo's parameters that make sense for the network and the images."""
    _, demo = method.spec.demonstration()
    if method.spec.input("model") is None or source.is_demo_model(method.spec):
        return demo
    left_out = {*method.layers, *CHANNEL_PARAMETERS}
    if source.model.input_size != (3, SIZE, SIZE):
        left_out |= PIXEL_PARAMETERS
    if not source.has_demo_classes(method.spec):
        left_out |= {name for name, value in demo.items() if "builtin:" in str(value)}
    if _is_above_default(method, demo, "eps"):  # a radius that the bundled networks, or their images, need
        left_out.add("eps")
    params = {name: value for name, value in demo.items() if name not in left_out}
    if not source.knows_scenes and not source.has_labels:
        fields = method.spec.params.model_fields
        labels = [name for name in LABEL_PARAMETERS & fields.keys() if fields[name].default in _OWN_LABELS]
        params |= dict.fromkeys(labels, "predicted")
    return params


def _is_above_default(method: Method[..., Any], demo: Mapping[str, Any], name: str) -> bool:
    """Whether a demo's parameter is a number above the method's default."""
    value = demo.get(name)
    return isinstance(value, float) and value > method.spec.params.model_fields[name].default


def _run_on_network(
    call: str, inputs: Mapping[str, Any], params: dict[str, Any], source: Source
) -> tuple[Result, dict[str, Any]]:
    """The result, and the parameters that the network accepts.

    Another network than the demo's may refuse names among the parameters, such as a rule: then they are left
    at their defaults; or may lack the default layer: then it is the last one with feature maps; or may have
    no gradient at the start: then the seed is another. Raises the error of the first attempt.
    """
    method = methods[call]
    try:
        return run(call, **inputs, **params), params
    except (DivergenceError, InputError, ModelError, UnknownName) as error:
        if method.spec.input("model") is None or source.is_demo_model(method.spec):
            raise
        numbers = {n: v for n, v in params.items() if n == method.seed or isinstance(v, (bool, int, float))}
        attempts = [numbers] if numbers != params else []
        if isinstance(error, ModelError) and "layer" in method.layers:
            with suppress(ModelError):
                attempts.append(params | {"layer": source.model.last_map})
        if isinstance(error, DivergenceError):
            attempts = [params | {method.seed: 1}] if method.seed else []
        for other in attempts:
            with suppress(DivergenceError, InputError, ModelError, UnknownName):
                return run(call, **inputs, **other), other
        raise


def _demo_model(spec: MethodSpec) -> str:
    """The URI of the network of a method's demo."""
    takes_model = spec.input("model")
    default = str(ROLES["model"].default)
    return default if takes_model is None else spec.demonstration()[0].get(takes_model.name, default)


def _has_own_model(spec: MethodSpec) -> bool:
    """Whether a method's demo names a model, as that of a method for transformers does."""
    takes_model = spec.input("model")
    return takes_model is not None and takes_model.name in spec.demonstration()[0]


def _robustness_curve(call: str, source: Source) -> Exhibit | None:
    """Robust accuracy of the model with a defense, with the parameters of the defense's ``demo``."""
    if "robust_accuracy" not in methods or source.model.source is None:
        return None
    parameters = _demo_parameters(methods[call], source)
    defended = methods[call].defend(source.model, **parameters)
    assert defended.source is not None
    return make_exhibit("robust_accuracy", replace(source, model=defended, uri=defended.source["uri"]))


def _seed(method: Method[..., Any]) -> dict[str, Any]:
    """A fixed seed for a method with a seed, so that the page is reproducible."""
    return {method.seed: 0} if method.seed is not None else {}


Values = Mapping[str, Any]


def _command(call: str, spec: MethodSpec, inputs: Values, settings: Values, params: Values) -> str:
    """The command line that repeats this example."""
    words = ["phosphene", "run", call]
    for name, value in inputs.items():
        files = value["files"] if isinstance(value, dict) else value
        for item in [files] if isinstance(files, str) else files:
            words += [option_name(name, spec.short_name), str(item)]
        if isinstance(value, dict):
            words += ["--image-size", ",".join(map(str, value["size"]))]
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


def _write(page: Path, gallery: Gallery) -> None:
    """Write the page, the examples grouped by family."""
    by_family = groupby(gallery.exhibits, lambda exhibit: exhibit.spec.family)
    sections = {family_title(family): list(exhibits) for family, exhibits in by_family}
    values = {"gallery": gallery, "sections": sections, "source": gallery.source}
    write_page(page, "phosphene_plugins.gallery", "gallery.html.j2", **values)
