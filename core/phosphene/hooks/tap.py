"""``Tap``: read, cut, stop or replace layers during a forward pass."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ModelError, UnknownName

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
class Tap:
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
    _cleanup: ExitStack = field(default_factory=ExitStack, init=False)
    _followed: list[nn.Module] = field(default_factory=list, init=False)

    def __enter__(self) -> Tap:
        # Hooks are registered on an exit stack one by one, so that Ctrl-C in between leaves none behind.
        with ExitStack() as stack:
            self._register(self.layers, stack)
            stack.callback(active_taps.reset, active_taps.set((*active_taps.get(), self)))
            self._cleanup = stack.pop_all()
        return self

    def follow(self, network: nn.Module) -> None:
        """Read the layers of the same names in another network as well (an optimized copy), until closed."""
        if network not in self._followed:
            self._followed.append(network)
            self._cleanup.callback(self._followed.remove, network)
            self._register({name: network.get_submodule(name) for name in self.layers}, self._cleanup)

    def _register(self, layers: Mapping[str, nn.Module], stack: ExitStack) -> None:
        def remove(handle: RemovableHandle) -> None:
            with hook_lock:
                handle.remove()

        for name, module in layers.items():
            hook = self._hook(name)
            with hook_lock:
                if self.inputs:
                    handle = module.register_forward_pre_hook(
                        lambda module, args, hook=hook: hook(module, args, args)
                    )
                else:
                    handle = module.register_forward_hook(hook)
                stack.callback(remove, handle)

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

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
                raise ModelError(f"layer {name!r} returns a {type(value).__name__}, not a tensor")
            # Detaching here as well would disconnect the layers already read from what follows.
            if self.leaf and not (value.requires_grad and self._outputs.keys() - {name}):
                value = value.detach().requires_grad_()
            self._outputs[name] = value
            self._calls[name] += 1
            if self.stop_after and all(self._calls[n] >= calls for n, calls in self.stop_after.items()):
                raise StopForward
            calls, function = self.replace.get(name, (1, Tensor.clone))
            continued = value.clone() if self._calls[name] % calls else function(value.clone())
            return replace_output_tensor(output, continued)

        return hook


def replace_output_tensor(output: Any, tensor: Tensor) -> Any:
    """A layer's output whose (first) tensor is replaced by ``tensor``: the return value of a forward hook."""
    if isinstance(output, Tensor):
        return tensor
    rest = [tensor, *output[1:]]
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
