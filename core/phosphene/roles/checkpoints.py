"""The role ``checkpoints``: weights of a model at several times of its training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor

from ..errors import InputError, type_name
from ..models import Model as _Model
from ..models import fill_weights, read_weights
from ..models.digest import checksum
from ..results import TrainedNetwork
from ..spec.spec import Role
from .base import AS_OBJECT, InputContext, InputRole, SampleRequest


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The weights of a network: a state dict, and the file that it was read from, if any."""

    weights: Mapping[str, Tensor]
    file: str | None = None

    def load_into(self, model: _Model) -> None:
        """Load the weights into a model's network. Raises ModelError where they do not fit."""
        fill_weights(model.module, self.weights, self.file or "passed as a state dict", model.name)


#: Weights of the model at several times of its training; None where its own weights are the only ones.
Checkpoints: TypeAlias = Annotated[tuple[Checkpoint, ...] | None, Role("checkpoints")]


class CheckpointsRole(InputRole):
    """Checkpoints of the model; default: none, its own weights alone."""

    name, value_type, size_name = "checkpoints", tuple, "checkpoints"
    metavar = "FILE|FOLDER"
    description = "weights of the model: files, folders of trainings, state dicts, or a list of these"
    help = "weights (.safetensors, .pth) or folder of a training, repeatable (default: the model's own)"

    def read(self, value: Any, context: InputContext) -> Any:
        """Files, folders of weights files (in the order of their names), state dicts, trainings.

        A training is a folder of a result: all checkpoints that it stored, "folder#2" the second of them, or
        its final weights where it stored none.
        """
        if value is None:
            return None
        single = isinstance(value, (str, os.PathLike, Mapping, Checkpoint, TrainedNetwork))
        items = [value] if single else value
        if not isinstance(items, Sequence) or not items:
            raise InputError(f"checkpoints are weights files or state dicts, not {type_name(value)}")
        return tuple(checkpoint for item in items for checkpoint in _read_item(item))

    def check(self, value: Any, context: InputContext) -> tuple[Checkpoint, ...] | None:
        if value is None:
            return None
        if (
            not isinstance(value, tuple)
            or not value
            or not all(isinstance(item, Checkpoint) for item in value)
        ):
            value = self.read(value, context)
        if context.model is None:
            raise InputError("checkpoints need a model: declare the model before them")
        copied = context.model.copy()
        for checkpoint in value:
            checkpoint.load_into(copied)
        checked: tuple[Checkpoint, ...] = value
        return checked

    def record(self, value: tuple[Checkpoint, ...] | None) -> Any:
        """The files; weights in memory are recorded as an object."""
        if value is None:
            return None
        files = [checkpoint.file for checkpoint in value]
        return f"{len(files)} state dicts {AS_OBJECT}" if None in files else files

    def is_identified(self, value: Any) -> bool:
        return True

    def fingerprint(self, value: tuple[Checkpoint, ...] | None) -> Any:
        if value is None:
            return None
        return [{n: f"{checksum(t):08x}" for n, t in sorted(c.weights.items())} for c in value]

    def sample(self, request: SampleRequest) -> tuple[Checkpoint, ...]:
        """The model's weights, and the same scaled by 0.9."""
        weights = {
            name: tensor.detach().clone() for name, tensor in request.model.module.state_dict().items()
        }
        scaled = {n: t * 0.9 if t.is_floating_point() else t for n, t in weights.items()}
        return Checkpoint(weights), Checkpoint(scaled)

    def bad_values(self, good: Any, context: InputContext) -> Iterator[tuple[str, Any]]:
        yield "a file that does not exist", "somewhere"
        yield "weights of another network", {"no_such_weight": torch.zeros(1)}
        yield "no checkpoints", ()


def _read_item(item: Any) -> Iterator[Checkpoint]:
    """The checkpoints of one item: one, or those of a folder of weights files."""
    if isinstance(item, Checkpoint):
        yield item
    elif isinstance(item, TrainedNetwork):
        folder = None if item.uri is None else str(Path(item.uri).resolve())
        if not item.checkpoints:
            yield Checkpoint(item.network.state_dict(), folder)
        for number, weights in enumerate(item.checkpoints, start=1):
            yield Checkpoint(weights, None if folder is None else f"{folder}#{number}")
    elif isinstance(item, Mapping):
        if not item or not all(isinstance(value, Tensor) for value in item.values()):
            raise InputError("a state dict is a mapping of names to tensors")
        yield Checkpoint(item)
    elif isinstance(item, (str, os.PathLike)):
        path = Path(item).resolve()
        training, chosen = (path, None) if path.exists() else _numbered(path)
        if (training / "result.json").is_file():
            yield from _of_training(training, chosen)
            return
        if path.is_dir():
            files = sorted(path.glob("*.safetensors"))
            if not files:
                raise InputError(f"{path} holds neither a result nor weights (.safetensors)")
        else:
            files = [path]
        for file in files:
            yield Checkpoint(read_weights(file), str(file))
    else:
        raise InputError(
            f"checkpoints are weights files, folders of trainings or state dicts, not {type_name(item)}"
        )


def _numbered(path: Path) -> tuple[Path, int | None]:
    """The folder and the number of "folder#2", the second checkpoint of a training; else path and None."""
    name, mark, number = path.name.rpartition("#")
    return (path.with_name(name), int(number)) if name and mark and number.isdecimal() else (path, None)


def _of_training(folder: Path, number: int | None) -> Iterator[Checkpoint]:
    """The checkpoints that a training stored with its result, or one of them; else its final weights."""
    arrays = read_weights(folder / "arrays.safetensors")
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in arrays.items():
        if name.startswith("checkpoints."):
            _, position, weight = name.split(".", 2)
            states.setdefault(int(position) + 1, {})[weight] = tensor
    if number is not None and number not in states:
        raise InputError(f"the training in {folder} stored {len(states)} checkpoints, there is no #{number}")
    if not states:
        yield Checkpoint(read_weights(folder), str(folder))
    for index in sorted(states) if number is None else [number]:
        yield Checkpoint(states[index], f"{folder}#{index}")


CHECKPOINTS = CheckpointsRole()
