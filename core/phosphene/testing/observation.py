"""Observation of a run: its result, its passes through the network, and every change it leaves behind."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.datasets import TensorDataset
from ..errors import PhospheneError
from ..models.introspection import recording_structure
from ..progress import ProgressEvent, report_progress
from ..results import Result
from ..roles import model_for_inputs
from ..targets import Objective, ObjectiveClassifier
from .side_effects import is_first_use, record_side_effects

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

    def attacked_models(self, method: Method[..., Any]) -> list[Model] | None:
        """Of an attack on an objective the classifier of it for each image; None for labels of classes."""
        labels, images = method.spec.input("labels"), method.spec.input("images")
        if labels is None or images is None or not isinstance(self.inputs[labels.name], Objective):
            return None
        objective, pixels = self.inputs[labels.name], self.inputs[images.name]
        with self.model.guard():
            return [
                ObjectiveClassifier.view(self.model, objective.select([n]), pixels[n : n + 1])
                for n in range(len(pixels))
            ]

    def logits(self, method: Method[..., Any], images: Tensor) -> Tensor:
        """The logits (N, K) of the classes that an attack changes, one row for each of the case's images."""
        views = self.attacked_models(method)
        with self.model.guard(), torch.no_grad():
            if views is None:
                return self.model(images)
            return torch.cat([view(images[n : n + 1]) for n, view in enumerate(views)])


class Observations(dict["Case", "Observation"]):
    """Observations by case; the oldest are dropped where all results need more than ``most`` bytes."""

    def __init__(self, most: int = 2**31) -> None:
        super().__init__()
        self._most, self._bytes = most, 0

    def __setitem__(self, case: Case, observation: Observation) -> None:
        super().__setitem__(case, observation)
        self._bytes += _result_bytes(observation)
        while self._bytes > self._most and len(self) > 1:
            self._bytes -= _result_bytes(self.pop(next(iter(self))))


def _result_bytes(observation: Observation) -> int:
    return sum(tensor.nbytes for _, tensor in tensors_in(observation.result))


#: Networks, other than the first, whose structure was recorded in a run that was observed: see ``_observe``.
_recorded_networks: set[tuple[str, str | None, bool]] = set()


def observe(method: Method[..., Any], case: Case) -> Observation:
    """Run a case once and record everything observable about it."""
    imported = set(sys.modules)
    observation = _observe(method, case)
    if is_first_use(observation.side_effects, imported):
        observation = _observe(method, case)
    return observation


def _observe(method: Method[..., Any], case: Case) -> Observation:
    # Recording the structure is a part of the run that is observed: of every method on the first network, and
    # of the first method on any other one. It takes longer than most runs.
    network = (case.network, case.precision, case.double)
    model = case.model(recorded=network in _recorded_networks)
    if case.network != type(case)().network:
        _recorded_networks.add(network)
    try:
        inputs = case.inputs(method, model)
    except PhospheneError as refusal:  # an output from which no input can be made, such as labels
        return Observation(case, model, {}, {}, refusal=refusal)
    tensors_before = {name: tensor.clone() for name, tensor in input_tensors(inputs).items()}
    run = Observation(case, model, inputs, tensors_before)
    before, clock = state_of(model), time.perf_counter()
    with (
        record_side_effects(run.side_effects),
        count_passes(model.module, model) as run.passes,
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
    """Record the model's structure at the inputs' size, where another pass would be the method's."""
    sized = model_for_inputs(model, inputs)
    with contextlib.suppress(PhospheneError):  # refusing a size is left to the method
        sized.structure  # type: ignore[union-attr]  # noqa: B018


#: Attributes of a ``Model`` that are computed at their first use, and its cache of computed values.
_COMPUTED = frozenset(("_cache", "layers", "vgg_layer_aliases"))


def state_of(model: Model) -> dict[str, dict[Any, Any]]:
    """Everything about a model that a method must leave unchanged."""
    module = model.module
    saved = module.state_dict()
    return {
        "the Model's attributes": {
            name: _snapshot(value) for name, value in vars(model).items() if name not in _COMPUTED
        },
        "the weights": {n: t.detach().clone() for n, t in saved.items()},
        "the buffers": {n: t.detach().clone() for n, t in module.named_buffers() if n not in saved},
        "the parameters": {
            n: (p.data_ptr(), p.requires_grad, p.dtype, p.device, id(p), sorted(vars(p)), _hooks_of(p))
            for n, p in module.named_parameters()
        },
        "the gradients": {
            n: p.grad if p.grad is None else p.grad.clone() for n, p in module.named_parameters()
        },
        "the training mode": {n: part.training for n, part in module.named_modules()},
        "the modules": {
            n: (id(part), type(part), part.__dict__.get("forward")) for n, part in module.named_modules()
        },
        "the hooks": {
            (name, kind): list(getattr(part, kind))
            for name, part in module.named_modules()
            for kind in vars(part)
            if kind.endswith("_hooks")
        },
        "the attributes": {
            (name, attribute): _snapshot(value)
            for name, part in module.named_modules()
            for attribute, value in vars(part).items()
            if not attribute.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
            and attribute not in ("_parameters", "_buffers", "_modules", "training", "forward")
        },
    }


def _hooks_of(parameter: Tensor) -> tuple[Any, ...]:
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return tuple(list(getattr(parameter, kind, None) or ()) for kind in kinds)


def _snapshot(value: Any) -> Any:
    """A value that changes of the original in place do not change, as far as it is plain data."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, dict, set)):
        return copy.copy(value)
    return value


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
    #: Images that went backward through the last layer: a gradient of an inner layer stops above the first.
    from_output: int = 0
    #: The most images in one pass.
    largest: int = 0
    #: The range of the pixels, before normalization, and whether all were finite.
    lowest: float = math.inf
    highest: float = -math.inf
    finite: bool = True


def _first_layer(module: nn.Module) -> nn.Module:
    return next((p for p in module.modules() if isinstance(p, (nn.Conv2d, nn.Linear))), module)


@contextmanager
def count_passes(module: nn.Module, model: Model | None = None) -> Iterator[Passes]:
    """Count the passes through a network inside this block; with its ``model``, record the pixels as well.

    Passes that record the network's structure are not counted.
    """
    passes = Passes()

    def start(_: nn.Module, args: Any) -> None:
        if recording_structure.get():
            return  # once for each image size, before the method's own passes
        passes.started += 1
        if args and isinstance(args[0], Tensor) and args[0].ndim == 4 and args[0].numel():
            passes.largest = max(passes.largest, len(args[0]))
            if model is not None:
                record_pixels(args[0].detach(), model)

    def record_pixels(normalized: Tensor, model: Model) -> None:
        mean, std = (t.to(normalized)[:, None, None] for t in (model.mean, model.std))
        low, high = (float(v) for v in (normalized * std + mean).aminmax())
        passes.finite &= math.isfinite(low) and math.isfinite(high)
        passes.lowest, passes.highest = min(passes.lowest, low), max(passes.highest, high)

    def finish(_: nn.Module, args: Any, output: Any) -> None:
        if recording_structure.get():
            return
        tensor = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            count = len(tensor)

            def backward(_: Tensor) -> None:
                passes.from_output += count

            tensor.register_hook(backward)

    def forward(_: nn.Module, args: Any, output: Tensor) -> None:
        if recording_structure.get():
            return
        count = len(output)
        passes.forward += count

        def backward(_: Tensor) -> None:
            passes.backward += count

        if output.requires_grad:
            output.register_hook(backward)

    handles = [
        module.register_forward_pre_hook(start),
        module.register_forward_hook(finish),
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


@functools.cache
def _is_program_frozen() -> bool:
    """Whether the program has frozen its objects. Counting them is slow: it is asked once."""
    return gc.get_freeze_count() > 0


@contextmanager
def new_tensors() -> Iterator[Callable[[], int]]:
    """A function that counts the live tensors created since the block started."""

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    frozen = _is_program_frozen()
    gc.freeze()  # objects from before are neither scanned nor counted
    try:
        yield count
    finally:
        gc.unfreeze()
        if frozen:  # by the program, such as a test run with many tests
            gc.freeze()


# --- results ---------------------------------------------------------------------------------


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation of two tensors of one shape; 1 where both are constant, 0 where one is."""
    values = [tensor.detach().flatten().double() for tensor in (one, other)]
    constant = [bool((v == v[0]).all()) for v in values]
    if any(constant):
        return float(all(constant))
    ranks = torch.stack([_ranks(v) for v in values])
    return float(torch.corrcoef(ranks)[0, 1])


def mean_rank_correlation(maps: Tensor, others: Tensor) -> float:
    """The mean over images of the rank correlation of two maps of one shape."""
    return sum(map(rank_correlation, maps, others)) / len(maps)


def _ranks(values: Tensor) -> Tensor:
    """The rank of each value, equal ones with their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[inverse]


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


def _with_close_numbers(value: Any, reference: Any, rtol: float, atol: float) -> Any:
    """A value of ``without_tensors`` in which numbers that are close to those of the reference are these."""
    match value, reference:
        case Mapping(), Mapping():
            return {n: _with_close_numbers(v, reference.get(n), rtol, atol) for n, v in value.items()}
        case list(), list() if len(value) == len(reference):
            return [_with_close_numbers(v, r, rtol, atol) for v, r in zip(value, reference, strict=True)]
        case float(), float() if math.isclose(value, reference, rel_tol=rtol, abs_tol=atol):
            return reference
    return value


def assert_same_result(first: Any, second: Any, *, rtol: float = 0, atol: float = 0) -> None:
    """Assert that two results are equal in all fields: bit for bit, or within tolerances."""
    one, other = without_tensors(first), without_tensors(second)
    assert one == _with_close_numbers(other, one, rtol, atol), f"{one} against {other}"
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
