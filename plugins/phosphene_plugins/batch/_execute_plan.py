"""Every combination of a plan: checked before any work, then run one after the other, unless it is done."""

from __future__ import annotations

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
from phosphene.parameter_text import read_option
from phosphene.results import check_output_folder

from ._plan import ImagesEntry, MethodEntry, Plan, folder_name, setting_text


@dataclass(frozen=True)
class Combination:
    """One run of a plan: a method in a setting, the labels of model and pictures, the folder it is saved in.

    ``row``: its setting's place in the plan. ``arguments``: what ``run`` is given beside model and
    pictures. ``passes``: how many images will go forward and backward; None where nobody says.
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
    """What became of a combination: "made" now, "kept" from before, "failed", or "to run"."""

    combination: Combination
    state: str
    result: Result | None = None
    seconds: float = 0.0
    failure: str = ""


@dataclass
class Batch:
    """A plan that was checked: its models are loaded, its combinations known, in the order of work."""

    plan: Plan
    out: Path
    models: dict[str, Model]
    images: dict[str, ImagesEntry]
    combinations: list[Combination] = field(default_factory=list)
    #: The pictures that were read last, which most often are the next ones, too.
    _read: tuple[tuple[str | None, str], Tensor] | None = None

    def pictures(self, model: str | None, images: str) -> Tensor:
        """Pictures (N, C, H, W) as a model takes them."""
        if self._read is None or self._read[0] != (model, images):
            owner = None if model is None else self.models[model]
            self._read = (model, images), read_images(self.images[images].images, owner)
        return self._read[1]

    def prepared(self, combination: Combination) -> PreparedRun:
        """The combination as it will run, with its inputs made."""
        spec, given = methods[combination.call].spec, dict(combination.arguments)
        if (owner := spec.input("model")) and combination.model is not None:
            given[owner.name] = self.models[combination.model]
        if (shown := spec.input("images")) and combination.images is not None:
            given[shown.name] = self.pictures(combination.model, combination.images)
        return prepare(combination.call, device=self.plan.device, **self._how(), **given)

    def outcomes(self, *, dry: bool = False) -> Iterator[Outcome]:
        """Carry out what is not done yet, and tell what became of every combination; ``dry``: only tell."""
        for combination in self.combinations:
            clock = time.perf_counter()
            try:
                outcome = self._outcome(combination, dry)
            except Exception as error:  # a stranger's method may raise anything; the report tells it
                known = isinstance(error, PhospheneError)
                failure = str(error) if known else f"{type(error).__name__}: {error}"
                outcome = Outcome(combination, "failed", failure=failure)
            seconds = outcome.seconds or time.perf_counter() - clock
            yield replace(outcome, seconds=round(seconds, 3))

    def _outcome(self, combination: Combination, dry: bool) -> Outcome:
        request, saved = self.prepared(combination), _saved(combination.folder)
        if saved is not None and saved.provenance is not None and request.produced(saved):
            return Outcome(combination, "kept", None if dry else saved, saved.provenance.seconds)
        if dry:
            return Outcome(combination, "to run")
        given = {**request.inputs, **request.params}
        result = run(combination.call, out=combination.folder, **self._how(), **given)
        if result.provenance and result.provenance.interrupted:
            raise KeyboardInterrupt  # it is meant for the whole plan
        return Outcome(combination, "made", result)

    def _how(self) -> dict[str, Any]:
        return {"batch_size": self.plan.batch_size, "executor": self.plan.executor}


def _saved(folder: Path) -> Result | None:
    """The whole result in a folder, if there is one; a spoilt one is as good as none and is made again."""
    try:
        return load_result(folder) if (folder / "picture.png").is_file() else None
    except PhospheneError:
        return None


def open_batch(plan: Plan, out: Path) -> Batch:
    """Check a whole plan and load its models; InputError tells all that is wrong, before anything runs."""
    faults = _Faults(plan)
    if out.exists() and not out.is_dir():
        raise InputError(f"{plan.where(('out',))}: {out} is a file; results and report need a folder")
    settings = [made for number in range(len(plan.methods)) for made in _settings(plan, number, faults)]
    _check_labels("models", [(number, entry.label) for number, entry in enumerate(plan.models)], faults)
    _check_labels("images", [(number, entry.label) for number, entry in enumerate(plan.images)], faults)
    _check_labels("methods", [(setting.number, setting.label) for setting in settings], faults)
    models = {}
    for number, entry in enumerate(plan.models):
        with faults.at("models", number):
            models[entry.label] = load_model(entry.uri, **entry.settings())
    batch = Batch(plan, out, models, {entry.label: entry for entry in plan.images})
    for model in (None, *models):
        for number, images in enumerate((*batch.images, None)):
            chosen = [(row, made) for row, made in enumerate(settings) if made.takes(model, images)]
            with faults.at("images", number):
                if images is not None and chosen:
                    batch.pictures(model, images)
                for row, setting in chosen:
                    with faults.at("methods", setting.number):
                        batch.combinations.append(_combination(batch, setting, row, model, images))
    if faults.told:
        raise InputError("\n".join(faults.told.values()))
    return batch


class _Faults:
    """What is wrong with a plan, each thing once and with its line."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self.told = plan, dict[str, str]()

    @contextmanager
    def at(self, *place: int | str) -> Iterator[None]:
        """Note what is refused inside as wrong at this place of the plan."""
        try:
            yield
        except (PhospheneError, OSError) as error:
            # What is wrong with one combination is wrong with many.
            self.told.setdefault(str(error), f"{self._plan.where(place)}: {error}")


def _check_labels(key: str, labels: list[tuple[int, str]], faults: _Faults) -> None:
    """Labels become folders, on some disks whatever the case of their letters."""
    seen: dict[str, str] = {}
    for number, label in labels:
        with faults.at(key, number):
            if (folder := folder_name(label).casefold()) in seen:
                raise InputError(
                    f"{label!r} would share its folder with {seen[folder]!r} above: give it a 'name'"
                )
            seen[folder] = label


@dataclass(frozen=True)
class _Setting:
    """One method of a plan with all that it is given but model and pictures."""

    number: int
    entry: MethodEntry
    spec: MethodSpec
    label: str
    arguments: dict[str, Any]

    def takes(self, model: str | None, images: str | None) -> bool:
        """Whether it is run for this model and these pictures; None stands for no model, no pictures."""
        owner, shown = self.spec.input("model"), self.spec.input("images")
        wanted = self.entry.models is None or model in self.entry.models
        return wanted and (model is None) is (owner is None) and (images is None) is (shown is None)


def _settings(plan: Plan, number: int, faults: _Faults) -> list[_Setting]:
    """Every setting of one of the plan's methods, checked as far as that goes without a model."""
    entry, found = plan.methods[number], list[_Setting]()
    with faults.at("methods", number):
        method = methods[entry.method]
        spec = method.spec
        for label in entry.models or ():
            if label not in (labels := [model.label for model in plan.models]):
                raise UnknownName("model", label, labels, "the plan")
        if entry.models and spec.input("model") is None:
            raise InputError(f"{spec.short_name} takes no model, so 'models' says nothing")
        inputs = _inputs(entry, spec)
        for key in ("params", "grid"):
            for name in getattr(entry, key):
                with faults.at("methods", number, key, name):
                    if name not in spec.params.model_fields:
                        raise UnknownName("parameter", name, spec.params.model_fields, spec.short_name)
                    if key == "grid" and name in entry.params:
                        raise InputError(f"{name!r} stands in 'params' already")
        seed = {method.seed: plan.seed} if method.seed else {}
        for setting in entry.settings():
            written = {n: _read(v, spec, n) for n, v in (entry.params | setting).items()}
            method.validate(written)
            label = " ".join(filter(None, (entry.label, setting_text(setting))))
            found.append(_Setting(number, entry, spec, label, inputs | seed | written))
    return found


def _inputs(entry: MethodEntry, spec: MethodSpec) -> dict[str, Any]:
    """What a method is given beside model, pictures and parameters."""
    names = [declared.name for declared in spec.inputs]
    for name in entry.inputs:
        if name not in names:
            raise UnknownName("input", name, names, spec.short_name)
        if name in [axis.name for role in ("model", "images") if (axis := spec.input(role))]:
            raise InputError(f"{name!r} is what the plan itself goes through; 'inputs' are the others")
    target = spec.input("target")
    if entry.target is None:
        return dict(entry.inputs)
    if target is None:
        raise InputError(f"{spec.short_name} takes no target")
    return {**entry.inputs, target.name: entry.target}


def _read(value: Any, spec: MethodSpec, name: str) -> Any:
    """A parameter's value; as text it may be written as on the command line: ``8/255``."""
    field = spec.params.model_fields.get(name)
    return read_option(value, field) if field is not None and isinstance(value, str) else value


def _combination(
    batch: Batch, setting: _Setting, row: int, model: str | None, images: str | None
) -> Combination:
    """A setting with a model and pictures, checked as a whole."""
    arguments = dict(setting.arguments)
    if images is not None:
        for role in ("target", "labels"):
            declared, shown = setting.spec.input(role), getattr(batch.images[images], role)
            if declared is not None and shown is not None:
                arguments.setdefault(declared.name, shown)
    folder = batch.out / "results" / folder_name(setting.label)
    for label in filter(None, (model, images)):
        folder /= folder_name(label)
    check_output_folder(folder)
    found = Combination(setting.label, model, images, row, setting.entry.method, arguments, folder)
    return replace(found, passes=batch.prepared(found).passes())
