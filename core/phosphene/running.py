"""``run``: a method by name, its inputs made from paths, names and URIs, observed, saved - and run again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .bars import ProgressEvent, reporting
from .batching import max_batch
from .checkpoints import Checkpoint, checkpointed, unfinished
from .datasets import Dataset
from .declaration import AS_OBJECT
from .errors import InputError, UnknownName
from .inputs import ROLES
from .interrupts import stopping_early
from .models import Model, load_model
from .models.twin import checksum
from .registry import extensions, methods
from .results import Result, TrainedNetwork, check_place, load_result
from .targets import Custom, Direction


@dataclass(frozen=True)
class Run:
    """One request: a method, its finished inputs and its parameters, as observers and executors see it."""

    method: str
    inputs: Mapping[str, Any]
    params: Mapping[str, Any]
    batch_size: int | None = None
    progress: bool | None | Callable[[ProgressEvent], None] = field(default=None, repr=False)

    def here(self) -> Result:
        """Carry it out in this process."""
        with max_batch(self.batch_size), reporting(self.progress):
            result: Result = methods[self.method](**self.inputs, **self.params)
            return result

    def passes(self) -> tuple[int, int] | None:
        """How many images will go forward and backward, as the method declares; None where it does not."""
        method = methods[self.method]
        return method.passes(*method.check(self.inputs, self.params))

    def identity(self) -> str | None:
        """A digest of the method, its parameters, inputs and model; None where an input is only an object."""
        method = methods[self.method]
        inputs, params = method.check(self.inputs, self.params)
        owner, kept = method.spec.input("model"), method.kept(inputs)
        anonymous = any(isinstance(value, (Custom, Direction)) for value in inputs.values())
        if anonymous or any(str(value).endswith(AS_OBJECT) for value in kept.values()):
            return None
        told = {n: checksum(v) if isinstance(v, Tensor) else v for n, v in kept.items()}
        told |= {f"{n}'s size": len(v) for n, v in inputs.items() if isinstance(v, Dataset)}
        written = method.spec.params(**params).model_dump(mode="json")
        digest = inputs[owner.name].digest if owner else None
        parts = [method.spec.name, method.distribution, written, told, digest]
        return hashlib.sha256(json.dumps(parts, default=repr).encode()).hexdigest()

    def gave(self, saved: Result) -> bool:
        """Whether a saved result is this run's: of the same method, parameters, inputs and model.

        Any seed will do where this run names none; of a data set only the name is known.
        """
        method, was = methods[self.method], saved.provenance
        if was is None or (was.method, was.distribution) != (method.spec.name, method.distribution):
            return False
        inputs, params = method.check(self.inputs, self.params)
        if method.seed and params[method.seed] is None:
            params[method.seed] = was.seed
        owner, kept = method.spec.input("model"), method.kept(inputs)
        return (
            was.interrupted is None
            and was.params == method.spec.params(**params).model_dump(mode="json")
            and (was.model and was.model["digest"]) == (inputs[owner.name].digest if owner else None)
            and saved.inputs.keys() == kept.keys()
            and not any(isinstance(value, (Custom, Direction)) for value in inputs.values())
            and all(_same(value, saved.inputs[name]) for name, value in kept.items())
        )


def _same(value: Any, saved: Any) -> bool:
    """Whether an input is the recorded one; of one that was given as an object nobody can say."""
    if isinstance(value, Tensor) and isinstance(saved, Tensor):
        return torch.equal(value.cpu(), saved.cpu())
    told = [json.dumps(item, default=repr) for item in (value, saved)]
    return told[0] == told[1] and not str(value).endswith(AS_OBJECT)


def prepare(
    name: str,
    *,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: bool | None | Callable[[ProgressEvent], None] = None,
    executor: str = "local",
    **arguments: Any,
) -> Run:
    """What ``run`` does before the work: the method found, inputs made, everything checked, nothing run.

    The ``Run`` foretells its cost (``passes()``) and knows its result when it sees it (``gave(saved)``).
    """
    method = methods[name]
    if executor not in (known := _executors()):
        raise UnknownName("executor", executor, known)
    names = {i.name for i in method.spec.inputs}
    params = {n: v for n, v in arguments.items() if n not in names}
    method.validate(params)  # before a model is fetched for nothing
    made: dict[str, Any] = {}
    model: Model | None = None
    # The model itself may be asked what a picture shows; and what is made in inference mode stays so.
    with max_batch(batch_size), torch.inference_mode(False):
        for declared in method.spec.inputs:
            fitting = None if declared.own_size else model
            made[declared.name] = ROLES[declared.role].make(arguments.get(declared.name), fitting, made)
            if declared.role == "model":
                model = made[declared.name]
            made[declared.name] = _moved(made[declared.name], device)
        made, _ = method.check(made, params)
    return Run(name, made, params, batch_size, progress)


def run(
    name: str,
    *,
    out: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: bool | None | Callable[[ProgressEvent], None] = None,
    executor: str = "local",
    **arguments: Any,
) -> Result:
    """Run a method by name, its inputs as a person writes them; the bundled world gives what is left out.

    ``arguments`` are the method's inputs and parameters: a model as a ``Model`` or a URI, images as
    a tensor, a path, several, a folder or ``builtin:scenes/8``, a target as ``"tabby"`` or
    ``"layer4[17]"``, a data set as a folder. ``out``: a folder to save the result in; long work
    that was cut off goes on where it was when it is given the same one again. ``batch_size``: at
    most so many images at once. ``progress``: False for silence, a callable for events. ``executor``:
    where it is carried out, "local" or a plugin's.

    Ctrl-C ends what is drawn step by step early, and the result is as it stood then
    (``provenance.interrupted`` says where); a second one, and any in other work, is a KeyboardInterrupt.
    """
    if out is not None:
        check_place(out)
    how: dict[str, Any] = {"device": device, "batch_size": batch_size, "progress": progress}
    request = prepare(name, executor=executor, **how, **arguments)
    identity = None if out is None else request.identity()
    with ExitStack() as stack:
        checkpoint = None
        if out is not None and identity is not None:
            checkpoint = Checkpoint(unfinished(out), identity)
            stack.enter_context(checkpointed(stack.enter_context(checkpoint)))
        stop = stack.enter_context(stopping_early())
        result = observed(request, _executors()[executor])
        if checkpoint is not None:
            checkpoint.unfinished = stop.told is not None
        if out is not None:
            result.save(out)
        return result


def _executors() -> dict[str, Callable[[Run], Result]]:
    """Where runs can be carried out, by name."""
    return {"local": Run.here, **extensions.gather("phosphene_executors")}


def _moved(value: Any, device: str | torch.device | None, dtype: torch.dtype | None = None) -> Any:
    """An input where the method is to run: a tensor, or the network that it is or has; all else as it is."""
    try:
        match value:
            case Model(module=network) | TrainedNetwork(network=network) | (nn.Module() as network):
                network.to(device, dtype)
            case Tensor():
                return value.to(device)
    except (RuntimeError, AssertionError) as error:  # as torch says that it has no such device
        what = "inputs" if isinstance(value, Tensor) else "model"
        raise InputError(f"the {what} cannot be brought to {str(device)!r}: {error}") from error
    return value


def observed(request: Run, execute: Callable[[Run], Result]) -> Result:
    """Carry out a run and tell every observer of its start and its end."""
    extensions.notify("phosphene_before_run", run=request)
    try:
        result = execute(request)
    except BaseException as error:
        extensions.notify("phosphene_after_run", run=request, result=None, error=error)
        raise
    extensions.notify("phosphene_after_run", run=request, result=result, error=None)
    return result


@dataclass(frozen=True)
class Replay:
    """A result made again beside the saved one: the same bits, or how far apart, field by field."""

    saved: Result
    result: Result
    differences: dict[str, float]
    changed: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether every tensor came out bit for bit."""
        return not any(self.differences.values())

    def __str__(self) -> str:
        if self.same:
            return "the same, bit for bit"
        worst = ", ".join(f"{n} by up to {d:.3g}" for n, d in self.differences.items() if d)
        return f"different: {worst}" + (
            f"; since then {', '.join(self.changed)} changed" if self.changed else ""
        )


def replay(folder: str | os.PathLike[str], *, model: Model | None = None) -> Replay:
    """Run a saved result again and compare. ``model`` is needed where it was given as an object."""
    saved = load_result(folder)
    was = saved.provenance
    if was is None:
        raise InputError(f"{folder} does not say how it was made")
    if model is None and was.model is not None:
        if was.model["source"] is None:
            raise InputError(
                f"the model ({was.model['name']}) was given as an object; say replay(folder, model=...)"
            )
        source = dict(was.model["source"])
        model = load_model(source.pop("uri"), **source)
        model = _moved(model, was.device, getattr(torch, was.dtype))
    for name, value in saved.inputs.items():
        if isinstance(value, str) and value.endswith(AS_OBJECT):
            raise InputError(f"the input {name!r} was {value}, which a folder does not hold")
    arguments = dict(saved.inputs) | ({"model": model} if model is not None else {})
    # Of several methods of one name, the one of the distribution that made it.
    name = f"{was.distribution.partition(' ')[0]}:{was.method}"
    name = name if name in methods else was.method
    device = None if was.model else was.device
    again = run(name, batch_size=was.batch_size, device=device, progress=False, **arguments, **was.params)
    now = again.provenance
    assert now is not None
    changed = [
        f"{k} {was.versions.get(k)} -> {v}" for k, v in now.versions.items() if was.versions.get(k) != v
    ]
    if was.model and now.model and was.model["digest"] != now.model["digest"]:
        changed.append("the model's weights")
    if was.interrupted != now.interrupted:
        changed.append(f"how far it went ({was.interrupted or 'whole'} -> {now.interrupted or 'whole'})")
    return Replay(saved, again, _differences(saved, again), tuple(changed))


def _differences(saved: Result, again: Result) -> dict[str, float]:
    """How far apart each tensor is at most; infinity where one is missing or of another shape."""
    old, new = _tensors(saved), _tensors(again)
    found = dict.fromkeys(old.keys() | new.keys(), float("inf"))
    for name in old.keys() & new.keys():
        if old[name].shape == new[name].shape:
            apart = (old[name].double() - new[name].double()).abs()
            found[name] = float(apart.max()) if apart.numel() else 0.0
    return found


def _tensors(result: Result) -> dict[str, Tensor]:
    """A result's tensors, the weights of trained networks among them."""
    found: dict[str, Tensor] = {}
    for name, value in result.fields():
        state = value.state_dict() if isinstance(value, nn.Module) else {"": value}
        found |= {f"{name}.{k}".rstrip("."): t.cpu() for k, t in state.items() if isinstance(t, Tensor)}
    return found
