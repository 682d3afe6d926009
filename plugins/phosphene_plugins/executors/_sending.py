"""What is sent to other processes: checked before work starts, and packed with its tensors."""

from __future__ import annotations

import io
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cloudpickle
import torch

from phosphene import InputError, PhospheneError, PreparedRun
from phosphene.errors import value_repr

#: How often a shard is computed whose worker dies.
ATTEMPTS = 3


def pack(value: Any) -> bytes:
    """A value as bytes, its tensors as ``torch.save`` writes them."""
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=cloudpickle)
    return buffer.getvalue()


def unpack(data: bytes) -> Any:
    """The value that ``pack`` packed in a process of this run."""
    return torch.load(io.BytesIO(data), weights_only=False)


def describe_error(error: Exception) -> Exception:
    """An error of a worker as it is sent back: with its traceback, and as text where it cannot be pickled."""
    trace = "".join(traceback.format_exception(error))
    if not isinstance(error, PhospheneError):
        error.add_note(f"In the worker process:\n{trace}")
    try:
        unpack(pack(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__} in a worker process: {error}\n{trace}")
    return error


def sent_inputs(run: PreparedRun) -> dict[str, Any]:
    """The inputs that work over a run's data set may send to another process; none without a data set."""
    spec = run.implementation.spec
    images = spec.input("images")
    if spec.input("dataset") is None:
        return {}
    return {n: value for n, value in run.inputs.items() if images is None or n != images.name}


def check_sendable(inputs: Mapping[str, Any], executor: str) -> None:
    """Raise InputError for a model, a data set or another input that another process cannot receive."""
    for name, value in inputs.items():
        if (error := pickle_error(value)) is not None:
            path, part, error = _unpicklable_part(name, value, error)
            raise InputError(
                f"{path} ({value_repr(part)}) cannot be sent to the processes of executor={executor!r}: "
                f"{error}. Open files, connections and locks when they are used, as in a data set's read, or "
                "leave them out of the object's state by __getstate__; executor='local' sends nothing"
            )


def _unpicklable_part(path: str, value: Any, error: Exception) -> tuple[str, Any, Exception]:
    """The smallest part of a value that cannot be pickled: its path, itself and the error."""
    visited = {id(value)}
    while True:
        for name, part in _parts(value):
            if id(part) in visited:
                continue
            visited.add(id(part))
            if (part_error := pickle_error(part)) is not None:
                path, value, error = path + name, part, part_error
                break
        else:
            return path, value, error


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """The attributes or items of a value, with their paths."""
    if isinstance(value, torch.nn.Module):
        yield from ((f".{name}", part) for name, part in value.named_children())
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        yield from ((f"[{n}]", part) for n, part in enumerate(value))
    yield from ((f".{name}", part) for name, part in getattr(value, "__dict__", {}).items())


def pickle_error(value: Any) -> Exception | None:
    """The error of pickling a value, whose tensors and arrays are left out; None where there is none."""
    try:
        _StructurePickler(_Nowhere(), protocol=5, buffer_callback=lambda buffer: None).dump(value)
    except Exception as error:  # ``__reduce__`` of any class may raise anything
        return error
    return None


class _Nowhere(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data)


class _StructurePickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles everything but the storages of tensors."""

    def persistent_id(self, value: Any) -> str | None:
        is_storage = isinstance(value, (torch.storage.TypedStorage, torch.UntypedStorage))
        return "storage" if is_storage else None
