"""Executes a plan: checks every combination, then runs those without a saved result one after another."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from phosphene import (
    InputError,
    MethodSpec,
    Model,
    PhospheneError,
    PreparedRun,
    Result,
    UnknownName,
    load_model,
    load_result,
    methods,
    prepare,
    read_images,
    run,
)
from phosphene.files import check_output_file, check_output_folder
from phosphene.models import check_saved_options
from phosphene.parameter_text import read_option

from ..pages._single_file_page import is_page
from ._plan import ImagesEntry, MethodEntry, Plan, folder_name, setting_text


@dataclass(frozen=True)
class Combination:
    """One run of a plan: a method with parameters, the labels of its model and images, the output folder.

    ``row``: index of the method and its parameters in the plan. ``arguments``: arguments of ``run`` besides
    model and images. ``passes``: estimated images forward and backward; None for a method without a cost.
    """

    method: str
    model: str | None
    images: str | None
    row: int
    call: str
    arguments: dict[str, Any]
    folder: Path
    passes: tuple[int, int] | None = None

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.method, self.model, self.images)))


@dataclass(frozen=True)
class Outcome:
    """The state of a combination: "completed" now, "reused" from an earlier run, "failed", or "pending"."""

    combination: Combination
    state: str
    result: Result | None = None
    seconds: float = 0.0
    failure: str = ""


@dataclass
class Batch:
    """A checked plan: its loaded models and its combinations in execution order."""

    plan: Plan
    out: Path
    models: dict[str, Model]
    images: dict[str, ImagesEntry]
    combinations: list[Combination] = field(default_factory=list)
    #: The images that were read last; consecutive combinations mostly share them.
    _cached_images: tuple[tuple[str | None, str], Tensor] | None = None

    def read_images(self, model: str | None, images: str) -> Tensor:
        """Images (N, C, H, W) in the model's input size."""
        if self._cached_images is None or self._cached_images[0] != (model, images):
            owner = None if model is None else self.models[model]
            self._cached_images = (model, images), read_images(self.images[images].images, owner)
        return self._cached_images[1]

    def prepare(self, combination: Combination) -> PreparedRun:
        """The prepared run of a combination, with its model and images."""
        spec, arguments = methods[combination.call].spec, dict(combination.arguments)
        if (model_input := spec.input("model")) and combination.model is not None:
            arguments[model_input.name] = self.models[combination.model]
        if (images_input := spec.input("images")) and combination.images is not None:
            arguments[images_input.name] = self.read_images(combination.model, combination.images)
        return prepare(combination.call, device=self.plan.device, **self._run_options(), **arguments)

    def outcomes(self, *, dry: bool = False) -> Iterator[Outcome]:
        """Run every combination without a saved result and yield its outcome; ``dry`` runs nothing."""
        for combination in self.combinations:
            clock = time.perf_counter()
            try:
                outcome = self._outcome(combination, dry)
            except Exception as error:  # a plugin may raise anything; the report shows the message
                expected = isinstance(error, PhospheneError)
                failure = str(error) if expected else f"{type(error).__name__}: {error}"
                outcome = Outcome(combination, "failed", failure=failure)
            seconds = outcome.seconds or time.perf_counter() - clock
            yield replace(outcome, seconds=round(seconds, 3))

    def _outcome(self, combination: Combination, dry: bool) -> Outcome:
        prepared, saved = self.prepare(combination), _load_saved(combination.folder)
        if saved is not None and saved.provenance is not None and prepared.produced(saved):
            return Outcome(combination, "reused", None if dry else saved, saved.provenance.seconds)
        if dry:
            return Outcome(combination, "pending")
        arguments = {**prepared.inputs, **prepared.params}
        result = run(combination.call, out=combination.folder, **self._run_options(), **arguments)
        if result.provenance and result.provenance.interrupted:
            raise KeyboardInterrupt  # Ctrl-C stops the plan, not only this run
        return Outcome(combination, "completed", result)

    def _run_options(self) -> dict[str, Any]:
        return {"batch_size": self.plan.batch_size, "executor": self.plan.executor}


def _load_saved(folder: Path) -> Result | None:
    """The complete result in a folder, or None; a damaged one counts as none, so it is computed again."""
    try:
        result = load_result(folder)
        return result if (folder / "picture.png").is_file() else None
    except PhospheneError:
        return None


def _is_report(text: str) -> bool:
    """Whether a text is the JSON report of a batch."""
    document = json.loads(text)
    return isinstance(document, dict) and {"format", "phosphene", "plan", "runs"} <= document.keys()


def open_batch(plan: Plan, out: Path) -> Batch:
    """Check a plan and load its models. Raises one InputError with every fault, before anything runs."""
    faults = _Faults(plan)
    for name, is_own in (("report.html", is_page), ("report.json", _is_report)):
        try:
            check_output_file(out / name, is_own)
        except InputError as error:
            raise InputError(f"{plan.where(('out',))}: {error}") from error
    settings = [setting for number in range(len(plan.methods)) for setting in _settings(plan, number, faults)]
    _check_labels("models", [(number, entry.label) for number, entry in enumerate(plan.models)], faults)
    _check_labels("images", [(number, entry.label) for number, entry in enumerate(plan.images)], faults)
    _check_labels("methods", [(setting.number, setting.label) for setting in settings], faults)
    models = {}
    for number, entry in enumerate(plan.models):
        with faults.at("models", number):
            check_saved_options(entry.uri, entry.options)
            models[entry.label] = load_model(entry.uri, **entry.settings())
    batch = Batch(plan, out, models, {entry.label: entry for entry in plan.images})
    for model in (None, *models):
        for number, images in enumerate((*batch.images, None)):
            matching = [
                (row, setting) for row, setting in enumerate(settings) if setting.applies(model, images)
            ]
            with faults.at("images", number):
                if images is not None and matching:
                    batch.read_images(model, images)
                for row, setting in matching:
                    with faults.at("methods", setting.number):
                        batch.combinations.append(_combination(batch, setting, row, model, images))
    if faults.messages:
        raise InputError("\n".join(faults.messages.values()))
    return batch


class _Faults:
    """The faults of a plan, each reported once with its line."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self.messages = plan, dict[str, str]()

    @contextmanager
    def at(self, *path: int | str) -> Iterator[None]:
        """Record an error that is raised inside as a fault at this path of the plan."""
        try:
            yield
        except (PhospheneError, OSError) as error:
            # The same fault in many combinations is reported once.
            self.messages.setdefault(str(error), f"{self._plan.where(path)}: {error}")


def _check_labels(key: str, labels: list[tuple[int, str]], faults: _Faults) -> None:
    """Refuse labels with the same folder name; some file systems ignore case."""
    labels_by_folder: dict[str, str] = {}
    for number, label in labels:
        with faults.at(key, number):
            if (folder := folder_name(label).casefold()) in labels_by_folder:
                other = labels_by_folder[folder]
                raise InputError(f"{label!r} would share its folder with {other!r} above: give it a 'name'")
            labels_by_folder[folder] = label


@dataclass(frozen=True)
class _Setting:
    """A method of a plan with one setting of its parameters, for any model and images."""

    number: int
    entry: MethodEntry
    spec: MethodSpec
    label: str
    arguments: dict[str, Any]

    def applies(self, model: str | None, images: str | None) -> bool:
        """Whether it runs for this model and these images; None stands for no model or no images."""
        takes_model, takes_images = (self.spec.input(role) is not None for role in ("model", "images"))
        selected = self.entry.models is None or model in self.entry.models
        return selected and (model is not None) is takes_model and (images is not None) is takes_images


def _settings(plan: Plan, number: int, faults: _Faults) -> list[_Setting]:
    """All parameter settings of one of the plan's methods, with the checks that need no model."""
    entry, settings = plan.methods[number], list[_Setting]()
    with faults.at("methods", number):
        method = methods[entry.method]
        spec = method.spec
        for label in entry.models or ():
            if label not in (labels := [model.label for model in plan.models]):
                raise UnknownName("model", label, labels, "the plan")
        if entry.models and spec.input("model") is None:
            raise InputError(f"{spec.short_name} takes no model, so it cannot have 'models'")
        inputs = _inputs(entry, spec)
        for key in ("params", "grid"):
            for name in getattr(entry, key):
                with faults.at("methods", number, key, name):
                    if name not in spec.params.model_fields:
                        allowed = [*(i.name for i in spec.inputs), *spec.params.model_fields]
                        raise UnknownName("parameter", name, allowed, spec.short_name)
                    if key == "grid" and name in entry.params:
                        raise InputError(f"{name!r} is in 'params' already")
        seed = {method.seed: plan.seed} if method.seed else {}
        for setting in entry.settings():
            params = {n: _parse_value(v, spec, n) for n, v in (entry.params | setting).items()}
            method.validate(params)
            label = " ".join(filter(None, (entry.label, setting_text(setting))))
            settings.append(_Setting(number, entry, spec, label, inputs | seed | params))
    return settings


def _inputs(entry: MethodEntry, spec: MethodSpec) -> dict[str, Any]:
    """The inputs of a method besides model and images."""
    names = [declared.name for declared in spec.inputs]
    for name in entry.inputs:
        if name not in names:
            raise UnknownName("input", name, names, spec.short_name)
        if name in [axis.name for role in ("model", "images") if (axis := spec.input(role))]:
            raise InputError(f"{name!r} is set by the plan's models and images; 'inputs' are the others")
    target = spec.input("target")
    if entry.target is None:
        return dict(entry.inputs)
    if target is None:
        raise InputError(f"{spec.short_name} takes no target")
    return {**entry.inputs, target.name: entry.target}


def _parse_value(value: Any, spec: MethodSpec, name: str) -> Any:
    """A parameter's value; text is parsed as on the command line: ``8/255``."""
    field = spec.params.model_fields.get(name)
    return read_option(value, field) if field is not None and isinstance(value, str) else value


def _combination(
    batch: Batch, setting: _Setting, row: int, model: str | None, images: str | None
) -> Combination:
    """A setting with a model and images, with all checks."""
    arguments = dict(setting.arguments)
    if images is not None:
        for role in ("target", "labels"):
            declared, value = setting.spec.input(role), getattr(batch.images[images], role)
            if declared is not None and value is not None:
                arguments.setdefault(declared.name, value)
    folder = batch.out / "results" / folder_name(setting.label)
    for label in filter(None, (model, images)):
        folder /= folder_name(label)
    check_output_folder(folder)
    combination = Combination(setting.label, model, images, row, setting.entry.method, arguments, folder)
    return replace(combination, passes=batch.prepare(combination).passes())
