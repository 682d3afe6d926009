"""The hook manager: reading, cutting, stopping and rewriting what flows through a model."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .errors import ModelError, UnknownName

#: The taps that may see what runs now. A thread starts with none and a run starts with none,
#: so two runs on one model never see each other.
open_taps: ContextVar[tuple[Tap, ...]] = ContextVar("phosphene_open_taps", default=())


#: Held where a network's hooks are changed, and where all of them are gone through, as a copy does.
hooking = threading.RLock()


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
            stack.callback(open_taps.reset, open_taps.set((*open_taps.get(), self)))
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
            with hooking:
                handle.remove()

        for name, module in layers.items():
            hook = self._hook(name)
            with hooking:
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
            if self not in open_taps.get():
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
            return passed_on(output, passed)

        return hook


def passed_on(output: Any, tensor: Tensor) -> Any:
    """A layer's output with ``tensor`` as its (first) tensor: what a hook gives back."""
    if isinstance(output, Tensor):
        return tensor
    rest = [tensor, *output[1:]]
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


#: ``rule(gradient, passed) -> gradient``: what goes back through a ReLU; ``passed`` is what it would itself
#: let through, the gradient where it was open.
BackwardRule = Callable[[Tensor, Tensor], Tensor]


def guided(gradient: Tensor, passed: Tensor) -> Tensor:
    """Guided backpropagation (Springenberg 2015): only positive gradients through open gates."""
    return passed.clamp(min=0)


def deconvnet(gradient: Tensor, passed: Tensor) -> Tensor:
    """Deconvolutional network (Zeiler & Fergus 2014): only positive gradients, gates ignored."""
    return gradient.clamp(min=0)


class _RewrittenRelu(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, upper: float | None, in_place: bool, keep_output: bool, rule: BackwardRule
    ) -> Tensor:
        output = x.clamp_(0, upper) if in_place else x.clamp(0, upper)
        ctx.save_for_backward(output if keep_output else x)
        ctx.upper, ctx.rule = float("inf") if upper is None else upper, rule
        if in_place:
            ctx.mark_dirty(x)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        passed = torch.ops.aten.hardtanh_backward(gradient, kept, 0, ctx.upper)
        return ctx.rule(gradient, passed), None, None, None, None


#: Calls that are or may be a ReLU: their arguments in order, with what they mean when left out.
_CLAMP = {"input": None, "min": None, "max": None}
_RELUS: dict[str, dict[str, Any]] = {
    "relu": {"input": None, "inplace": False, "min": 0, "max": None},
    "relu6": {"input": None, "inplace": False, "min": 0, "max": 6},
    "hardtanh": {"input": None, "min": -1, "max": 1, "inplace": False},
    **dict.fromkeys(("clamp", "clip", "clamp_min"), _CLAMP),
}


class Rewrite(TorchFunctionMode):
    """Counts and rewrites every ReLU, however it is spelled; see ``rewrite_backward``."""

    def __init__(self, rule: BackwardRule) -> None:
        super().__init__()
        self.rule = rule
        self.caught = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        spelling = getattr(func, "__name__", "")
        if (usual := _RELUS.get(spelling.removesuffix("_"))) is None:
            return func(*args, **kwargs)
        named = {name.removesuffix("_val"): value for name, value in kwargs.items()}
        given = usual | dict(zip(usual, args, strict=False)) | named
        x, low, high = given["input"], given["min"], given["max"]
        plain = not isinstance(low, Tensor) and not isinstance(high, Tensor)
        # Pixels kept in [0, 1] are no ReLU, and one that no gradient reaches is not on the way from
        # the pixels (Swin V2's position bias).
        if not (plain and low == 0 and high in (None, 6) and x.requires_grad):
            return func(*args, **kwargs)
        self.caught += 1
        in_place = spelling.endswith("_") or given.get("inplace", False)
        # What autograd keeps itself of such a call, so that the network writes into the other one alone.
        keep_output = in_place or spelling == "relu"
        return _RewrittenRelu.apply(x, high, in_place, keep_output, self.rule)


@contextmanager
def rewrite_backward(rule: BackwardRule) -> Iterator[Rewrite]:
    """Inside, gradients pass through ReLU and ReLU6 by ``rule``; no module is touched.

    In-place, reused, functional and method-call ReLUs all obey, also those written as a clamp, since
    the calls themselves are caught. Leaving without having caught one raises ModelError: the result
    would be the plain gradient under a wrong name.
    """
    with Rewrite(rule) as rewrite:
        yield rewrite
    if rewrite.caught == 0:
        raise ModelError(
            f"the {getattr(rule, '__name__', 'backward')} rule found no ReLU in this model "
            "(GELU and SiLU networks have none), so its result would be the plain gradient; "
            "use saliency, or a model with ReLUs"
        )


_lock = threading.Lock()
#: What is held still now: id -> (the thing, its flag's name, the flag before, who holds it).
_held: dict[int, tuple[Any, str, bool, set[object]]] = {}


def _hold(things: list[tuple[Any, str]], holder: object) -> None:
    with _lock:
        for thing, flag in things:
            _held.setdefault(id(thing), (thing, flag, getattr(thing, flag), set()))[3].add(holder)
            setattr(thing, flag, False)


def _release(things: list[tuple[Any, str]], holder: object) -> None:
    try:
        while things:
            with _lock:
                thing, flag = things[-1]
                if id(thing) in _held:
                    _, _, before, holders = _held[id(thing)]
                    holders.discard(holder)
                    if not holders:
                        del _held[id(thing)]
                        setattr(thing, flag, before)
            things.pop()
    finally:
        if things:  # an interruption must not strand the others
            things.pop()
            _release(things, holder)


@contextmanager
def guard(*modules: nn.Module) -> Iterator[None]:
    """A run's own room: the modules in eval mode, parameters frozen, no tap of another run in sight.

    However the block is left, every training flag and gradient flag is as it was. Guards nest,
    also across threads: the last one out restores.
    """
    holder = object()
    with ExitStack() as stack:
        for module in modules:
            things: list[tuple[Any, str]] = [(part, "training") for part in module.modules()]
            things += [(p, "requires_grad") for p in module.parameters()]
            # The way back is laid first: an interruption between the lines must not strand them.
            stack.callback(_release, things, holder)
            _hold(things, holder)
        stack.callback(open_taps.reset, open_taps.set(()))
        yield
