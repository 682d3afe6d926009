"""``RecordAttention``, ``RecordQueries``: the attention calls of a network, without changing a module."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from inspect import signature
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .backward_calls import is_backward, run_backward
from .saved_tensors import save_tensors

#: ``F.multi_head_attention_forward`` passes itself to an active mode, which would never see the calls inside;
#: this copy does not.
_multi_head_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def multi_head_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward``, of which an active mode receives the calls inside."""
    result: tuple[Tensor, Tensor | None] = _multi_head_attention(*args, **kwargs)
    return result


def calling_module(names: Mapping[int, str]) -> str:
    """The name of the innermost module whose code is running; empty for the network itself.

    names: the names of the modules, by their ``id``.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        # By frame and not by hook: no interruption can leave a hook behind.
        if (name := names.get(id(frame.f_locals.get("self")))) is not None:
            return name
        frame = frame.f_back
    return ""


class RecordAttention(TorchFunctionMode):
    """Records the probabilities softmax(Q K^T / sqrt(d)) of the attention calls inside its ``with`` block.

    ``maps`` has them by the name of the module whose ``forward`` calls, (N, heads, queries, keys), on the
    graph: the network continues with these tensors. They are computed explicitly, also where the call is
    fused; a softmax over the last axis of a tensor with four axes is an unfused attention. Attention inside
    windows has the windows of all images on the first axis. ``calls`` counts the calls of each module, of
    which ``maps`` has the last. ``unreadable`` are modules whose attention has more axes, so that heads and
    windows cannot be distinguished.

    modules: the modules by name.
    window_axes: of modules whose attention has five axes, images, windows and heads or heads and windows,
        queries, keys: that of the windows, 1 or 2.
    replace: returns what the network continues with instead of the probabilities, of the module's name and
        the probabilities; what it returns is recorded.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        replace: Callable[[str, Tensor], Tensor] | None = None,
        window_axes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self._window_axes = window_axes or {}
        self.maps: dict[str, Tensor] = {}
        self.calls: Counter[str] = Counter()
        self.unreadable: set[str] = set()
        self._replace = replace
        # A softmax that is a module of its own belongs to the module that calls it.
        self._names = {id(m): name for name, m in modules.items() if not isinstance(m, nn.Softmax)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_backward(func):
            return run_backward(self, func, args, kwargs)
        # The probabilities have gradients after the block, where a checkpoint would not compute them again.
        with save_tensors():
            return self._call(func, args, kwargs)

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attend_multi_head(*args, **kwargs)
        output = func(*args, **kwargs)
        if getattr(func, "__name__", "") == "softmax" and output.ndim >= 4:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if dim in (-1, output.ndim - 1):
                return self._record(output)
        return output

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Scaled dot-product attention whose probabilities are recorded."""
        if enable_gqa:  # several heads of the query share one of the key
            groups = query.shape[-3] // key.shape[-3]
            key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
        logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones_like(logits[0, ...], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            logits = logits + attn_mask
        probabilities = logits.softmax(-1)
        if probabilities.ndim == 3:  # a single head; the recorded tensor must be what the network uses
            recorded = self._record(probabilities[:, None])
            return F.dropout(recorded[:, 0], dropout_p) @ value
        return F.dropout(self._record(probabilities), dropout_p) @ value

    def _attend_multi_head(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """``F.multi_head_attention_forward``, through the attention call that is recorded."""
        bound = signature(F.multi_head_attention_forward).bind(*args, **kwargs)
        bound.apply_defaults()
        needs_weights = bound.arguments["need_weights"]
        bound.arguments["need_weights"] = False  # else it computes the softmax itself, in three axes
        name = self._caller()
        with self:
            output, _ = multi_head_attention(*bound.args, **bound.kwargs)
        if not needs_weights:
            return output, None
        weights = self.maps[name]
        if bound.arguments["average_attn_weights"]:
            weights = weights.mean(1)
        return output, weights if bound.arguments["query"].ndim == 3 else weights[0]

    def _record(self, probabilities: Tensor) -> Tensor:
        """Record an attention's probabilities. Returns what the network continues with."""
        name = self._caller()
        self.calls[name] += 1
        if probabilities.ndim == 5 and name in self._window_axes:
            rows = windows_first(probabilities, self._window_axes[name])
            recorded = self._store(name, rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
            return windows_first(recorded, self._window_axes[name])
        if probabilities.ndim != 4:
            self.unreadable.add(name)
            return probabilities
        return self._store(name, probabilities)

    def _store(self, name: str, probabilities: Tensor) -> Tensor:
        if self._replace is not None:
            probabilities = self._replace(name, probabilities)
        self.maps[name] = probabilities
        return probabilities

    def _caller(self) -> str:
        return calling_module(self._names)


def windows_first(values: Tensor, axis: int) -> Tensor:
    """Values of five axes with the windows of ``axis``, 1 or 2, on axis 1; applied twice it is undone."""
    return values.transpose(1, axis)


class RecordQueries(RecordAttention):
    """Records the queries of the attention calls inside its block, which run unchanged.

    ``queries`` has them by module: (N, heads, queries, d), or of an unfused attention the probabilities.
    With windows on an axis of their own they have five axes.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(modules)
        self.queries: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else (kwargs or {})["query"]
            self.queries[self._caller()] = query if query.ndim >= 4 else query[:, None]
        elif func is F.multi_head_attention_forward:
            query = args[0] if args else (kwargs or {})["query"]
            self.queries[self._caller()] = query.transpose(0, 1)[:, None]
        elif getattr(func, "__name__", "") == "softmax" and output.ndim in (4, 5):
            self.queries[self._caller()] = output
        return output
