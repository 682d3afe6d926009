"""Something else than activations carried through a network's own code: boxes of them, or their bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from phosphene import Model, ModelError

#: ``rule(func, carried, ...)``: what the operation ``func`` does to it; the others as given.
Rule = Callable[..., Any]


class NoRule(ModelError, AttributeError):
    """An operation that the proof knows nothing of."""


class Carried:
    """In the place of a tensor: every operation on it is looked up by name, and refused where none is known.

    Modules, functions, methods and operators all obey, since torch itself asks; no module is touched. A
    subclass brings its ``rules`` and ``what`` they are about.
    """

    what: ClassVar[str]
    rules: ClassVar[Mapping[str, Rule]]

    def representative(self) -> Tensor:
        """A tensor of the shape, precision and device of what this stands for."""
        raise NotImplementedError

    def clone(self) -> Self:
        """Another with tensors of its own."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        rule = cls.rules.get(name.strip("_"))
        if rule is None:
            raise NoRule(f"{cls.what} have no rule for {name}, which this network uses")
        in_place = kwargs.get("inplace", False) or (name.endswith("_") and not name.endswith("__"))
        if not in_place:
            return rule(func, *args, **kwargs)
        changed = rule(func, args[0].clone(), *args[1:], **kwargs)
        args[0].__dict__.update(changed.__dict__)
        return args[0]

    def __getattr__(self, name: str) -> Any:
        if name.strip("_") not in self.rules or name.startswith("__"):
            raise NoRule(f"{self.what} have no rule for .{name}, which this network uses")
        return partial(self._operate, getattr(torch.Tensor, name))

    def _operate(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__torch_function__(func, (type(self),), (self, *args), kwargs)

    def __add__(self, other: Any) -> Any:
        return self._operate(torch.add, other)

    __radd__ = __add__

    def __iadd__(self, other: Any) -> Any:
        return self._operate(torch.Tensor.add_, other)

    def __sub__(self, other: Any) -> Any:
        return self._operate(torch.sub, other)

    def __mul__(self, other: Any) -> Any:
        return self._operate(torch.mul, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._operate(torch.div, other)

    def __getitem__(self, place: Any) -> Any:
        return self._operate(torch.Tensor.__getitem__, place)

    def __len__(self) -> int:
        return len(self.representative())

    shape = property(lambda self: self.representative().shape)
    ndim = property(lambda self: self.representative().ndim)
    dtype = property(lambda self: self.representative().dtype)
    device = property(lambda self: self.representative().device)
    requires_grad = property(lambda self: self.representative().requires_grad)

    def register_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        """As of a tensor: called with its gradient."""
        return self.representative().register_hook(hook)

    def size(self, axis: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if axis is None else self.shape[axis]

    def dim(self) -> int:
        """As of a tensor."""
        return len(self.shape)


def carry(model: Model, carried: Carried) -> Any:
    """What the network makes of it: the logits' stand-in. ModelError for a defended model."""
    if model.defenses:
        raise ModelError(
            f"{carried.what} have no rule for what stands before this model ({model.name}): ask the bare one"
        )
    found = next(_within(model.module(carried), type(carried)), None)
    if found is None:
        raise ModelError(f"{model.name} gives no logits that {carried.what} could be read from")
    return found


def _within(output: Any, kind: type[Carried]) -> Iterator[Carried]:
    if isinstance(output, kind) and output.dim() == 2:
        yield output
    elif isinstance(output, (list, tuple, Mapping)) or hasattr(output, "logits"):
        parts = output.values() if isinstance(output, Mapping) else output
        for part in [output.logits] if hasattr(output, "logits") else parts:
            yield from _within(part, kind)


def undropped(func: Any, carried: Carried, p: float = 0.5, training: bool = True, **_: Any) -> Carried:
    """The rule for dropout: it does nothing in eval mode, and a random network proves nothing."""
    if training and p > 0:
        raise NoRule(f"{carried.what} have no rule for dropout that goes on in eval mode")
    return carried


def batch_norm_scale(running_var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """What a batch norm in eval mode multiplies each channel by."""
    scale = (running_var + eps).rsqrt()
    return scale if weight is None else scale * weight
