"""``PreparedRun``: a method with its inputs read and its parameters checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..models.batch_size import max_batch
from ..progress import ProgressEvent, report_progress
from ..registry.lookup import methods
from ..registry.method import Method
from ..results import Result
from ..roles import AS_OBJECT, ROLES


@dataclass(frozen=True)
class PreparedRun:
    """One request, as observers and executors receive it: everything is checked, nothing has run.

    ``method`` is its name, ``inputs`` the finished inputs by name, ``params`` the parameters as they were
    passed, ``complete_params`` with the defaults. ``files`` are those of the images, where all were files.
    ``implementation`` is the ``Method``; when a run is pickled, it is looked up again by its name.
    """

    method: str
    inputs: Mapping[str, Any]
    params: Mapping[str, Any]
    batch_size: int | None = None
    progress: bool | None | Callable[[ProgressEvent], None] = field(default=None, repr=False)
    executor: str = "local"
    files: tuple[str, ...] = ()
    implementation: Method[..., Any] = field(kw_only=True, repr=False)
    complete_params: Mapping[str, Any] = field(kw_only=True, repr=False)

    def execute_locally(self) -> Result:
        """Run it in this process."""
        with max_batch(self.batch_size), report_progress(self.progress):
            # The digest is passed on only if it has been computed: most runs need it once, at the end.
            digest = vars(self).get("model_digest")
            result: Result = self.implementation.execute(self.inputs, self.complete_params, digest)
        if self.files and result.provenance is not None:
            named = result.provenance.model_copy(update={"files": self.files})
            result = replace(result, provenance=named)
        return result

    def passes(self, images: int | None = None) -> tuple[int, int] | None:
        """How many images will pass forward and backward by the declared cost; None if none is declared.

        images: their number in all, where the inputs are a batch of a stream.
        """
        return self.implementation.passes(self.inputs, self.complete_params, images)

    @cached_property
    def model_digest(self) -> str | None:
        """The digest of the model's weights; None for a run without a model. Computed once."""
        declared = self.implementation.spec.input("model")
        model = self.inputs[declared.name] if declared else None
        return None if model is None else model.digest

    @cached_property
    def _recorded(self) -> dict[str, Any]:
        return self.implementation.record_inputs(self.inputs)

    def _is_identified(self) -> bool:
        """Whether the record of every input identifies it; that of a callable or an object does not."""
        declared = self.implementation.spec.recorded_inputs(self.inputs)
        return all(ROLES[i.role].is_identified(self.inputs[i.name]) for i in declared)

    @cached_property
    def _json_params(self) -> dict[str, Any]:
        # As they were passed: the seed that a run draws is no part of its identity.
        return self.implementation.spec.params(**self.params).model_dump(mode="json")

    def identity(self) -> str | None:
        """A digest of method, parameters, inputs and model; None if an input has no record to compare."""
        if not self._is_identified():
            return None
        method = self.implementation
        inputs = {
            i.name: ROLES[i.role].fingerprint(self.inputs[i.name])
            for i in method.spec.recorded_inputs(self.inputs)
        }
        parts = [method.spec.name, method.distribution, self._json_params, inputs, self.model_digest]
        return hashlib.sha256(json.dumps(parts, default=repr).encode()).hexdigest()

    def produced(self, saved: Result) -> bool:
        """Whether a saved result is of the same method, parameters, inputs and model, and not interrupted.

        Where this run sets no seed, the saved one may be any. Data sets are compared by name only.
        """
        method, provenance = self.implementation, saved.provenance
        made_by = (method.spec.name, method.distribution)
        if provenance is None or (provenance.method, provenance.distribution) != made_by:
            return False
        params = dict(self.complete_params)
        if method.seed and params[method.seed] is None:
            params[method.seed] = provenance.seed
        return (
            provenance.interrupted is None
            and provenance.params == method.spec.params(**params).model_dump(mode="json")
            and (provenance.model and provenance.model["digest"]) == self.model_digest
            and saved.inputs.keys() == self._recorded.keys()
            and self._is_identified()
            and all(same_input(value, saved.inputs[name]) for name, value in self._recorded.items())
        )

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: a registered method by the name that no other distribution's method has."""
        distribution, _, version = self.implementation.distribution.partition(" ")
        name = self.implementation.spec.name
        name = f"{distribution}:{name}" if version else self.method
        is_registered = name in methods and methods[name] is self.implementation
        return vars(self) | {"implementation": name if is_registered else self.implementation}

    def __setstate__(self, state: dict[str, Any]) -> None:
        implementation = state["implementation"]
        if isinstance(implementation, str):
            implementation = methods[implementation]
        vars(self).update(state | {"implementation": implementation})


def same_input(value: Any, saved: Any) -> bool:
    """Whether two records are of the same input; never for an input that was passed as an object."""
    if isinstance(value, Tensor) and isinstance(saved, Tensor):
        return torch.equal(value.cpu(), saved.cpu())
    first, second = (json.dumps(item, default=repr) for item in (value, saved))
    return first == second and not str(value).endswith(AS_OBJECT)
