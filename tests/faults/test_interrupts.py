"""Ctrl-C at every line of the code that changes hooks, flags, modes and handlers leaves nothing changed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from tests.faults.state import changes, differences, mixed_network, network_state, settings, with_exits

import phosphene
from phosphene import Model, load_model, methods, run
from phosphene.hooks import guard

CORE = Path(phosphene.__file__).parent
#: The modules whose lines are interrupted.
TRACED = {
    str(CORE / name)
    for name in (
        "hooks/tap.py", "hooks/guard.py", "hooks/backward_rules.py", "restoration.py", "torch_state.py",
        "graceful_stop.py", "default_device.py", "models/optimized_copy.py", "models/digest.py",
        "models/introspection.py", "models/batch_size.py", "registry/method.py", "progress.py",
        "checkpoints.py", "runs/run.py", "runs/prepared_run.py",
    )
}  # fmt: skip
#: Of other modules the functions that register hooks and set modes.
TRACED_FUNCTIONS = {
    "register_forward_hook", "register_forward_pre_hook", "set_grad_enabled", "_push_mode", "_pop_mode",
    "get_rng_state", "set_rng_state",
}  # fmt: skip


class Interrupt(KeyboardInterrupt):
    """The interrupt of a test."""


def interrupt_at(line: int, work: Callable[[], Any]) -> int:
    """Run ``work`` and raise ``Interrupt`` at the line of this number; returns the number of lines."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in TRACED and code.co_name not in TRACED_FUNCTIONS:
            return None
        return trace_lines(frame, event, _)

    def trace_lines(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if event in ("line", "call") and frame.f_lasti not in with_exits(frame.f_code):
            count += 1
            if count == line:
                raise Interrupt(f"{frame.f_code.co_filename}:{frame.f_lineno} ({event})")
        return trace_lines

    earlier = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(earlier)
    return count


@pytest.fixture
def model() -> Model:
    return load_model(mixed_network(), input_size=(3, 8, 8))


IMAGES = torch.linspace(0, 1, 192).view(1, 3, 8, 8)


def read_layers(model: Model) -> None:
    with model.tap("0", "3", leaf=True) as tap:
        model(IMAGES)
        tap["3"]


def cut_layers(model: Model) -> None:
    model.features_of(IMAGES, ["3"], inputs=True)


def freeze(model: Model) -> None:
    with guard(model.module), guard(model.module):
        model(IMAGES)


def record(model: Model) -> None:
    load_model(model.module, input_size=(3, 8, 8)).structure  # noqa: B018


def call(name: str, **params: Any) -> Callable[[Model], Any]:
    return lambda model: methods[name](model, IMAGES, 0, **params)


def optimize(model: Model) -> None:
    run("class_visualization", model=model, target=0, steps=2, seed=0, progress=False)


#: In these an interrupt at the first line of an ``__exit__`` is after the ``with`` statement has ended.
WITH_STATEMENTS = {"tap": read_layers, "features": cut_layers, "guard": freeze}
CALLS = {
    "structure": record,
    "smooth_grad": call("smooth_grad", samples=3, seed=0),
    "guided_backprop": call("guided_backprop"),
    "grad_cam": call("grad_cam"),
    "optimization": optimize,
    "occlusion": call("occlusion", window=4, stride=2),
}


def check_interrupts(model: Model, work: Callable[[Model], Any], step: int, exits: bool = True) -> int:
    """Interrupt at every ``step``-th line; returns the number of interrupts.

    Without ``exits`` an interrupt at the first instruction of an ``__exit__`` may leave a change.
    """
    work(model)  # structures and copies are cached, imports done
    total = interrupt_at(0, lambda: work(model))
    network, before = network_state(model), settings()
    interrupts, faults = 0, []
    for line in range(1, total + 1, step):
        try:
            interrupt_at(line, functools.partial(work, model))
        except Interrupt as interrupt:
            # While the traceback is alive: nothing may depend on the garbage collector.
            wrong = changes(network, network_state(model)) + differences(before, settings())
            if exits or not (wrong and _last_function(interrupt) == "__exit__"):
                interrupts += 1
                faults += [f"after {interrupt}: {wrong}"] if wrong else []
            elif wrong:
                model = load_model(mixed_network(), input_size=(3, 8, 8))
                work(model)
                network, before = network_state(model), settings()
    assert not faults, "\n".join(faults)
    return interrupts


def _last_function(error: BaseException) -> str:
    """The function that was interrupted."""
    names = []
    trace = error.__traceback__
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    return [name for name in names if not name.startswith("trace")][-1]


@pytest.mark.parametrize("name", sorted(WITH_STATEMENTS))
def test_interrupted_with_statement_leaves_nothing(model: Model, name: str) -> None:
    assert check_interrupts(model, WITH_STATEMENTS[name], step=2, exits=False) > 20


@pytest.mark.parametrize("name", sorted(CALLS))
def test_interrupted_call_leaves_nothing(model: Model, name: str) -> None:
    assert check_interrupts(model, CALLS[name], step=61) > 5


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(CALLS))
def test_call_interrupted_at_every_line_leaves_nothing(model: Model, name: str) -> None:
    assert check_interrupts(model, CALLS[name], step=1) > 100
