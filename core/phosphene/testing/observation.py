"""Looking on while a method runs: what it gives, what it leaves behind and what it costs."""

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
    """One run of a case: its result, refusal or crash, and what was different after it."""

    case: Case
    model: Model
    inputs: dict[str, Any]
    #: The inputs' tensors as they were before the run.
    given: dict[str, Tensor]
    result: Any = None
    refusal: PhospheneError | None = None
    crash: BaseException | None = None
    traffic: Traffic = field(default_factory=lambda: Traffic())
    events: list[ProgressEvent] = field(default_factory=list)
    seconds: float = 0.0
    #: What of the network changed, in words.
    model_changes: list[str] = field(default_factory=list)
    #: What else the run left behind or changed: files, threads, settings, output.
    traces: list[str] = field(default_factory=list)


def observe(method: Method[..., Any], case: Case) -> Observation:
    """Run a case once and note everything about it."""
    imported = set(sys.modules)
    seen = _observe(method, case)
    # What a library does to the process when it is first imported is not the method's doing.
    if seen.traces and sys.modules.keys() - imported:
        seen = _observe(method, case)
    return seen


def _observe(method: Method[..., Any], case: Case) -> Observation:
    model = case.model()
    inputs = case.inputs(method, model)
    given = {name: tensor.clone() for name, tensor in input_tensors(inputs).items()}
    seen = Observation(case, model, inputs, given)
    record_structure(model, inputs)
    before, clock = state_of(model), time.perf_counter()
    with watched(seen.traces), traffic(model.module) as seen.traffic, report_progress(seen.events.append):
        try:
            seen.result = method(**inputs, **case.arguments(method))
        except PhospheneError as refusal:
            seen.refusal = refusal
        except Exception as crash:
            seen.crash = crash
    seen.seconds = time.perf_counter() - clock
    seen.model_changes = changes(before, state_of(model))
    return seen


def input_tensors(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among a method's inputs, those of data sets included."""
    found = {n: v.images if isinstance(v, TensorDataset) else v for n, v in inputs.items()}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


# --- networks --------------------------------------------------------------------------------


def record_structure(model: Model, inputs: Mapping[str, Any]) -> None:
    """Record the model's structure at the inputs' size, so that this pass is not counted as the method's."""
    sized = model_for_inputs(model, inputs)
    with contextlib.suppress(PhospheneError):  # refusing a size is left to the method
        sized.structure  # type: ignore[union-attr]  # noqa: B018


def state_of(model: Model) -> dict[str, dict[Any, Any]]:
    """Everything about a model that a method must leave as it was."""
    module = model.module
    words = ("name", "input_size", "classes", "crop_pct", "interpolation", "source")
    return {
        "the Model's record": {
            "module": id(module),
            **{name: getattr(model, name) for name in words},
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
    """What differs between two states, in words."""

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return torch.equal(one, other)
        return one is other or (
            not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other
        )

    found = []
    for what, old in before.items():
        new = after[what]
        places = [
            k for k in old.keys() | new.keys() if k not in old or k not in new or not same(old[k], new[k])
        ]
        if places:
            where = min(str(place) for place in places) or "the network itself"
            found.append(f"{what} of {where}" + (f" and {len(places) - 1} more" if places[1:] else ""))
    return found


@dataclass
class Traffic:
    """What went through a network: passes begun, and images forward and backward through its first layer."""

    passes: int = 0
    forward: int = 0
    backward: int = 0


def _first_layer(module: nn.Module) -> nn.Module:
    return next((p for p in module.modules() if isinstance(p, (nn.Conv2d, nn.Linear))), module)


@contextmanager
def traffic(module: nn.Module) -> Iterator[Traffic]:
    """Count the passes through a network inside this block."""
    seen = Traffic()

    def begun(*_: Any) -> None:
        seen.passes += 1

    def forward(_: nn.Module, args: Any, output: Tensor) -> None:
        rows = len(output)
        seen.forward += rows

        def backward(_: Tensor) -> None:
            seen.backward += rows

        if output.requires_grad:
            output.register_hook(backward)

    handles = [
        module.register_forward_pre_hook(begun),
        _first_layer(module).register_forward_hook(forward),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def breaking(module: nn.Module, at: int, error: BaseException) -> Iterator[None]:
    """Inside this block, the network's first layer raises ``error`` at its ``at``-th call."""
    left = at

    def break_off(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise error

    handle = _first_layer(module).register_forward_hook(break_off)
    try:
        yield
    finally:
        handle.remove()


# --- the world around --------------------------------------------------------------------------


@contextmanager
def watched(traces: list[str]) -> Iterator[None]:
    """Note what a run changes around it: files, threads, settings, randomness, output."""
    out, err = io.StringIO(), io.StringIO()
    home, temporary = Path.cwd(), tempfile.tempdir
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as scratch:
        before, threads, files = _surroundings(), set(threading.enumerate()), _open_files()
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
            after = _surroundings()
            changed = [what for what in before if not _same(before[what], after[what])]
            traces += [f"{what} changed" for what in changed]
            traces += [
                f"thread {t.name} still runs" for t in {*threading.enumerate()} - threads if not t.daemon
            ]
            traces += [f"{path} is still open" for _, path in _open_files() - files]
            for what in changed:
                if what in _SETTINGS:
                    _SETTINGS[what][1](before[what])
            if moved:
                traces.append("the working directory is another")
            for folder, where in (
                (work, "in the working directory"),
                (scratch, "in the temporary directory"),
            ):
                left = sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))
                left = [path for path in left if not path.startswith(_TORCH.lower())]
                if left:
                    traces.append(f"files were left {where}: {', '.join(left[:3])}")
            for stream, name in ((out, "standard output"), (err, "standard error")):
                if stream.getvalue().strip():
                    traces.append(f"it wrote to {name}: {stream.getvalue().strip()[:80]!r}")


def _open_files() -> set[tuple[int, str]]:
    return {(file.fd, file.path) for file in psutil.Process().open_files()}


#: What torch's optimisers leave in the environment and the temporary folder when they are first used.
_TORCH = "TORCHINDUCTOR"


def _set_environment(wanted: Mapping[str, str]) -> None:
    for name in [n for n in os.environ if n not in wanted and not n.startswith(_TORCH)]:
        del os.environ[name]
    os.environ.update(wanted)


#: Switches that hold for everybody, which are put back for the next run's sake.
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


def _surroundings() -> dict[str, Any]:
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
    """A function that counts the living tensors made since this block began."""

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    gc.collect()
    gc.freeze()  # what was there before is not looked through again and again
    try:
        yield count
    finally:
        gc.unfreeze()


# --- results ---------------------------------------------------------------------------------


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside a result or an input, networks' weights included, with where it was found."""
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


def plain_in(value: Any) -> Any:
    """A result or value without its tensors and networks: what must come out equal by ``==``."""
    match value:
        case Result():
            return {name: plain_in(item) for name, item in value.fields()}
        case Tensor() | nn.Module():
            return "..."
        case Mapping():
            return {name: plain_in(item) for name, item in value.items()}
        case tuple() | list():
            return [plain_in(item) for item in value]
    return value


def assert_alike(first: Any, second: Any, *, rtol: float = 0, atol: float = 0) -> None:
    """Two results alike, words and numbers included; to the last bit unless tolerances are given."""
    assert plain_in(first) == plain_in(second), f"{plain_in(first)} against {plain_in(second)}"
    # By name: of a network that was loaded without its code the weights come in another order.
    ones, others = (sorted(tensors_in(value), key=lambda found: found[0]) for value in (first, second))
    assert [path for path, _ in ones] == [path for path, _ in others], "they hold different tensors"
    for (path, one), (_, other) in zip(ones, others, strict=True):
        assert one.shape == other.shape, f"{path} is {tuple(one.shape)} once and {tuple(other.shape)} then"
        assert one.dtype == other.dtype, f"{path} is {one.dtype} once and {other.dtype} then"
        one, other = one.detach().cpu(), other.detach().cpu()
        if rtol or atol:
            told = partial("{}: {}".format, path)
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=told)
        elif not torch.equal(one, other):
            apart = float((one.double() - other.double()).abs().max())
            raise AssertionError(f"{path} differs by up to {apart:.3g}")
