"""``PreparedRun``: a method with its inputs read and its parameters checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.datasets import Dataset
from ..models.batch_size import max_batch
from ..models.digest import checksum
from ..progress import ProgressEvent, report_progress
from ..registry.lookup import methods
from ..registry.method import AS_OBJECT
from ..results import Result
from ..targets.objectives import Custom, Direction


@dataclass(frozen=True)
class PreparedRun:
    """One request: a method, its finished inputs and its parameters, as observers and executors see it."""

    method: str
    inputs: Mapping[str, Any]
    params: Mapping[str, Any]
    batch_size: int | None = None
    progress: bool | None | Callable[[ProgressEvent], None] = field(default=None, repr=False)

    def execute_locally(self) -> Result:
        """Carry it out in this process."""
        with max_batch(self.batch_size), report_progress(self.progress):
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
        owner, kept = method.spec.input("model"), method.record_inputs(inputs)
        anonymous = any(isinstance(value, (Custom, Direction)) for value in inputs.values())
        if anonymous or any(str(value).endswith(AS_OBJECT) for value in kept.values()):
            return None
        told = {n: checksum(v) if isinstance(v, Tensor) else v for n, v in kept.items()}
        told |= {f"{n}'s size": len(v) for n, v in inputs.items() if isinstance(v, Dataset)}
        written = method.spec.params(**params).model_dump(mode="json")
        digest = inputs[owner.name].digest if owner else None
        parts = [method.spec.name, method.distribution, written, told, digest]
        return hashlib.sha256(json.dumps(parts, default=repr).encode()).hexdigest()

    def produced(self, saved: Result) -> bool:
        """Whether a saved result is this run's: of the same method, parameters, inputs and model.

        Any seed will do where this run names none; of a data set only the name is known.
        """
        method, was = methods[self.method], saved.provenance
        if was is None or (was.method, was.distribution) != (method.spec.name, method.distribution):
            return False
        inputs, params = method.check(self.inputs, self.params)
        if method.seed and params[method.seed] is None:
            params[method.seed] = was.seed
        owner, kept = method.spec.input("model"), method.record_inputs(inputs)
        return (
            was.interrupted is None
            and was.params == method.spec.params(**params).model_dump(mode="json")
            and (was.model and was.model["digest"]) == (inputs[owner.name].digest if owner else None)
            and saved.inputs.keys() == kept.keys()
            and not any(isinstance(value, (Custom, Direction)) for value in inputs.values())
            and all(same_input(value, saved.inputs[name]) for name, value in kept.items())
        )


def same_input(value: Any, saved: Any) -> bool:
    """Whether an input is the recorded one; of one that was given as an object nobody can say."""
    if isinstance(value, Tensor) and isinstance(saved, Tensor):
        return torch.equal(value.cpu(), saved.cpu())
    told = [json.dumps(item, default=repr) for item in (value, saved)]
    return told[0] == told[1] and not str(value).endswith(AS_OBJECT)
