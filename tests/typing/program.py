"""A program that uses the public interface; ``make lint`` checks its types strictly, from outside."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, assert_type

import torch
from pydantic import Field
from torch import Tensor

from phosphene import (
    Class,
    Cost,
    InputError,
    Method,
    MethodSpec,
    Model,
    PhospheneError,
    PreparedRun,
    ProgressEvent,
    Reference,
    Result,
    UnknownName,
    hookimpl,
    load_model,
    load_result,
    max_batch,
    method,
    methods,
    prepare,
    progress_bar,
    read_images,
    replay,
    report_progress,
    run,
)
from phosphene.results import AdversarialExamples, Attribution
from phosphene.roles import Images, Labels, Seed, Target
from phosphene.roles import Model as ModelInput
from phosphene.spec import size


@method(
    family="attribution",
    references=[Reference(key="me2026", title="Mine", authors="Me", year=2026, url="https://example.org")],
    cost=Cost(forward=size.images),
)
def brightness(
    model: ModelInput,
    images: Images,
    target: Target = None,
    *,
    power: Annotated[float, Field(gt=0, le=4)] = 1.0,
    seed: Seed = None,
) -> Attribution:
    """Brightness as an attribution map."""
    return Attribution(images=images, maps=images.mean(1) ** power, targets=target.names(model, len(images)))


@method(family="attacks")
def nothing(model: ModelInput, images: Images, labels: Labels) -> AdversarialExamples:
    """Return every image unchanged."""
    logits = model(images)
    return AdversarialExamples.from_logits(model, images, images, labels, logits, logits, targeted=False)


@hookimpl
def phosphene_methods() -> Sequence[object]:
    """The methods of this module."""
    return [brightness, nothing]


class Observer:
    """An observer that also receives progress events."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    @hookimpl
    def phosphene_after_run(
        self, run: PreparedRun, result: Result | None, error: BaseException | None
    ) -> None:
        """Print how a run ended."""
        print(run.method, error or (result and result.lines()))

    def on_progress(self, event: ProgressEvent) -> None:
        """Record a step."""
        self.steps.append(event.done)
        print(event.as_json(), event.total, event.note)


def run_and_replay(name: str, folder: Path) -> float:
    """Look methods up, predict the cost, run, save, load, replay."""
    gradient_methods = methods.find(family="attribution", needs="gradients")
    titles: list[str] = [each.spec.title for each in gradient_methods]
    spec: MethodSpec = methods[name].spec
    bounds = spec.params_schema["properties"]
    if spec.cost is not None:
        forward, backward = spec.cost.evaluate(methods[name].validate({}), images=2, height=64, width=64)
        assert_type(forward, int)
    model: Model = load_model("builtin:shapes-vgg", device="cpu")
    images: Tensor = read_images("builtin:scenes/2", model)
    prepared = prepare(name, model=model, images=images)
    assert_type(prepared, PreparedRun)
    assert_type(prepared.passes(), tuple[int, int] | None)
    observer = Observer()
    with max_batch(8), report_progress(observer.on_progress):
        result = run(name, model=model, images=images, out=folder, seed=0)
    assert_type(result, Result)
    print(titles, bounds, prepared.produced(load_result(folder)), replay(folder).same, result.provenance)
    return sum(1.0 for _ in progress_bar(range(3), "counting"))


def call(model: Model, images: Tensor) -> Tensor:
    """A method has the types of the function that it was made of."""
    assert_type(brightness(model, images, power=2.0), Attribution)
    assert_type(brightness.spec, MethodSpec)
    attacked = nothing(model, images, torch.zeros(len(images), dtype=torch.int64))
    with model.tap(model.last_map) as tap:
        logits = model(images)
        features = tap[model.last_map]
    saliency = methods["saliency"]
    maps = saliency(model, images, Class(3))
    if not isinstance(maps, Attribution):
        raise TypeError(type(maps))
    return maps.maps.sum() + attacked.distance("l2").sum() + logits.sum() + features.sum()


def short_name(each: Method[..., Attribution]) -> str:
    """The name of a method that returns attribution maps."""
    return each.spec.short_name


if __name__ == "__main__":
    try:
        print(run_and_replay("pgd", Path("out")), short_name(brightness))
    except UnknownName as error:
        sys.exit(f"no such name: {error}")
    except (InputError, PhospheneError) as error:
        sys.exit(str(error))
