"""Forward passes of images that differ from one image in a window each, computed only where they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

#: Largest fraction of a feature map that a box may cover; beyond it the full feature map is computed.
_MAX_COVERAGE = 0.95

#: Operations that act on each position independently.
_ELEMENTWISE = {
    *("add", "sub", "rsub", "mul", "div", "neg", "abs", "pow", "exp", "sqrt", "clamp", "clamp_min"),
    *("clamp_max", "relu", "leaky_relu", "_prelu_kernel", "elu", "hardtanh", "hardswish", "hardsigmoid"),
    *("sigmoid", "silu", "gelu", "mish", "softplus", "tanh", "clone", "batch_norm"),
}


class _Boxes(NamedTuple):
    """A box for each window, all of one size."""

    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    height: int
    width: int


class _CleanStep(NamedTuple):
    """An operation's output for the clean image, and the boxes that windows affect; None for everywhere."""

    clean: Tensor
    boxes: _Boxes | None
    #: The operation's input for the clean image, padded.
    padded: Tensor


@dataclass(eq=False)
class WindowedImages:
    """One image (C, H, W) with each of many windows of it replaced, as batches for a network.

    ``batch([0, 1])`` stands for the first two of these images, (2, C, H, W), and passes through a network
    in inference mode as a tensor does. While operations are local (convolution, pooling, elementwise), only
    the box that the window affects is computed, and the clean image once for all windows; from the first
    other operation on, or once boxes cover most of a feature map, everything is computed. Either way the
    numbers are those of full forward passes up to rounding. ``nonlocal_operations`` are the names of the
    operations that were not local.
    """

    clean: Tensor
    replacement: Tensor
    windows: Sequence[tuple[slice, slice]]
    #: Pass plain tensors throughout, for callables that need them.
    dense: bool = False
    nonlocal_operations: set[str] = field(default_factory=set, init=False)
    indices: tuple[int, ...] = field(init=False)
    _steps: list[tuple[list[object], _CleanStep]] = field(default_factory=list, init=False)
    _position: int = field(init=False)

    def __post_init__(self) -> None:
        self.clean = self.clean[None]
        shape = self.clean.shape[2:]
        height, width = (
            min(side, max(window[axis].stop - window[axis].start for window in self.windows))
            for axis, side in enumerate(shape)
        )
        tops = tuple(min(rows.start, shape[0] - height) for rows, _ in self.windows)
        lefts = tuple(min(columns.start, shape[1] - width) for _, columns in self.windows)
        self._boxes = _Boxes(tops, lefts, height, width)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """The images of these windows, (B, C, H, W)."""
        self.indices, self._position = tuple(indices), 0
        crops = torch.cat([_crop(self.clean, self._boxes, i) for i in indices])
        for crop, i in zip(crops, indices, strict=True):
            (rows, columns), top, left = self.windows[i], self._boxes.tops[i], self._boxes.lefts[i]
            inside = crop[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
            inside.copy_(self.replacement[:, rows, columns])
        windowed = _Windowed(self, self.clean, self._boxes, crops)
        return windowed.materialize() if self.dense else windowed

    def step(self, key: list[object], compute: Callable[[], _CleanStep]) -> _CleanStep:
        """The next call's output for the clean image, computed in the first batch and cached."""
        if self._position == len(self._steps):
            self._steps.append((key, compute()))
        cached_key, step = self._steps[self._position]
        self._position += 1
        # A network with another control flow in this batch must not use the cached output of another call.
        return step if cached_key == key else compute()


def _call_key(func: Any, operands: Sequence[_Windowed], args: Any) -> list[object]:
    """A key by which the same call is recognized in another batch's pass."""
    parameters = [id(a) for a in _flat(args) if isinstance(a, nn.Parameter)]
    return [func, *parameters, *(id(a.clean) for a in operands), *(a.boxes for a in operands)]


def _crop(maps: Tensor, boxes: _Boxes, window: int) -> Tensor:
    top, left = boxes.tops[window], boxes.lefts[window]
    return maps[..., top : top + boxes.height, left : left + boxes.width]


class _Windowed(Tensor):
    """A batch (B, C, H, W) as one clean feature map (1, C, H, W) and a crop for each row, (B, C, h, w).

    Once ``dense_values`` is set, they are the batch, and the other fields are unused.
    """

    source: WindowedImages
    clean: Tensor
    boxes: _Boxes
    crops: Tensor
    dense_values: Tensor | None

    @staticmethod
    def __new__(cls, source: WindowedImages, clean: Tensor, boxes: _Boxes, crops: Tensor) -> _Windowed:
        # The strides of the dense batch: with others, a reshape that copies it would be a view here.
        like = torch.empty((len(crops), *clean.shape[1:]), device="meta")
        if clean.is_contiguous(memory_format=torch.channels_last):
            like = like.to(memory_format=torch.channels_last)
        windowed: _Windowed = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=clean.dtype, device=clean.device
        )
        windowed.source, windowed.clean, windowed.boxes, windowed.crops = source, clean, boxes, crops
        windowed.dense_values = None
        return windowed

    def __repr__(self) -> str:  # type: ignore[override]
        return f"_Windowed({tuple(self.shape)}, boxes {self.boxes.height} x {self.boxes.width})"

    def materialize(self) -> Tensor:
        """The batch as a plain tensor, cached: later views of it and writes to it share its memory."""
        if self.dense_values is None:
            self.dense_values = self.clean.repeat(len(self.crops), 1, 1, 1)
            if self.clean.is_contiguous(memory_format=torch.channels_last):
                self.dense_values = self.dense_values.contiguous(memory_format=torch.channels_last)
            for image, crop, i in zip(self.dense_values, self.crops, self.source.indices, strict=True):
                _crop(image, self.boxes, i).copy_(crop)
        return self.dense_values

    def numpy(self, *, force: bool = False) -> np.ndarray[Any, Any]:
        """The batch as an array, for modules that leave torch."""
        return self.materialize().numpy(force=force)

    def __array__(self, dtype: Any = None) -> np.ndarray[Any, Any]:
        return np.asarray(self.materialize(), dtype)

    def assign(self, other: Tensor) -> None:
        """Replace the values by another tensor's, as an in-place operation does."""
        if isinstance(other, _Windowed):
            self.clean, self.boxes, self.crops = other.clean, other.boxes, other.crops
            self.dense_values = other.dense_values
        else:
            self.dense_values = other

    def regions(self, padded: Tensor, pad: tuple[int, int], boxes: _Boxes) -> Tensor:
        """The values in other boxes, whose positions count from the corner of the padded clean map."""
        if pad == (0, 0) and boxes == self.boxes:
            return self.crops
        shape = (len(self.crops), padded.shape[1], boxes.height, boxes.width)
        # equivalent mutants: the memory format changes no value
        channels_last = padded.is_contiguous(memory_format=torch.channels_last) and padded.shape[1] > 1
        regions = padded.new_empty(shape)
        if channels_last:
            regions = regions.to(memory_format=torch.channels_last)
        for region, crop, i in zip(regions, self.crops, self.source.indices, strict=True):
            region.copy_(_crop(padded[0], boxes, i))
            top = self.boxes.tops[i] + pad[0] - boxes.tops[i]
            left = self.boxes.lefts[i] + pad[1] - boxes.lefts[i]
            skip_rows, skip_columns = max(0, -top), max(0, -left)
            inside = region[:, max(0, top) : top + self.boxes.height, max(0, left) : left + self.boxes.width]
            if top + self.boxes.height > 0 and left + self.boxes.width > 0:
                height, width = inside.shape[1:]
                inside.copy_(crop[:, skip_rows : skip_rows + height, skip_columns : skip_columns + width])
        return regions

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        operands = [a for a in _flat(args) if isinstance(a, _Windowed)]
        local = operands and all(a.dense_values is None for a in operands)
        if local:
            base_name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
            result = _apply_locally(func, base_name, operands, args, kwargs)
            if result is not NotImplemented:
                if base_name == name:
                    return result
                args[0].assign(result)
                return args[0]
            composite = torch._C._dispatch_has_kernel_for_dispatch_key(
                func.name(), "CompositeImplicitAutograd"
            )
            if composite and (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
            operands[0].source.nonlocal_operations.add(name)
        return _dense_call(func, args, kwargs)


def _flat(args: Sequence[Any]) -> list[Any]:
    return [item for a in args for item in (a if isinstance(a, (list, tuple)) else [a])]


def _apply_locally(func: Any, name: str, operands: list[_Windowed], args: Any, kwargs: Any) -> Any:
    """The result of a local operation; NotImplemented for one that is not local."""
    if any(a.ndim != 4 for a in operands) or not isinstance(args[0], (_Windowed, list)):
        return NotImplemented
    x = operands[0]
    if name in ("alias", "detach"):
        return x
    if name in _ELEMENTWISE:
        others = [a for a in args if isinstance(a, Tensor) and not isinstance(a, _Windowed)]
        if name == "batch_norm":
            return NotImplemented if args[5] else _elementwise(func, operands, args, kwargs)
        varies_by_position = any(
            a.ndim > 4 or any(side > 1 for side in (*a.shape[-2:], *a.shape[:-3])) for a in others
        )
        return NotImplemented if varies_by_position else _elementwise(func, operands, args, kwargs)
    if name == "cat":
        local = len(operands) == len(args[0]) and (*args[1:], *kwargs.values()) in ((1,), (-3,))
        return _elementwise(func, operands, args, kwargs) if local else NotImplemented
    if name == "convolution" and len(operands) == 1 and not args[6]:
        weight, stride, padding, dilation = args[1], args[3], args[4], args[5]
        valid = (*args[:4], [0, 0], *args[5:])
        return _sliding_window(func, x, args, valid, weight.shape[-2:], stride, padding, dilation, 0.0)
    if name == "max_pool2d":
        defaults: tuple[Any, ...] = ([], 0, 1)
        arguments: list[Any] = list(args[1:]) + list(defaults[len(args) - 2 :])
        kernel, stride, padding, dilation = arguments[:4]
        valid = (x, kernel, stride or kernel, 0, dilation)
        return _sliding_window(func, x, args, valid, kernel, stride or kernel, padding, dilation, -torch.inf)
    if name == "avg_pool2d":
        defaults = ([], 0, False, True, None)
        arguments = list(args[1:]) + list(defaults[len(args) - 2 :])
        kernel, stride, padding, ceil_mode, count_padding, divisor = arguments
        # A divisor that depends on the position makes it nonlocal.
        if ceil_mode or (any(_pair(padding)) and not count_padding):
            return NotImplemented
        valid = (x, kernel, stride or kernel, 0, False, True, divisor)
        return _sliding_window(func, x, args, valid, kernel, stride or kernel, padding, 1, 0.0)
    return NotImplemented


def _functional(func: Any) -> Any:
    """The out-of-place form of an operation."""
    name = func.overloadpacket.__name__
    if not name.endswith("_") or name.endswith("__"):
        return func
    return getattr(getattr(torch.ops.aten, name[:-1]), func._overloadname)


def _substitute(args: Any, operands: Sequence[_Windowed], values: Sequence[Tensor]) -> Any:
    """The arguments with each operand replaced by a plain tensor."""
    replacements = {id(a): value for a, value in zip(operands, values, strict=True)}
    return tree_map(lambda a: replacements.get(id(a), a), args)


def _dense_call(func: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = tree_map(lambda a: a.materialize() if isinstance(a, _Windowed) else a, (args, kwargs))
    return func(*args, **kwargs)


def _pair(size: Any) -> tuple[int, int]:
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes[0], sizes[-1]


def _enclosing_boxes(boxes: Sequence[_Boxes], rows: int, columns: int) -> _Boxes | None:
    """The smallest boxes of one size that enclose, window by window, all of these; None for the full map."""
    ends = []
    for starts, lengths, side in (
        ([b.tops for b in boxes], [b.height for b in boxes], rows),
        ([b.lefts for b in boxes], [b.width for b in boxes], columns),
    ):
        first = [min(positions) for positions in zip(*starts, strict=True)]
        last = [
            max(p + n for p, n in zip(positions, lengths, strict=True))
            for positions in zip(*starts, strict=True)
        ]
        length = max(end - start for start, end in zip(first, last, strict=True))
        ends.append((tuple(min(start, side - length) for start in first), length))
    (tops, height), (lefts, width) = ends
    return None if height * width > _MAX_COVERAGE * rows * columns else _Boxes(tops, lefts, height, width)


def _elementwise(func: Any, operands: list[_Windowed], args: Any, kwargs: Any) -> Any:
    """An elementwise operation, in the boxes that enclose those of all its arguments."""
    source, shape = operands[0].source, operands[0].shape[2:]
    if any(a.shape[2:] != shape or a.source is not source for a in operands):
        return NotImplemented
    func = _functional(func)

    def compute() -> _CleanStep:
        clean = func(*_substitute(args, operands, [a.clean for a in operands]), **kwargs)
        return _CleanStep(clean, _enclosing_boxes([a.boxes for a in operands], *shape), clean)

    step = source.step(_call_key(func, operands, args), compute)
    if step.boxes is None:
        return _dense_call(func, args, kwargs)
    regions = [a.regions(a.clean, (0, 0), step.boxes) for a in operands]
    return _Windowed(source, step.clean, step.boxes, func(*_substitute(args, operands, regions), **kwargs))


def _sliding_window(
    func: Any, x: _Windowed, args: Any, valid: Any, kernel: Any, stride: Any, padding: Any, dilation: Any,
    value: float,
) -> Tensor:  # fmt: skip
    """A convolution or pooling; ``valid`` are its arguments for an input that is padded already."""
    kernel, stride, padding, dilation = map(_pair, (kernel, stride, padding, dilation))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]

    def compute() -> _CleanStep:
        clean = func(*_substitute(args, [x], [x.clean]))
        sides, reach = clean.shape[-2:], []
        borders: list[int] = []
        for axis, side in enumerate(sides):
            begin = (x.boxes.tops, x.boxes.lefts)[axis]
            size = (x.boxes.height, x.boxes.width)[axis]
            s, p, span = stride[axis], padding[axis], spans[axis]
            first = [max(0, -(-(b + p - span + 1) // s)) for b in begin]
            last = [min(side - 1, (b + size - 1 + p) // s) for b in begin]
            length = max(1, *(end - start + 1 for start, end in zip(first, last, strict=True)))
            reach.append((tuple(min(start, side - length) for start in first), length))
            beyond = (side - 1) * s + span - p - x.clean.shape[2 + axis]
            borders = [p, max(0, beyond), *borders]
        (tops, height), (lefts, width) = reach
        if height * width > _MAX_COVERAGE * sides[0] * sides[1]:
            return _CleanStep(clean, None, clean)
        return _CleanStep(clean, _Boxes(tops, lefts, height, width), F.pad(x.clean, borders, value=value))

    step = x.source.step(_call_key(func, [x], args), compute)
    if step.boxes is None:
        return _dense_call(func, args, {})
    tops, lefts, height, width = step.boxes
    input_boxes = _Boxes(
        tuple(top * stride[0] for top in tops),
        tuple(left * stride[1] for left in lefts),
        (height - 1) * stride[0] + spans[0],
        (width - 1) * stride[1] + spans[1],
    )
    region = x.regions(step.padded, (padding[0], padding[1]), input_boxes)
    return _Windowed(x.source, step.clean, step.boxes, func(*_substitute(valid, [x], [region])))
