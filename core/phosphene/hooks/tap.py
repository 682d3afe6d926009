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

#: The taps that may see what runs now. A thread starts with none and a run starts with none,
#: so two runs on one model never see each other.
active_taps: ContextVar[tuple[Tap, ...]] = ContextVar("phosphene_open_taps", default=())


#: Held where a network's hooks are changed, and where all of them are gone through, as a copy does.
hook_lock = threading.RLock()


class StopForward(BaseException):
    """Ends a forward pass once all that was asked for has been seen.

    Not an ``Exception``, so that no ``except Exception`` inside a model swallows it.
    """


@dataclass(eq=False)
class Tap:
    """Reads, cuts or stops a forward pass at some layers; made by ``model.tap(...)``.

    ``tap[layer]`` is the layer's own output, on the graph (for a tuple its first tensor). What runs
    on is a clone, because a later in-place operation would overwrite the reading. A layer called
    several times gives its last output. With ``inputs`` what is read is the layer's first input;
    ``stop_after`` says after how many calls of which layers the pass has been seen; ``leaf`` cuts the
    graph at the layers, where one that rests on another stays joined to it; what ``replace`` makes of
    the clone runs on in its place, for each of its layers after so many calls.
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
        # One by one onto the stack, so that an interruption half-way leaves no hook behind.
        with ExitStack() as stack:
            self._watch(self.layers, stack)
            stack.callback(active_taps.reset, active_taps.set((*active_taps.get(), self)))
            self._cleanup = stack.pop_all()
        return self

    def follow(self, network: nn.Module) -> None:
        """Read the layers of the same names in another network as well, until the tap is closed."""
        if network not in self._followed:
            self._followed.append(network)
            self._cleanup.callback(self._followed.remove, network)
            self._watch({name: network.get_submodule(name) for name in self.layers}, self._cleanup)

    def _watch(self, layers: Mapping[str, nn.Module], stack: ExitStack) -> None:
        def let_go(handle: RemovableHandle) -> None:
            with hook_lock:
                handle.remove()

        for name, module in layers.items():
            hook = self._hook(name)
            with hook_lock:
                if self.inputs:
                    handle = module.register_forward_pre_hook(
                        lambda m, given, hook=hook: hook(m, given, given)
                    )
                else:
                    handle = module.register_forward_hook(hook)
                stack.callback(let_go, handle)

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
                raise ModelError(f"layer {name!r} gives a {type(value).__name__}, not a tensor")
            # A second cut would part the layers below from all that comes after.
            if self.leaf and not (value.requires_grad and self._outputs.keys() - {name}):
                value = value.detach().requires_grad_()
            self._outputs[name] = value
            self._calls[name] += 1
            if self.stop_after and all(self._calls[n] >= calls for n, calls in self.stop_after.items()):
                raise StopForward
            calls, replaced = self.replace.get(name, (1, Tensor.clone))
            passed = value.clone() if self._calls[name] % calls else replaced(value.clone())
            return replace_output_tensor(output, passed)

        return hook


def replace_output_tensor(output: Any, tensor: Tensor) -> Any:
    """A layer's output with ``tensor`` as its (first) tensor: what a hook gives back."""
    if isinstance(output, Tensor):
        return tensor
    rest = [tensor, *output[1:]]
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
