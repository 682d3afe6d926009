"""``prepare``: inputs read, everything checked, nothing run yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, type_name
from ..models import Model
from ..models.arguments import move
from ..models.batch_size import max_batch
from ..progress import ProgressEvent, check_reporter
from ..registry.lookup import methods
from ..registry.method import Method
from ..results import Embedding, TrainedNetwork
from ..roles import ROLES, InputContext, image_files
from ..torch_state import cpu_by_default
from .executors import find_executor
from .prepared_run import PreparedRun
from .saved_results import load_result


def prepare(
    name: str | Method[..., Any],
    *,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: bool | None | Callable[[ProgressEvent], None] = None,
    executor: str = "local",
    **arguments: Any,
) -> PreparedRun:
    """A method with its inputs read and its parameters checked, ready for ``execute``.

    ``name`` is a method's name or a ``Method``; the other arguments are those of ``run``. The ``PreparedRun``
    knows its cost (``passes()``) and recognizes its saved result (``produced(saved)``). Raises InputError,
    ModelError or UnknownName for what cannot run.
    """
    method = find_method(name)
    find_executor(executor)
    check_reporter(progress)
    names = {i.name for i in method.spec.inputs}
    params = {n: v for n, v in arguments.items() if n not in names}
    complete = method.validate(params)  # before the model is loaded: bad parameters fail early
    # The default labels run the model; tensors created in inference mode could never be differentiated.
    with max_batch(batch_size), torch.inference_mode(False), cpu_by_default():
        inputs = read_inputs(method, arguments, complete, device)
        images = method.spec.input("images")
        paths = None if images is None else arguments.get(images.name)
        files = () if paths is None else image_files(paths)
        complete = method.resolve_layers(complete, inputs)
    return PreparedRun(
        method=name if isinstance(name, str) else method.spec.short_name,
        inputs=inputs,
        params=params,
        batch_size=batch_size,
        progress=progress,
        executor=executor,
        files=files,
        implementation=method,
        complete_params=complete,
    )


def find_method(name: str | Method[..., Any]) -> Method[..., Any]:
    """The method of a name, or the ``Method`` itself. Raises InputError, UnknownName."""
    if not isinstance(name, (str, Method)):
        raise InputError(f"a method is a name such as 'pgd' or a Method, not {type_name(name)}")
    return methods[name] if isinstance(name, str) else name


def read_inputs(
    method: Method[..., Any],
    arguments: Mapping[str, Any],
    params: Mapping[str, Any],
    device: str | torch.device | None,
) -> dict[str, Any]:
    """The method's inputs by name, read from arguments of ``run`` and checked; ``params`` are complete."""
    inputs: dict[str, Any] = {}
    owner = method.spec.input("model")
    replaced = method.spec.replaced_inputs(arguments)
    for declared in method.spec.inputs:
        if declared.name in replaced:
            inputs[declared.name] = None
            continue
        model = None if owner is None or declared.own_size else inputs.get(owner.name)
        context = InputContext(model, inputs, load_result)
        role, value = ROLES[declared.role], declared.value(arguments.get(declared.name))
        if value is not None or declared.required or not role.optional_is_none:
            value = role.make(value, context)
        method.add_checked(inputs, declared, move_to_device(value, device), params)
    return inputs


def move_to_device(value: Any, device: str | torch.device | None, dtype: torch.dtype | None = None) -> Any:
    """A tensor on the device; a network, or what has one, with its weights moved; all else unchanged."""
    match value:
        case Model(module=network) | TrainedNetwork(network=network) | (nn.Module() as network):
            move(lambda: network.to(device, dtype), "the model", device)
        case Tensor():
            return move(lambda: value.to(device), "an input", device)
        case Embedding() if device is not None:
            return replace(
                value,
                features=move(lambda: value.features.to(device), "an input", device),
                thumbnails=value.thumbnails.to(device),
            )
    return value
