"""The hook manager: reading, cutting, stopping and rewriting what flows through a model."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import ModelError, UnknownName

#: The taps that may see what runs now. A thread starts with none and a run starts with none,
#: so two runs on one model never see each other.
_open_taps: ContextVar[tuple[Tap, ...]] = ContextVar("phosphene_open_taps", default=())


class StopForward(BaseException):
    """Ends a forward pass once all that was asked for has been seen.

    Not an ``Exception``, so that no ``except Exception`` inside a model swallows it.
    """


def first_tensor(output: Any, layer: str) -> Tensor:
    """The tensor a layer gives; for a tuple (attention, recurrent layers) its first."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ModelError(f"layer {layer!r} gives a {type(output).__name__}, not a tensor")
    return output


class Tap:
    """Reads, cuts or stops a forward pass at some layers; made by ``model.tap(...)``.

    ``tap[layer]`` is the layer's own output, on the graph. What runs on is a clone, because a
    later in-place operation would overwrite the reading. A layer called several times gives its
    last output. With ``inputs`` what is read is the layer's first input.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        *,
        leaf: bool = False,
        inputs: bool = False,
        stop_after: Mapping[str, int] | None = None,
    ) -> None:
        self._modules = layers
        self._leaf = leaf
        self._inputs = inputs
        self._stop_after = stop_after
        self._outputs: dict[str, Tensor] = {}
        self._calls: Counter[str] = Counter()
        self._cleanup = ExitStack()

    def __enter__(self) -> Tap:
        # One by one onto the stack, so that an interruption half-way leaves no hook behind.
        with ExitStack() as stack:
            for name, module in self._modules.items():
                hook = self._hook(name)
                handle = (
                    module.register_forward_pre_hook(lambda m, args, hook=hook: hook(m, args, args))
                    if self._inputs
                    else module.register_forward_hook(hook)
                )
                stack.callback(handle.remove)
            outside = _open_taps.set((*_open_taps.get(), self))
            stack.callback(_open_taps.reset, outside)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def __getitem__(self, layer: str) -> Tensor:
        if layer not in self._modules:
            raise UnknownName("tapped layer", layer, self._modules, "this tap")
        if layer not in self._outputs:
            raise ModelError(f"layer {layer!r} has not run: the forward pass did not reach it")
        return self._outputs[layer]

    def _hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if self not in _open_taps.get():
                return None
            value = first_tensor(output, name)
            if self._leaf:
                value = value.detach().requires_grad_()
            self._outputs[name] = value
            self._calls[name] += 1
            if self._stop_after is not None and all(
                self._calls[layer] >= calls for layer, calls in self._stop_after.items()
            ):
                raise StopForward
            return passed_on(output, value.clone())

        return hook


def passed_on(output: Any, tensor: Tensor) -> Any:
    """A layer's output with ``tensor`` as its (first) tensor: what a hook gives back."""
    if isinstance(output, Tensor):
        return tensor
    rest = [tensor, *output[1:]]
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


# --- rewriting the backward pass -------------------------------------------------------------

#: ``rule(gradient, gate) -> gradient``: what goes back through a ReLU; ``gate`` is where it was open.
BackwardRule = Callable[[Tensor, Tensor], Tensor]


def guided(gradient: Tensor, gate: Tensor) -> Tensor:
    """Guided backpropagation (Springenberg 2015): only positive gradients through open gates."""
    return gradient.clamp(min=0) * gate


def deconvnet(gradient: Tensor, gate: Tensor) -> Tensor:
    """Deconvolutional network (Zeiler & Fergus 2014): only positive gradients, gates ignored."""
    return gradient.clamp(min=0)


class _RewrittenRelu(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, upper: float | None, in_place: bool, rule: BackwardRule
    ) -> Tensor:
        gate = x > 0 if upper is None else (x > 0) & (x < upper)
        ctx.save_for_backward(gate)
        ctx.rule = rule
        if in_place:
            ctx.mark_dirty(x)
            return x.clamp_(0, upper)
        return x.clamp(0, upper)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (gate,) = ctx.saved_tensors
        return ctx.rule(gradient, gate), None, None, None


def _as_relu(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """(input, upper bound, in place) where ``func`` is a ReLU in any of its spellings, else None."""

    def argument(position: int, name: str, default: Any) -> Any:
        return args[position] if len(args) > position else kwargs.get(name, default)

    spelling = getattr(func, "__name__", "")
    name, x = spelling.removesuffix("_"), argument(0, "input", None)
    low, high, in_place = 0, None, spelling.endswith("_")
    if name in ("relu", "relu6"):
        high = 6.0 if name == "relu6" else None
        in_place = in_place or argument(1, "inplace", False)
    elif name == "hardtanh":
        low, high = argument(1, "min_val", -1.0), argument(2, "max_val", 1.0)
        in_place = in_place or argument(3, "inplace", False)
    elif name in ("clamp", "clip", "clamp_min"):
        low, high = argument(1, "min", None), argument(2, "max", None)
        if high not in (None, 6):  # pixels kept in [0, 1] are no ReLU
            return None
    else:
        return None
    return (x, high, in_place) if isinstance(low, (int, float)) and low == 0 else None


class Rewrite(TorchFunctionMode):
    """Counts and rewrites every ReLU, however it is spelled; see ``rewrite_backward``."""

    def __init__(self, rule: BackwardRule) -> None:
        super().__init__()
        self.rule = rule
        self.caught = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        relu = _as_relu(func, args, kwargs)
        # A ReLU that no gradient reaches is not on the way from the pixels (Swin V2's position bias).
        if relu is None or not relu[0].requires_grad:
            return func(*args, **kwargs)
        self.caught += 1
        x, upper, in_place = relu
        return _RewrittenRelu.apply(x, upper, in_place, self.rule)


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


# --- guarding a model ------------------------------------------------------------------------

_lock = threading.Lock()
#: What is held still now: id -> [the thing, its flag before, who holds it].
_held: dict[int, tuple[nn.Module | nn.Parameter, bool, set[object]]] = {}


def _flag(thing: nn.Module | nn.Parameter) -> str:
    return "training" if isinstance(thing, nn.Module) else "requires_grad"


def _hold(thing: nn.Module | nn.Parameter, holder: object) -> None:
    with _lock:
        _held.setdefault(id(thing), (thing, getattr(thing, _flag(thing)), set()))[2].add(holder)
        setattr(thing, _flag(thing), False)


def _release(thing: nn.Module | nn.Parameter, holder: object) -> None:
    with _lock:
        if id(thing) not in _held:
            return
        _, before, holders = _held[id(thing)]
        holders.discard(holder)
        if not holders:
            del _held[id(thing)]
            setattr(thing, _flag(thing), before)


@contextmanager
def guard(*modules: nn.Module) -> Iterator[None]:
    """A run's own room: the modules in eval mode, parameters frozen, no tap of another run in sight.

    However the block is left, every training flag and gradient flag is as it was. Guards nest,
    also across threads: the last one out restores.
    """
    holder = object()
    with ExitStack() as stack:
        for module in modules:
            things: list[nn.Module | nn.Parameter] = [*module.modules(), *module.parameters()]
            for thing in things:
                # The way back is laid first: an interruption between the lines must not strand it.
                stack.callback(_release, thing, holder)
                _hold(thing, holder)
        outside = _open_taps.set(())
        stack.callback(_open_taps.reset, outside)
        yield
