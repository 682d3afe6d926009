"""The pass of coordinates: a network run on the positions of its pixels instead of their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..hooks.attention import RecordQueries
from .module_copy import copy_without_hooks

Pair = tuple[int, int]


def coordinate_images(shape: tuple[int, int, int]) -> list[Tensor]:
    """An image (1, C, H, W) of the y coordinates of its pixels, and one of the x coordinates."""
    with torch.inference_mode(False):
        y, x = (torch.arange(side, dtype=torch.float64) for side in shape[1:])
        return [v.expand(1, *shape).clone() for v in (y[:, None], x)]


def copy_on_cpu(module: nn.Module) -> nn.Module:
    """A copy, since other threads may be using the module, and taps may be open.

    Coordinates are in double precision, which some devices do not have. Weights on the CPU are shared.
    """
    memo: dict[int, Any] = {id(value): value for value in module.parameters()}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "cpu":
            moved = tensor.detach().cpu()
            is_weight = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if is_weight else moved
    return copy_without_hooks(module, memo)


def query_positions(module: nn.Module, input_size: tuple[int, int, int]) -> list[dict[str, Tensor]]:
    """By axis of the image: the positions of the queries of each attention, without the axis of features.

    (N, heads, queries), or of five axes (N, windows, heads, queries) or (N, heads, windows, queries); no
    axis where a pass fails.
    """
    axes = []
    with torch.inference_mode(False), torch.no_grad():
        try:
            network = copy_on_cpu(module)
            for image in coordinate_images(input_size):
                with RecordQueries(dict(network.named_modules())) as recording:
                    network(wrap_positions(image))
                axes.append({n: unwrap_positions(q).nanmean(-1) for n, q in recording.queries.items()})
        except Exception:  # foreign code may raise anything for tensors whose values it does not expect
            return []
    return axes


def window_axes(module: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """Of the layers whose attention has five axes, that of the windows, 1 or 2.

    The positions of the queries differ between windows, and are those of every head. Layers are missing where
    the network's functions do not reveal the positions.
    """
    candidates: dict[str, set[int]] = {}
    for positions in query_positions(module, input_size):
        for layer, values in positions.items():
            if values.ndim != 4:
                continue
            heads = {axis for axis in (1, 2) if values.allclose(values.narrow(axis, 0, 1))}
            # An axis of one head, or of one window, has the same positions as well.
            moved = {1, 2} - heads or {axis for axis in heads if values.shape[axis] == 1}
            candidates[layer] = candidates.get(layer, {1, 2}) & moved
    return {layer: min(axes) for layer, axes in candidates.items() if len(axes) == 1}


# --- the pass of coordinates --------------------------------------------------------------------
# Each value is the coordinate, along one axis of the image, at which a unit is centered; NaN where it has
# none. All functions that move values run as they are; all that compute with them follow these rules.


class Positions(Tensor):
    """Coordinates of units. Other tensors that a network computes with (weights) have no positions."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, args, kwargs or {})


def wrap_positions(value: Any) -> Any:
    return value.as_subclass(Positions) if _is_number(value) else value


def unwrap_positions(value: Any) -> Any:
    """Coordinates as a plain tensor; of other numbers NaN, in a tensor without memory of its own."""
    if isinstance(value, Positions):
        return value.as_subclass(Tensor)
    return _nowhere(value) if _is_number(value) else value


def _nowhere(like: Tensor) -> Tensor:
    return torch.full((), math.nan, dtype=torch.float64, device=like.device).expand(like.shape)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    name = func.__name__.partition(".")[0]  # "conv2d.default" in exported programs
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or name in _IN_PLACE or name == "__setitem__":
        target = args[0]
        if not isinstance(target, Positions):
            return target  # a weight or a buffer, which must not change
        plain, rest = target.as_subclass(Tensor), [tree_map(unwrap_positions, value) for value in args[1:]]
        if name == "__setitem__" and not isinstance(rest[1], Tensor):
            rest[1] = math.nan
        if name in _MOVES:
            return wrap_positions(func(plain, *rest, **tree_map(unwrap_positions, kwargs)))
        if name not in ("requires_grad_", "detach_"):
            fills = name in ("zero_", "fill_", "normal_", "uniform_")
            plain.copy_(_nowhere(plain) if fills else _mean([plain, *rest], plain.shape))
        return target
    args, kwargs = tree_map(unwrap_positions, args), tree_map(unwrap_positions, kwargs)
    rule = _RULES.get(name, _other)
    if name == "unfold" and func is not F.unfold:  # the method returns a view
        rule = _RULES["view"]
    return tree_map(wrap_positions, rule(func, *args, **kwargs))


def _mean(values: Sequence[Any], shape: Sequence[int]) -> Tensor:
    """The mean of the coordinates among the values, each expanded to the shape."""
    tensors = [v.expand(shape) for v in values if _is_number(v) and not v.isnan().all()]
    if not tensors:
        return _nowhere(next(v for v in values if _is_number(v))).expand(shape)
    return tensors[0].clone() if len(tensors) == 1 else torch.stack(tensors).nanmean(0)


def _without_constants(positions: Tensor) -> Tensor:
    """NaN where all units have the same center: then each of them depends on the entire axis."""
    placed = positions[positions.isfinite()]
    if placed.numel() and float(placed.max() - placed.min()) < 1e-6:
        return _nowhere(positions)
    return positions


def _move(func: Any, *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _same(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input.clone()


def _blank(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Of functions that create tensors in the shape of others."""
    return _nowhere(func(*args, **kwargs)).clone()


def _elementwise(func: Any, *values: Any, **kwargs: Any) -> Tensor:
    numbers = [v for v in (*values, *kwargs.values()) if _is_number(v)]
    return _mean(numbers, torch.broadcast_shapes(*(v.shape for v in numbers)))


def _other(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Any other function: of outputs in the inputs' shape the inputs' positions, of all others none."""
    numbers = [v for v in tree_leaves((args, kwargs)) if _is_number(v)]
    output = func(*args, **(kwargs | {"inplace": False} if "inplace" in kwargs else kwargs))

    def position(value: Any) -> Any:
        if not _is_number(value):
            return value
        fitting = [v for v in numbers if not v.isnan().all() and _expands(v.shape, value.shape)]
        if value.is_complex() or not fitting or not any(v.shape == value.shape for v in numbers):
            return torch.full_like(value, math.nan)
        return _mean(fitting, value.shape)

    return tree_map(position, output)


def _expands(shape: Sequence[int], target: Sequence[int]) -> bool:
    tail = target[len(target) - len(shape) :]
    return len(shape) <= len(target) and all(s in (1, t) for s, t in zip(shape, tail, strict=True))


def _reduce(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A mean, sum or maximum along dimensions, or the maximum of two tensors."""
    if args and isinstance(args[0], Tensor):
        return _elementwise(func, input, args[0])
    output = func(input, *args, **kwargs)
    dims = kwargs.get("dim", kwargs.get("axis", args[0] if args else None))
    shape = (output if isinstance(output, Tensor) else output[0]).shape
    mean = input.nanmean() if dims is None else input.nanmean(dims)
    mean = _without_constants(mean.reshape(shape))
    return mean if isinstance(output, Tensor) else (mean, output[1])


def _linear(func: Any, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return _without_constants(input.nanmean(-1, keepdim=True)).expand(*input.shape[:-1], len(weight)).clone()


def _matmul(func: Any, left: Tensor, right: Tensor) -> Any:
    """The position of the factor whose summed numbers are all of one position.

    Of an attention's output it is that of the query; a sum over several positions has none, unless all are
    multiplied by weights.
    """
    if min(left.ndim, right.ndim) < 2:
        return _other(func, left, right)
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    shape = (*batch, left.shape[-2], right.shape[-1])
    if left.shape == right.mT.shape and float((left - right.mT).abs().nan_to_num().max()) > 1e-6:
        return _nowhere(left).new_full(shape, math.nan)  # queries that are not the units themselves
    for factor, dim in ((left, -1), (right, -2)):
        if _spread(factor, dim) < 1e-6:
            return factor.nanmean(dim, keepdim=True).expand(shape).clone()
    mean = left.nanmean(-1, keepdim=True) if right.isnan().all() else _nowhere(left[..., :1])
    return _without_constants(mean).expand(shape).clone()


def _spread(values: Tensor, dim: int) -> float:
    """Largest distance between the positions along a dimension; infinite where there are none."""
    low, high = (v.nan_to_num(nan=n).amax(dim) for v, n in ((-values, -math.inf), (values, -math.inf)))
    distance = (low + high)[low.isfinite()]
    return float(distance.max()) if distance.numel() else math.inf


def _einsum(func: Any, equation: str, *operands: Any) -> Any:
    """As ``_matmul``: the first operand whose summed numbers are all of one position."""
    operands = tuple(operands[0]) if len(operands) == 1 and not isinstance(operands[0], Tensor) else operands
    output: Tensor = func(equation, *operands)
    inputs, _, letters = equation.replace(" ", "").partition("->")
    if "." not in equation and letters:
        for names, operand in zip(inputs.split(","), operands, strict=True):
            summed = [d for d, letter in enumerate(names) if letter not in letters]
            if operand.isnan().all() or any(_spread(operand, d) > 1e-6 for d in summed):
                continue
            mean = operand.nanmean(summed) if summed else operand
            rest = [letter for letter in names if letter in letters]
            order = [rest.index(letter) for letter in letters if letter in rest]
            index = tuple(slice(None) if letter in rest else None for letter in letters)
            return mean.permute(order)[index].expand(output.shape).clone()
    return torch.full_like(output, math.nan)


def _attention(func: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _matmul(func, _matmul(func, query, key.mT), value)


def _multi_head_attention(func: Any, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return query.clone(), None


# --- windows: interpolation between the coordinates of the input, extrapolated beyond its borders ---


def _at(values: Tensor, indices: Tensor, dim: int) -> Tensor:
    """Values at fractional indices along a dimension, linear between and beyond the given ones."""
    last = values.shape[dim] - 1
    if last == 0:
        return values.expand([len(indices) if d == dim % values.ndim else -1 for d in range(values.ndim)])
    low = indices.floor().clamp(0, last - 1).long()
    below, above = values.index_select(dim, low), values.index_select(dim, low + 1)
    weight = (indices - low).view(-1, *[1] * (values.ndim - 1 - dim % values.ndim))
    return below + weight * (above - below)


def _at_grid(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return _at(_at(values, rows, -2), columns, -1)


def _steps(values: Tensor, count: int) -> Tensor:
    return torch.arange(count, dtype=values.dtype, device=values.device)


def _both(value: Any) -> Pair:
    value = [value] if isinstance(value, int) else list(value)
    return value[0], value[-1]


def _conv2d(
    func: Any, input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """At the middle of the kernel: the mean over the channels of each group."""
    axes = []
    for d, (kernel, step, spread) in enumerate(
        zip(weight.shape[2:], _both(stride), _both(dilation), strict=True)
    ):
        reach = spread * (kernel - 1)
        before, after = (0, 0) if padding == "valid" else (reach // 2, reach - reach // 2)
        if not isinstance(padding, str):
            before = after = _both(padding)[d]
        count = (input.shape[2 + d] + before + after - reach - 1) // step + 1
        axes.append(_steps(input, count) * step - before + reach / 2)
    means = input.unflatten(1, (groups, -1)).nanmean(2)
    positions = _without_constants(_at_grid(means, *axes))
    return positions.repeat_interleave(len(weight) // groups, 1)


def _conv_transpose2d(
    func: Any, input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Tensor:  # fmt: skip
    axes = []
    for d, (kernel, step, spread) in enumerate(
        zip(weight.shape[2:], _both(stride), _both(dilation), strict=True)
    ):
        reach, pad, more = spread * (kernel - 1), _both(padding)[d], _both(output_padding)[d]
        count = (input.shape[2 + d] - 1) * step - 2 * pad + reach + more + 1
        axes.append((_steps(input, count) + pad - reach / 2) / step)
    means = input.unflatten(1, (groups, -1)).nanmean(2)
    return _at_grid(means, *axes).repeat_interleave(weight.shape[1], 1)


def _pool(
    func: Any,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The middle of each window, or of the part inside the padding where ceil mode extends beyond it."""
    output = func(input, kernel_size, stride, padding, *args, **kwargs)
    counts = (output if isinstance(output, Tensor) else output[0]).shape[-2:]
    dilates = "max" in func.__name__
    dilation = _both(kwargs.get("dilation", args[0] if args and dilates else 1) if dilates else 1)
    axes = []
    kernels, steps, pads = _both(kernel_size), _both(stride or kernel_size), _both(padding)
    for d, (kernel, step, pad, spread) in enumerate(zip(kernels, steps, pads, dilation, strict=True)):
        first = _steps(input, counts[d]) * step - pad
        inside = ((input.shape[d - 2] - 1 + pad - first) / spread).floor().clamp(0, kernel - 1)
        axes.append(first + spread * inside / 2)
    positions = _without_constants(_at_grid(input, *axes))
    return positions if isinstance(output, Tensor) else (positions, output[1])


def _adaptive_pool(func: Any, input: Tensor, output_size: Any, *args: Any, **kwargs: Any) -> Any:
    output = func(input, output_size, *args, **kwargs)
    counts = (output if isinstance(output, Tensor) else output[0]).shape[-2:]
    axes = []
    for before, after in zip(input.shape[-2:], counts, strict=True):
        i = _steps(input, after)
        first, last = (i * before / after).floor(), ((i + 1) * before / after).ceil() - 1
        axes.append((first + last) / 2 if after <= before else _stretched(input, before, after))
    positions = _without_constants(_at_grid(input, *axes))
    return positions if isinstance(output, Tensor) else (positions, output[1])


def _stretched(values: Tensor, before: int, after: int) -> Tensor:
    """The positions of the cells of one grid in those of another over the same image."""
    return (_steps(values, after) + 0.5) * before / after - 0.5


def _interpolate(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    counts = func(input[:, :1], *args, **kwargs).shape[2:]
    if input.ndim != 4:
        return _other(func, input, *args, **kwargs)
    axes = []
    for before, after in zip(input.shape[2:], counts, strict=True):
        corners = kwargs.get("align_corners") and after > 1
        scaled = _steps(input, after) * (before - 1) / max(1, after - 1)
        axes.append(scaled if corners else _stretched(input, before, after))
    return _at_grid(input, *axes)


def _pixel_shuffle(func: Any, input: Tensor, upscale_factor: int) -> Tensor:
    means = input.unflatten(-3, (-1, upscale_factor**2)).nanmean(-3)
    return _at_grid(means, *(_stretched(means, n, n * upscale_factor) for n in means.shape[-2:]))


def _pad(func: Any, input: Tensor, pad: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
    """Coordinates continue in the padding."""
    for number in range(len(pad) // 2):
        before, after = pad[2 * number], pad[2 * number + 1]
        count = input.shape[-1 - number] + before + after
        input = _at(input, _steps(input, count) - before, -1 - number)
    return input.clone()


def _unfold(
    func: Any, input: Tensor, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Tensor:
    down, right = _both(padding)
    columns: Tensor = func(_pad(func, input, (right, right, down, down)), kernel_size, dilation, 0, stride)
    return columns


def _names(text: str) -> Iterator[str]:
    return iter(text.split())


_IN_PLACE = {f"__i{name}__" for name in _names("add sub mul truediv floordiv pow mod and or xor")}

#: Functions that move values, and compute nothing with them.
_MOVES = {
    *_names("view reshape view_as reshape_as permute transpose flatten unflatten squeeze unsqueeze ravel"),
    *_names(
        "expand expand_as repeat tile contiguous chunk split tensor_split unbind cat concat stack hstack"
    ),
    *_names("vstack dstack roll flip fliplr flipud rot90 __getitem__ __setitem__ select narrow index_select"),
    *_names("gather take_along_dim movedim moveaxis swapaxes swapdims pixel_unshuffle channel_shuffle"),
    *_names(
        "native_channel_shuffle repeat_interleave clone detach t T adjoint as_strided diagonal tril triu"
    ),
    *_names("broadcast_to split_with_sizes unsafe_chunk unsafe_split meshgrid atleast_2d alias"),
    *_names("__get__ __set__ copy_ squeeze_ unsqueeze_ transpose_ t_ swapaxes_ index_copy_"),
}

_RULES: dict[str, Callable[..., Any]] = {
    name: rule
    for rule, names in (
        (_move, _MOVES),
        (_same, "to float half double bfloat16 type type_as cuda cpu softmax log_softmax softmin dropout"),
        (_same, "dropout2d alpha_dropout feature_dropout batch_norm layer_norm group_norm instance_norm"),
        (_same, "rms_norm local_response_norm native_layer_norm prelu relu gelu silu normalize"),
        (_elementwise, "add sub subtract mul multiply div divide true_divide __add__ __radd__ __sub__"),
        (_elementwise, "__rsub__ rsub __mul__ __rmul__ __truediv__ __rtruediv__ maximum minimum lerp"),
        (_elementwise, "addcmul"),
        (_blank, "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones"),
        # A sum of overlapping windows: their positions in the windows are unknown after an attention.
        (_blank, "new_empty new_full new_tensor fold"),
        (_reduce, "mean sum nanmean amax amin max min"),
        (_linear, "linear"),
        (_matmul, "matmul __matmul__ bmm mm"),
        (lambda func, right, left: _matmul(func, left, right), "__rmatmul__"),
        (lambda func, _, left, right, **__: _matmul(func, left, right), "addmm baddbmm"),
        (_einsum, "einsum"),
        (_attention, "scaled_dot_product_attention"),
        (_multi_head_attention, "multi_head_attention_forward"),
        (_conv2d, "conv2d"),
        (_conv_transpose2d, "conv_transpose2d"),
        (_pool, "max_pool2d max_pool2d_with_indices avg_pool2d"),
        (_adaptive_pool, "adaptive_avg_pool2d adaptive_max_pool2d adaptive_max_pool2d_with_indices"),
        (_interpolate, "interpolate upsample"),
        (_pixel_shuffle, "pixel_shuffle"),
        (_pad, "pad"),
        (_unfold, "unfold"),
    )
    for name in (names.split() if isinstance(names, str) else names)
}
