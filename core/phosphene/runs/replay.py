"""``replay``: run a saved result again and compare."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models import Model, load_model
from ..registry.lookup import methods
from ..registry.method import AS_OBJECT
from ..results import Result, load_result
from .prepare import move_to_device
from .run import run


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
        model = move_to_device(model, was.device, getattr(torch, was.dtype))
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
    if was.model and now.model and was.model.get("input_size") not in (None, now.model["input_size"]):
        changed.append("the model's input size")
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
