"""Observation of a run: its result, its passes through the network, and every change it leaves behind."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import pickle
import random
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from ..data.datasets import TensorDataset
from ..errors import PhospheneError
from ..progress import ProgressEvent, report_progress
from ..results import Result
from ..roles import model_for_inputs

if TYPE_CHECKING:
    from ..models import Model
    from ..registry.method import Method
    from .cases import Case


@dataclass
class Observation:
    """One run of a case: its result, refusal or crash, and what it changed."""

    case: Case
    model: Model
    inputs: dict[str, Any]
    #: Copies of the inputs' tensors from before the run.
    tensors_before: dict[str, Tensor]
    result: Any = None
    refusal: PhospheneError | None = None
    crash: BaseException | None = None
    passes: Passes = field(default_factory=lambda: Passes())
    events: list[ProgressEvent] = field(default_factory=list)
    seconds: float = 0.0
    #: Changes of the network, one sentence each.
    model_changes: list[str] = field(default_factory=list)
    #: Other side effects: files, threads, settings, output.
    side_effects: list[str] = field(default_factory=list)


def observe(method: Method[..., Any], case: Case) -> Observation:
    """Run a case once and record everything observable about it."""
    imported = set(sys.modules)
    observation = _observe(method, case)
    # A library's side effects at its first import are not the method's.
    if observation.side_effects and sys.modules.keys() - imported:
        observation = _observe(method, case)
    return observation


def _observe(method: Method[..., Any], case: Case) -> Observation:
    model = case.model()
    inputs = case.inputs(method, model)
    tensors_before = {name: tensor.clone() for name, tensor in input_tensors(inputs).items()}
    run = Observation(case, model, inputs, tensors_before)
    record_structure(model, inputs)
    before, clock = state_of(model), time.perf_counter()
    with (
        record_side_effects(run.side_effects),
        count_passes(model.module) as run.passes,
        report_progress(run.events.append),
    ):
        try:
            run.result = method(**inputs, **case.arguments(method))
        except PhospheneError as refusal:
            run.refusal = refusal
        except Exception as crash:
            run.crash = crash
    run.seconds = time.perf_counter() - clock
    run.model_changes = changes(before, state_of(model))
    return run


def input_tensors(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among a method's inputs, those of data sets included."""
    values = {n: v.images if isinstance(v, TensorDataset) else v for n, v in inputs.items()}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


# --- networks --------------------------------------------------------------------------------


def record_structure(model: Model, inputs: Mapping[str, Any]) -> None:
    """Record the model's structure at the inputs' size, so that this pass is not counted as the method's."""
    sized = model_for_inputs(model, inputs)
    with contextlib.suppress(PhospheneError):  # refusing a size is left to the method
        sized.structure  # type: ignore[union-attr]  # noqa: B018


def state_of(model: Model) -> dict[str, dict[Any, Any]]:
    """Everything about a model that a method must leave unchanged."""
    module = model.module
    attributes = ("name", "input_size", "classes", "crop_pct", "interpolation", "source")
    return {
        "the Model's attributes": {
            "module": id(module),
            **{name: getattr(model, name) for name in attributes},
            **{name: getattr(model, name).clone() for name in ("mean", "std")},
        },
        "the weights": {n: t.detach().clone() for n, t in module.state_dict().items()},
        "the parameters": {
            n: (p.data_ptr(), p.requires_grad, p.dtype, p.device) for n, p in module.named_parameters()
        },
        "the gradients": {
            n: p.grad if p.grad is None else p.grad.clone() for n, p in module.named_parameters()
        },
        "the training mode": {n: part.training for n, part in module.named_modules()},
        "the modules": {n: (id(part), part.__dict__.get("forward")) for n, part in module.named_modules()},
        "the hooks": {
            (name, kind): list(getattr(part, kind))
            for name, part in module.named_modules()
            for kind in vars(part)
            if kind.endswith("_hooks")
        },
    }


def changes(before: Mapping[str, Mapping[Any, Any]], after: Mapping[str, Mapping[Any, Any]]) -> list[str]:
    """The differences between two states, one sentence each."""

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return torch.equal(one, other)
        return one is other or (
            not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other
        )

    differences = []
    for what, old in before.items():
        new = after[what]
        keys = [
            k for k in old.keys() | new.keys() if k not in old or k not in new or not same(old[k], new[k])
        ]
        if keys:
            where = min(map(str, keys)) or "the network itself"
            differences.append(f"{what} of {where}" + (f" and {len(keys) - 1} more" if keys[1:] else ""))
    return differences


@dataclass
class Passes:
    """Passes started, and how many images went forward and backward through the first layer."""

    started: int = 0
    forward: int = 0
    backward: int = 0


def _first_layer(module: nn.Module) -> nn.Module:
    return next((p for p in module.modules() if isinstance(p, (nn.Conv2d, nn.Linear))), module)


@contextmanager
def count_passes(module: nn.Module) -> Iterator[Passes]:
    """Count the passes through a network inside this block."""
    passes = Passes()

    def start(*_: Any) -> None:
        passes.started += 1

    def forward(_: nn.Module, args: Any, output: Tensor) -> None:
        count = len(output)
        passes.forward += count

        def backward(_: Tensor) -> None:
            passes.backward += count

        if output.requires_grad:
            output.register_hook(backward)

    handles = [
        module.register_forward_pre_hook(start),
        _first_layer(module).register_forward_hook(forward),
    ]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def raise_in_pass(module: nn.Module, at: int, error: BaseException) -> Iterator[None]:
    """Inside this block, the network's first layer raises ``error`` at its ``at``-th call."""
    remaining = at

    def fail(*_: Any) -> None:
        nonlocal remaining
        remaining -= 1
        if remaining == 0:
            raise error

    handle = _first_layer(module).register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


# --- side effects ------------------------------------------------------------------------------


@contextmanager
def record_side_effects(side_effects: list[str]) -> Iterator[None]:
    """Append a sentence for each side effect in the block: files, threads, settings, output, ..."""
    out, err = io.StringIO(), io.StringIO()
    home, temporary = Path.cwd(), tempfile.tempdir
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as scratch:
        before, threads, files = _process_state(), set(threading.enumerate()), _open_files()
        os.chdir(work)
        tempfile.tempdir = scratch
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            moved = Path.cwd().resolve() != Path(work).resolve()
            os.chdir(home)
            tempfile.tempdir = temporary
            after = _process_state()
            changed = [what for what in before if not _same(before[what], after[what])]
            side_effects += [f"{what} changed" for what in changed]
            side_effects += [
                f"thread {t.name} still runs" for t in {*threading.enumerate()} - threads if not t.daemon
            ]
            side_effects += [f"{path} is still open" for _, path in _open_files() - files]
            for what in changed:
                if what in _SETTINGS:
                    _SETTINGS[what][1](before[what])
            if moved:
                side_effects.append("the working directory changed")
            for folder, where in (
                (work, "in the working directory"),
                (scratch, "in the temporary directory"),
            ):
                files_left = sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))
                files_left = [path for path in files_left if not path.startswith(_TORCH.lower())]
                if files_left:
                    side_effects.append(f"files were left {where}: {', '.join(files_left[:3])}")
            for stream, name in ((out, "standard output"), (err, "standard error")):
                if stream.getvalue().strip():
                    side_effects.append(f"it wrote to {name}: {stream.getvalue().strip()[:80]!r}")


def _open_files() -> set[tuple[int, str]]:
    return {(file.fd, file.path) for file in psutil.Process().open_files()}


#: Variables and files that torch's optimizers create at their first use.
_TORCH = "TORCHINDUCTOR"


def _set_environment(variables: Mapping[str, str]) -> None:
    for name in [n for n in os.environ if n not in variables and not n.startswith(_TORCH)]:
        del os.environ[name]
    os.environ.update(variables)


#: Process-wide settings, restored so that one case cannot affect the next.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "whether gradients are on": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's deterministic switch": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "cuDNN's benchmark switch": (
        lambda: torch.backends.cudnn.benchmark,
        lambda value: setattr(torch.backends.cudnn, "benchmark", value),
    ),
    "numpy's handling of errors": (np.geterr, lambda value: np.seterr(**value)),
    "the environment": (
        lambda: {n: v for n, v in os.environ.items() if not n.startswith(_TORCH)},
        _set_environment,
    ),
}


def _process_state() -> dict[str, Any]:
    return {
        "torch's random state": torch.get_rng_state(),
        "Python's random state": random.getstate(),
        "numpy's random state": pickle.dumps(np.random.get_state()),
        **{name: read() for name, (read, _) in _SETTINGS.items()},
        "torch's default device": torch.get_default_device(),
        "inference mode": torch.is_inference_mode_enabled(),
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


@contextmanager
def new_tensors() -> Iterator[Callable[[], int]]:
    """A function that counts the live tensors created since the block started."""

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    gc.collect()
    gc.freeze()  # objects from before need not be scanned at every count
    try:
        yield count
    finally:
        gc.unfreeze()


# --- results ---------------------------------------------------------------------------------


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside a result or an input, weights of networks included, with its path."""
    match value:
        case Tensor():
            yield path, value
        case Result():
            for name, item in value.fields():
                yield from tensors_in(item, name)
        case nn.Module():
            for name, tensor in value.state_dict().items():
                yield f"{path}.{name}", tensor
        case Mapping():
            for name, item in value.items():
                yield from tensors_in(item, f"{path}.{name}")
        case tuple() | list():
            for number, item in enumerate(value):
                yield from tensors_in(item, f"{path}[{number}]")


def without_tensors(value: Any) -> Any:
    """A result or value without its tensors and networks, comparable by ``==``."""
    match value:
        case Result():
            return {name: without_tensors(item) for name, item in value.fields()}
        case Tensor() | nn.Module():
            return "..."
        case Mapping():
            return {name: without_tensors(item) for name, item in value.items()}
        case tuple() | list():
            return [without_tensors(item) for item in value]
    return value


def assert_same_result(first: Any, second: Any, *, rtol: float = 0, atol: float = 0) -> None:
    """Assert that two results are equal in all fields: bit for bit, or within tolerances."""
    assert without_tensors(first) == without_tensors(second), (
        f"{without_tensors(first)} against {without_tensors(second)}"
    )
    # By name: the weights of a network that was loaded without its code are in another order.
    ones, others = (sorted(tensors_in(value), key=lambda item: item[0]) for value in (first, second))
    assert [path for path, _ in ones] == [path for path, _ in others], "they contain different tensors"
    for (path, one), (_, other) in zip(ones, others, strict=True):
        assert one.shape == other.shape, f"{path} has shape {tuple(one.shape)} and {tuple(other.shape)}"
        assert one.dtype == other.dtype, f"{path} has dtype {one.dtype} and {other.dtype}"
        one, other = one.detach().cpu(), other.detach().cpu()
        if rtol or atol:
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=partial("{}: {}".format, path))
        elif not torch.equal(one, other):
            difference = float((one.double() - other.double()).abs().max())
            raise AssertionError(f"{path} differs by up to {difference:.3g}")
