"""``Tap``: read, cut, stop or replace layers during a forward pass."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import ModelError, UnknownName, type_name
from ..restoration import Restoring
from ..torch_state import cpu_by_default, function_mode
from .saved_tensors import SaveTensors

#: The taps that are active in this thread and run. A new thread or run starts with none, so that two
#: runs on one model do not read each other's layers.
active_taps: ContextVar[tuple[Tap, ...]] = ContextVar("phosphene_active_taps", default=())


#: Lock for changing a network's hooks and for iterating over them, as copying a network does.
hook_lock = threading.RLock()


class StopForward(BaseException):
    """Raised by a tap to end a forward pass once all its layers have run.

    Not an ``Exception``, so that no ``except Exception`` inside a model catches it.
    """


@dataclass(eq=False)
class Tap(Restoring):
    """Reads layers during forward passes, and may cut, replace or stop there; see ``model.tap(...)``.

    ``tap[layer]`` is the layer's output on the autograd graph: the first tensor of a tuple, and the last
    output of a layer that runs several times. The network continues with a clone of it, because a later
    in-place operation would overwrite it.

    layers: the modules to read, by name.
    leaf: detach the outputs and make them leaves of the graph; a layer that depends on one that was already
        read stays connected to it.
    inputs: read the layers' first inputs instead of their outputs.
    stop_after: number of calls by layer; StopForward is raised once every layer has reached its number.
    replace: by layer, its number of calls in a pass and a function; after the last call the network
        continues with what the function returns for the clone.
    """

    layers: Mapping[str, nn.Module]
    leaf: bool = False
    inputs: bool = False
    stop_after: Mapping[str, int] | None = None
    replace: Mapping[str, tuple[int, Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    _outputs: dict[str, Tensor] = field(default_factory=dict, init=False)
    _calls: Counter[str] = field(default_factory=Counter, init=False)
    _hooks: list[tuple[nn.Module, Callable[..., Any]]] = field(default_factory=list, init=False)
    _followed: list[nn.Module] = field(default_factory=list, init=False)
    _mode: function_mode = field(default_factory=lambda: function_mode(SaveTensors()), init=False)

    if TYPE_CHECKING:

        def __enter__(self) -> Tap: ...

    def open(self) -> None:
        self._register(self.layers)
        active_taps.set((*active_taps.get(), self))
        if self.replace:  # a checkpoint that computes layers again after the block would not replace them
            self._mode.open()

    def close(self) -> None:
        self._mode.close()
        active_taps.set(tuple(tap for tap in active_taps.get() if tap is not self))
        self._followed.clear()
        remove_hooks(self._hooks)
        self._hooks.clear()

    def follow(self, network: nn.Module) -> None:
        """Read the layers of the same names in another network as well (an optimized copy), until closed."""
        if network not in self._followed:
            self._followed.append(network)
            self._register({name: network.get_submodule(name) for name in self.layers})

    def _register(self, layers: Mapping[str, nn.Module]) -> None:
        for name, module in layers.items():
            hook = self._hook(name)
            if self.inputs:
                hook = lambda module, args, hook=hook: hook(module, args, args)
            # Recorded before it is registered: Ctrl-C in between would otherwise leave the hook.
            self._hooks.append((module, hook))
            with hook_lock:
                if self.inputs:
                    module.register_forward_pre_hook(hook)
                else:
                    module.register_forward_hook(hook)

    def __getitem__(self, layer: str) -> Tensor:
        if layer not in self.layers:
            raise UnknownName("tapped layer", layer, self.layers, "this tap")
        if layer not in self._outputs:
            raise ModelError(f"layer {layer!r} has not run: the forward pass did not reach it")
        return self._outputs[layer]

    def _hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if self not in active_taps.get():
                return None
            value = output[0] if isinstance(output, (tuple, list)) and output else output
            if not isinstance(value, Tensor):
                raise ModelError(f"layer {name!r} returns {type_name(value)}, not a tensor")
            # Detaching here as well would disconnect the layers already read from what follows.
            if self.leaf and not (value.requires_grad and self._outputs.keys() - {name}):
                value = value.detach().requires_grad_()
            if value.grad_fn is not None:
                value = value.view_as(value)  # the hook belongs to the view, not to a tensor of the caller
                value.register_hook(_contiguous_gradient)
            self._outputs[name] = value
            self._calls[name] += 1
            if self.stop_after and all(self._calls[n] >= calls for n, calls in self.stop_after.items()):
                raise StopForward
            continued = value.clone()
            calls, function = self.replace.get(name, (0, None))
            if function is not None and self._calls[name] % calls == 0:
                with cpu_by_default():  # the network runs with the caller's default device
                    continued = function(continued)
            return replace_output_tensor(output, continued)

        return hook


def _contiguous_gradient(gradient: Tensor) -> Tensor | None:
    """The gradient of one image in row-major order; None: unchanged.

    Batch and instance normalization on the CPU permute the gradient of a batch of one whose strides are
    those of ``einsum``, (C, 1, W C, C): they take it for row-major (torch 2.14).
    """
    return gradient.contiguous() if gradient.shape[:1] == (1,) else None


class layer_hooks(Restoring):
    """Forward hooks on layers inside the block."""

    def __init__(self, hooks: Mapping[nn.Module, Callable[..., Any]]) -> None:
        self._hooks = hooks

    def open(self) -> None:
        for module, hook in self._hooks.items():
            with hook_lock:
                module.register_forward_hook(hook)

    def close(self) -> None:
        remove_hooks(self._hooks.items())


def remove_hooks(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> None:
    """Remove forward (pre-)hooks, those that are registered."""
    for module, hook in hooks:
        with hook_lock:
            for registered in (module._forward_hooks, module._forward_pre_hooks):
                for key, other in tuple(registered.items()):
                    if other is hook:
                        del registered[key]


def replace_output_tensor(output: Any, tensor: Tensor) -> Any:
    """A layer's output whose (first) tensor is replaced by ``tensor``: the return value of a forward hook."""
    if isinstance(output, Tensor):
        return tensor
    rest = [tensor, *output[1:]]
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
