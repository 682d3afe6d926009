"""A failing layer, an interrupt at a random time or line, a failing callback: nothing is left changed."""

from __future__ import annotations

import functools
import gc
import random
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest
import torch
from tests.faults.state import (
    changes,
    differences,
    network_state,
    process_state,
    settings,
    with_exits,
)

from phosphene import Model, methods, report_progress, run
from phosphene.testing.cases import Case

METHODS = (
    "activation_maps", "activation_statistics", "top_patches", "embed", "pca", "nearest_neighbors",
    "saliency", "smooth_grad", "integrated_gradients", "guided_backprop", "grad_cam", "layer_cam",
    "score_cam", "ablation_cam", "occlusion", "rise", "fgsm", "pgd", "apgd", "square", "boundary",
    "carlini_wagner", "deepfool", "class_visualization", "feature_inversion", "deep_dream", "gram_texture",
    "neural_style", "adversarial_training", "deletion_insertion",
)  # fmt: skip
#: What a layer or a callback raises.
ERRORS: tuple[type[BaseException], ...] = (
    ArithmeticError, RuntimeError, ValueError, OSError, MemoryError, torch.OutOfMemoryError,
    KeyboardInterrupt, SystemExit,
)  # fmt: skip


class Fault(KeyboardInterrupt):
    """The interrupt of a test."""


@contextmanager
def failing_layer(model: Model, draw: random.Random) -> Iterator[None]:
    """A random layer raises at its k-th call, before or after it computes its output."""
    part = draw.choice([p for p in model.module.modules() if not list(p.children())])
    remaining, error, before = draw.randint(1, 6), draw.choice(ERRORS), draw.random() < 0.5
    original = part.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal remaining
        remaining -= 1
        if remaining == 0 and before:
            raise error("a layer failed")
        output = original(*args, **kwargs)
        if remaining == 0:
            raise error("a layer failed")
        return output

    part.forward = forward
    try:
        yield
    finally:
        del part.forward


@contextmanager
def failing_callback(model: Model, draw: random.Random) -> Iterator[None]:
    """The progress callback raises at its k-th event."""
    remaining, error = draw.randint(1, 4), draw.choice(ERRORS)

    def report(event: Any) -> None:
        nonlocal remaining
        remaining -= 1
        if remaining == 0:
            raise error("the callback failed")

    with report_progress(report):
        yield


@contextmanager
def timed_interrupt(model: Model, draw: random.Random) -> Iterator[None]:
    """Ctrl-C after a random time."""
    signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, 0.08))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def interrupt_at_a_line(model: Model, draw: random.Random) -> Iterator[None]:
    """Ctrl-C at a random one of the first lines that run in this project."""
    remaining = round(10 ** draw.uniform(0, 3.7))

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        return trace_lines if "/phosphene" in frame.f_code.co_filename else None

    def trace_lines(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal remaining
        remaining -= event == "line" and frame.f_lasti not in with_exits(frame.f_code)
        if remaining == 0:
            remaining = -1
            raise Fault(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return trace_lines

    earlier = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(earlier)


FAULTS = (failing_layer, failing_layer, failing_callback, timed_interrupt, interrupt_at_a_line)


def _raise_interrupt(*_: Any) -> None:
    raise Fault("the timer")


@functools.cache
def case_of(name: str) -> Case:
    """A case that the method accepts."""
    for case in (Case(count=1), Case("functional", "noise", count=1), Case("shapes-vgg", count=1)):
        model = case.model()
        try:
            case.run(methods[name], model)
        except Exception:
            continue
        return case
    raise AssertionError(f"{name} accepts no case")


def mixed_model(name: str) -> Model:
    """The case's model, some modules in training mode, some parameters frozen, one with a gradient."""
    model = case_of(name).model()
    parts, parameters = list(model.module.modules()), list(model.module.parameters())
    parts[len(parts) // 2].train()
    parameters[0].requires_grad_(False)
    parameters[-1].grad = torch.ones_like(parameters[-1])
    return model


def run_with_fault(number: int) -> tuple[list[str], bool]:
    """What one call with a fault left changed, and whether the fault ended it."""
    draw = random.Random(number)
    name, fault = METHODS[number % len(METHODS)], draw.choice(FAULTS)
    method, case, model = methods[name], case_of(name), mixed_model(name)
    inputs = case.inputs(method, model)
    random.seed(number)
    torch.manual_seed(number)
    network, before, process = network_state(model), settings(), process_state()
    ended, raised = False, ""
    # Of pytest-timeout, which stops a test that hangs.
    alarm, handler = signal.getitimer(signal.ITIMER_REAL), signal.signal(signal.SIGALRM, _raise_interrupt)
    try:
        with fault(model, draw):
            if draw.random() < 0.5:
                method(**(inputs | case.arguments(method)))
            else:
                run(method, progress=None, **(inputs | case.arguments(method)))
    except BaseException as error:
        ended, raised = True, repr(error)
        faults = changes(network, network_state(model)) + differences(before, settings())
    else:
        faults = changes(network, network_state(model)) + differences(before, settings())
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *alarm)
    faults += differences(process, process_state())
    return [f"{number} {name} {fault.__name__} {raised}: {what}" for what in faults], ended


def run_many(count: int) -> tuple[list[str], int]:
    """The faults of ``count`` runs and how many of them were ended by an error."""
    faults: list[str] = []
    ended = 0
    for name in METHODS[:count]:
        case_of(name)  # imports and caches
    for number in range(count):
        imported = set(sys.modules)
        left, was_ended = run_with_fault(number)
        # A library's side effects at its first import are not the method's.
        if left and sys.modules.keys() - imported:
            left, was_ended = run_with_fault(number)
        faults += left
        ended += was_ended
    return faults, ended


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes write to the system's folder at the same time."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(autouse=True)
def restored_random_state() -> Iterator[None]:
    """The runs are seeded; the process's other tests draw as before."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(state)


def test_forty_faults_leave_nothing() -> None:
    faults, ended = run_many(40)
    assert not faults, "\n".join(faults)
    assert ended >= 15


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_thousand_faults_leave_nothing_and_take_no_memory() -> None:
    process = psutil.Process()
    run_many(100)
    gc.collect()
    before = process.memory_info().rss
    faults, ended = run_many(1000)
    gc.collect()
    growth = (process.memory_info().rss - before) / 2**20
    print(f"{ended} of 1000 runs were ended by an error; {len(faults)} differences; {growth:.0f} MiB more")
    assert not faults, "\n".join(faults)
    assert ended >= 400
    assert growth < 200
