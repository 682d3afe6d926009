"""``replay``: run a saved result again and compare."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, type_name
from ..models import Model, load_saved_model, refuse_user_code
from ..registry.lookup import methods
from ..results import Provenance, Result, ResultSequence, ResultStream
from ..roles import AS_OBJECT
from .prepare import move_to_device
from .run import run
from .saved_results import load_result

#: The arguments of ``run`` that are no input and no parameter of a method.
_RUN_ARGUMENTS = inspect.signature(run).parameters.keys() - {"arguments"}


@dataclass(frozen=True)
class Replay:
    """A saved result, the result of running it again, and the largest difference of each field."""

    saved: Result
    result: Result
    differences: dict[str, float]
    changed: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether every tensor is bit for bit the same."""
        return not any(self.differences.values())

    def __str__(self) -> str:
        if self.same:
            return "the same, bit for bit"
        differences = ", ".join(f"{n} by up to {d:.3g}" for n, d in self.differences.items() if d)
        changed = f"; changed since then: {', '.join(self.changed)}" if self.changed else ""
        return f"different: {differences}{changed}"


def replay(folder: str | os.PathLike[str], *, model: Model | None = None) -> Replay:
    """Run a saved result again and compare. ``model`` is required if it was passed as an object.

    Raises InputError for a result without provenance, and where an input or the model cannot be restored.
    """
    saved = load_result(folder)
    if isinstance(saved, ResultSequence):
        raise InputError(
            f"{folder} holds a result for each of {len(saved)} images: run one of them again, "
            f"{ResultSequence.subfolder(folder, 0)}"
        )
    provenance = saved.provenance
    if provenance is None:
        raise InputError(f"the result in {folder} has no provenance, so it cannot be run again")
    if isinstance(saved, ResultStream):
        raise InputError(
            f"{folder} is a stream of {len(saved):,} results, and a stream is not replayed: run it again "
            "into another folder and compare the two"
        )
    if missing := provenance.inputs.keys() - saved.inputs.keys():
        names = ", ".join(sorted(missing))
        raise InputError(
            f"the result in {folder} is part of a stream or of a larger result, without the inputs ({names}) "
            "of its own, so it cannot be run again"
        )
    # Several distributions may have a method of this name; the one that computed the result comes first.
    name = f"{provenance.distribution.partition(' ')[0]}:{provenance.method}"
    name = name if name in methods else provenance.method
    spec = methods[name].spec
    others = [declared.name for declared in spec.inputs if declared.role != "model"]
    _refuse_undeclared("input", saved.inputs, others, spec.name)
    _refuse_undeclared("parameter", provenance.params, spec.params.model_fields, spec.name)
    if model is None and provenance.model is not None:
        model = _saved_model(provenance)
    for key, value in saved.inputs.items():
        if isinstance(value, str) and value.endswith(AS_OBJECT):
            raise InputError(f"the input {key!r} was {value}, so it is not saved and cannot be restored")
    declared_model = spec.input("model")
    models: dict[str, Any] = {declared_model.name: model} if declared_model and model is not None else {}
    how: dict[str, Any] = {
        "batch_size": provenance.batch_size,
        "device": None if provenance.model else provenance.device,
        "progress": False,
    }
    if (processes := provenance.processes) != 1:
        cores = os.cpu_count() or 1
        if not 1 <= processes <= cores:
            raise InputError(
                f"the result was trained by {processes} processes, and this machine has {cores} cores: run "
                f"it again with executor='processes:{processes}'"
            )
        how["executor"] = f"processes:{processes}"
    with refuse_user_code():  # parameters of the saved result may name further models
        again = run(name, **how, **saved.inputs, **models, **provenance.params)
    now = again.provenance
    assert now is not None
    versions = provenance.versions
    changed = [f"{k} {versions.get(k)} -> {v}" for k, v in now.versions.items() if versions.get(k) != v]
    if provenance.model and now.model and provenance.model.get("digest") != now.model["digest"]:
        changed.append("the model's weights")
    sizes = [(origin.model or {}).get("input_size") for origin in (provenance, now)]
    if None not in sizes and sizes[0] != sizes[1]:
        changed.append("the model's input size")
    if provenance.interrupted != now.interrupted:
        ends = " -> ".join(end or "complete" for end in (provenance.interrupted, now.interrupted))
        changed.append(f"where it ended ({ends})")
    return Replay(saved, again, _differences(saved, again), tuple(changed))


def _refuse_undeclared(kind: str, values: Mapping[str, Any], declared: Collection[str], method: str) -> None:
    """Raise InputError for what is no input or parameter, such as ``out``: ``run`` would obey it.

    The names of ``run``'s own arguments are refused also where a method declares one of them.
    """
    for name in values:
        if name not in declared or name in _RUN_ARGUMENTS:
            names = ", ".join(declared) or "none"
            raise InputError(f"the saved result has an invalid {kind} {name!r:.80}; {method} has {names}")


def _saved_model(provenance: Provenance) -> Model:
    """The model of a result from its source, on the device and in the precision that it had."""
    record, dtype = provenance.model or {}, getattr(torch, provenance.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"the saved precision {provenance.dtype!r:.80} is no floating-point type of torch")
    source = record.get("source")
    if source is None:
        raise InputError(
            f"the model ({record.get('name')}) was passed as an object: pass it here, too, "
            "replay(folder, model=...)"
        )
    if not isinstance(source, Mapping):
        raise InputError(f"the saved source of the model is {type_name(source)}, not a mapping")
    model: Model = move_to_device(load_saved_model(source), provenance.device, dtype)
    return model


def _differences(saved: Result, again: Result) -> dict[str, float]:
    """The largest absolute difference of each tensor; infinity where one is missing or of another shape."""
    old, new = _tensors(saved), _tensors(again)
    differences = dict.fromkeys(old.keys() | new.keys(), float("inf"))
    for name in old.keys() & new.keys():
        if old[name].shape == new[name].shape:
            difference = (old[name].double() - new[name].double()).abs()
            differences[name] = float(difference.max()) if difference.numel() else 0.0
    return differences


def _tensors(result: Result) -> dict[str, Tensor]:
    """A result's tensors by name, the weights of trained networks included."""
    tensors: dict[str, Tensor] = {}
    for name, value in result.fields():
        state = value.state_dict() if isinstance(value, nn.Module) else {"": value}
        tensors |= {f"{name}.{k}".rstrip("."): t.cpu() for k, t in state.items() if isinstance(t, Tensor)}
    return tensors
