"""Bound propagation: tensor-like objects that carry bounds on activations through a network's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from phosphene import Model, ModelError

#: ``rule(func, bounds, ...)``: the bounds after the operation ``func``, with its other arguments.
Rule = Callable[..., Any]


class UnsupportedOperation(ModelError, AttributeError):
    """An operation without a propagation rule."""


class BoundTensor:
    """Bounds on a tensor, passed through a network instead of the tensor.

    Every torch operation on it is looked up in ``rules`` by name and refused where there is none. Modules,
    functions, methods and operators all arrive here through ``__torch_function__``, so no module is changed.
    A subclass defines ``rules``, ``description`` (for error messages), ``example_tensor`` and ``clone``.
    """

    description: ClassVar[str]
    rules: ClassVar[Mapping[str, Rule]]

    def example_tensor(self) -> Tensor:
        """A tensor with the shape, dtype and device of the bounded one."""
        raise NotImplementedError

    def clone(self) -> Self:
        """A copy that shares no memory."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        rule = cls.rules.get(name.strip("_"))
        if rule is None:
            raise UnsupportedOperation(f"{cls.description} have no rule for {name}, which this network uses")
        in_place = kwargs.get("inplace", False) or (name.endswith("_") and not name.endswith("__"))
        if not in_place:
            return rule(func, *args, **kwargs)
        changed = rule(func, args[0].clone(), *args[1:], **kwargs)
        args[0].__dict__.update(changed.__dict__)
        return args[0]

    def __getattr__(self, name: str) -> Any:
        if name.strip("_") not in self.rules or name.startswith("__"):
            raise UnsupportedOperation(
                f"{self.description} have no rule for .{name}, which this network uses"
            )
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

    def __getitem__(self, index: Any) -> Any:
        return self._operate(torch.Tensor.__getitem__, index)

    def __len__(self) -> int:
        return len(self.example_tensor())

    shape = property(lambda self: self.example_tensor().shape)
    ndim = property(lambda self: self.example_tensor().ndim)
    dtype = property(lambda self: self.example_tensor().dtype)
    device = property(lambda self: self.example_tensor().device)
    requires_grad = property(lambda self: self.example_tensor().requires_grad)

    def register_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        """As of a tensor: called with its gradient."""
        return self.example_tensor().register_hook(hook)

    def size(self, axis: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if axis is None else self.shape[axis]

    def dim(self) -> int:
        """As of a tensor."""
        return len(self.shape)


def propagate(model: Model, inputs: BoundTensor) -> Any:
    """The bounds on the logits for bounds on the normalized pixels.

    Raises ModelError for a model behind a defense, an operation without a rule, and a network whose output
    holds no logits (N, K); InputError for images of a size that the network does not take.
    """
    if model.defenses:
        raise ModelError(
            f"{inputs.description} have no rule for the defense before this model ({model.name}): use the "
            "undefended model"
        )
    try:
        output = model.module(inputs)
    except RuntimeError:
        model(torch.zeros_like(inputs.example_tensor()))  # says so, if the size of the images is the reason
        raise
    logits = next(_find_logits(output, type(inputs)), None)
    if logits is None:
        raise ModelError(f"{model.name} returns no logits that {inputs.description} could be read from")
    if model.task != "binary":
        return logits
    # One logit z as the two logits (-z/2, z/2).
    return F.linear(logits, torch.tensor([[-0.5], [0.5]]).to(logits.example_tensor()))  # type: ignore[arg-type]


def _find_logits(output: Any, kind: type[BoundTensor]) -> Iterator[BoundTensor]:
    """All bounds on (N, K), or (N,) as (N, 1), in a tensor, tuple, mapping or object with ``logits``."""
    if isinstance(output, kind) and output.dim() == 1:
        yield output.unsqueeze(1)
    elif isinstance(output, kind) and output.dim() == 2:
        yield output
    elif isinstance(output, (list, tuple, Mapping)) or hasattr(output, "logits"):
        parts = output.values() if isinstance(output, Mapping) else output
        for part in [output.logits] if hasattr(output, "logits") else parts:
            yield from _find_logits(part, kind)


def dropout_rule(func: Any, x: BoundTensor, p: float = 0.5, training: bool = True, **_: Any) -> BoundTensor:
    """The identity in eval mode. Dropout that stays active is refused: its output is random."""
    if training and p > 0:
        raise UnsupportedOperation(f"{x.description} have no rule for dropout that is active in eval mode")
    return x


def batch_norm_scale(running_var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The factor of each channel in a batch norm in eval mode."""
    scale = (running_var + eps).rsqrt()
    return scale if weight is None else scale * weight
