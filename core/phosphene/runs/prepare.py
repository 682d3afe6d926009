"""``prepare``: inputs read and checked before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnknownName
from ..models import Model
from ..models.batch_size import max_batch
from ..progress import ProgressEvent
from ..registry.lookup import methods
from ..results import TrainedNetwork
from ..roles.kinds import ROLES
from .executors import executors
from .prepared_run import PreparedRun


def prepare(
    name: str,
    *,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: bool | None | Callable[[ProgressEvent], None] = None,
    executor: str = "local",
    **arguments: Any,
) -> PreparedRun:
    """What ``run`` does before the work: the method found, inputs made, everything checked, nothing run.

    The ``Run`` foretells its cost (``passes()``) and knows its result when it sees it (``gave(saved)``).
    """
    method = methods[name]
    if executor not in (known := executors()):
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
            made[declared.name] = move_to_device(made[declared.name], device)
        made, _ = method.check(made, params)
    return PreparedRun(name, made, params, batch_size, progress)


def move_to_device(value: Any, device: str | torch.device | None, dtype: torch.dtype | None = None) -> Any:
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
