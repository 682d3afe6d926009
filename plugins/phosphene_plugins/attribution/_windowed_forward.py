"""Many pictures that differ from one in a window each: only what a window can reach is computed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

#: A box that covers more of a map than this is not worth cutting out of it.
_WHOLE = 0.95


#: What works on every place by itself.
_ELEMENTWISE = {
    *(
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "neg",
        "abs",
        "pow",
        "exp",
        "sqrt",
        "clamp",
        "clamp_min",
        "clamp_max",
    ),
    *(
        "relu",
        "leaky_relu",
        "_prelu_kernel",
        "elu",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "silu",
    ),
    *("gelu", "mish", "softplus", "tanh", "clone", "batch_norm"),
}


class _Boxes(NamedTuple):
    """One box for each window of a sweep, all of one size."""

    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    height: int
    width: int


class _Step(NamedTuple):
    """What an operation gives on the clean picture, and where windows reach: boxes None where everywhere."""

    clean: Tensor
    boxes: _Boxes | None
    #: What it slides over: the clean map with its border.
    padded: Tensor


@dataclass(eq=False)
class Sweep:
    """One picture (C, H, W) with each of many windows of it replaced, for a network to look at.

    ``sweep.pictures([0, 1])`` stands for the first two of them, (2, C, H, W), and goes through a network
    in inference mode as a tensor does. While operations are local (convolution, pooling, what works on
    every place by itself), only the box that the window reaches is computed, and the clean picture
    once for all windows; from the first other operation on, or once boxes cover most of a map, all is
    computed. Either way the numbers are those of the whole pictures up to rounding. ``without_rule``
    names the operations that were not local.
    """

    clean: Tensor
    replaced: Tensor
    windows: Sequence[tuple[slice, slice]]
    #: Compute whole pictures throughout: for what must be given plain tensors.
    whole: bool = False
    without_rule: set[str] = field(default_factory=set, init=False)
    chosen: tuple[int, ...] = field(default=(), init=False)
    _steps: list[tuple[list[object], _Step]] = field(default_factory=list, init=False)
    _place: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.clean = self.clean[None]
        shape = self.clean.shape[2:]
        tall, wide = (
            min(side, max(window[axis].stop - window[axis].start for window in self.windows))
            for axis, side in enumerate(shape)
        )
        tops = tuple(min(rows.start, shape[0] - tall) for rows, _ in self.windows)
        lefts = tuple(min(columns.start, shape[1] - wide) for _, columns in self.windows)
        self._boxes = _Boxes(tops, lefts, tall, wide)

    def pictures(self, chosen: Sequence[int]) -> Tensor:
        """The pictures of these windows, (B, C, H, W)."""
        self.chosen, self._place = tuple(chosen), 0
        crops = torch.cat([_cut(self.clean, self._boxes, i) for i in chosen])
        for crop, i in zip(crops, chosen, strict=True):
            (rows, columns), top, left = self.windows[i], self._boxes.tops[i], self._boxes.lefts[i]
            inside = crop[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
            inside.copy_(self.replaced[:, rows, columns])
        windowed = _Windowed(self, self.clean, self._boxes, crops)
        return windowed.dense() if self.whole else windowed

    def step(self, call: list[object], make: Callable[[], _Step]) -> _Step:
        """What the call that comes now gives on the clean picture, kept from the first time."""
        if self._place == len(self._steps):
            self._steps.append((call, make()))
        before, step = self._steps[self._place]
        self._place += 1
        # A network that goes another way this time gets nothing from what was kept.
        return step if before == call else make()


def _call(func: Any, own: Sequence[_Windowed], args: Any) -> list[object]:
    """Which call this is, as it is recognised among those of another pass."""
    lasting = [id(a) for a in _flat(args) if isinstance(a, nn.Parameter)]
    return [func, *lasting, *(id(a.clean) for a in own), *(a.boxes for a in own)]


def _cut(maps: Tensor, boxes: _Boxes, window: int) -> Tensor:
    top, left = boxes.tops[window], boxes.lefts[window]
    return maps[..., top : top + boxes.height, left : left + boxes.width]


class _Windowed(Tensor):
    """A batch (B, C, H, W) as one clean map (1, C, H, W) and a crop for each row, (B, C, h, w)."""

    sweep: Sweep
    clean: Tensor
    boxes: _Boxes
    crops: Tensor
    whole: Tensor | None

    @staticmethod
    def __new__(cls, sweep: Sweep, clean: Tensor, boxes: _Boxes, crops: Tensor) -> _Windowed:
        # Laid out as all of it would be, so that it is reshaped where that cannot be viewed otherwise.
        like = torch.empty((len(crops), *clean.shape[1:]), device="meta")
        if clean.is_contiguous(memory_format=torch.channels_last):
            like = like.to(memory_format=torch.channels_last)
        made: _Windowed = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=clean.dtype, device=clean.device
        )
        made.sweep, made.clean, made.boxes, made.crops, made.whole = sweep, clean, boxes, crops, None
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"_Windowed({tuple(self.shape)}, boxes {self.boxes.height} x {self.boxes.width})"

    def dense(self) -> Tensor:
        """All of it. From here on it is this: what views it and writes to it means the same numbers."""
        if self.whole is None:
            self.whole = self.clean.repeat(len(self.crops), 1, 1, 1)
            if self.clean.is_contiguous(memory_format=torch.channels_last):
                self.whole = self.whole.contiguous(memory_format=torch.channels_last)
            for picture, crop, i in zip(self.whole, self.crops, self.sweep.chosen, strict=True):
                _cut(picture, self.boxes, i).copy_(crop)
        return self.whole

    def become(self, other: Tensor) -> None:
        """Hold another's values: what an operation in place does."""
        if isinstance(other, _Windowed):
            self.clean, self.boxes, self.crops, self.whole = (
                other.clean,
                other.boxes,
                other.crops,
                other.whole,
            )
        else:
            self.whole = other

    def regions(self, padded: Tensor, pad: tuple[int, int], boxes: _Boxes) -> Tensor:
        """The values in other boxes, counted in the clean map with its border ``pad``."""
        if pad == (0, 0) and boxes == self.boxes:
            return self.crops
        shape = (len(self.crops), padded.shape[1], boxes.height, boxes.width)
        channels_last = padded.is_contiguous(memory_format=torch.channels_last) and padded.shape[1] > 1
        found = padded.new_empty(shape)
        if channels_last:
            found = found.to(memory_format=torch.channels_last)
        for region, crop, i in zip(found, self.crops, self.sweep.chosen, strict=True):
            region.copy_(_cut(padded[0], boxes, i))
            top = self.boxes.tops[i] + pad[0] - boxes.tops[i]
            left = self.boxes.lefts[i] + pad[1] - boxes.lefts[i]
            up, near = max(0, -top), max(0, -left)
            inside = region[:, max(0, top) : top + self.boxes.height, max(0, left) : left + self.boxes.width]
            if top + self.boxes.height > 0 and left + self.boxes.width > 0:
                inside.copy_(crop[:, up : up + inside.shape[1], near : near + inside.shape[2]])
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        own = [a for a in _flat(args) if isinstance(a, _Windowed)]
        local = own and all(a.whole is None for a in own)
        if local:
            plain = name[:-1] if name.endswith("_") and not name.endswith("__") else name
            result = _local(func, plain, own, args, kwargs)
            if result is not NotImplemented:
                if plain == name:
                    return result
                args[0].become(result)
                return args[0]
            composite = torch._C._dispatch_has_kernel_for_dispatch_key(
                func.name(), "CompositeImplicitAutograd"
            )
            if composite and (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
            own[0].sweep.without_rule.add(name)
        return _dense_call(func, args, kwargs)


def _flat(args: Sequence[Any]) -> list[Any]:
    return [item for a in args for item in (a if isinstance(a, (list, tuple)) else [a])]


def _local(func: Any, name: str, own: list[_Windowed], args: Any, kwargs: Any) -> Any:
    """The result of an operation by its rule; NotImplemented where there is none."""
    if any(a.ndim != 4 for a in own) or not isinstance(args[0], (_Windowed, list)):
        return NotImplemented
    x = own[0]
    if name in ("alias", "detach"):
        return x
    if name in _ELEMENTWISE:
        others = [a for a in args if isinstance(a, Tensor) and not isinstance(a, _Windowed)]
        if name == "batch_norm":
            return NotImplemented if args[5] else _together(func, own, args, kwargs)
        spread = any(a.ndim > 4 or any(side > 1 for side in (*a.shape[-2:], *a.shape[:-3])) for a in others)
        return NotImplemented if spread else _together(func, own, args, kwargs)
    if name == "cat":
        sound = len(own) == len(args[0]) and (*args[1:], *kwargs.values()) in ((1,), (-3,))
        return _together(func, own, args, kwargs) if sound else NotImplemented
    if name == "convolution" and len(own) == 1 and not args[6]:
        weight, stride, padding, dilation = args[1], args[3], args[4], args[5]
        valid = (*args[:4], [0, 0], *args[5:])
        return _sliding(func, x, args, valid, weight.shape[-2:], stride, padding, dilation, 0.0)
    if name == "max_pool2d":
        usual: tuple[Any, ...] = ([], 0, 1)
        given: list[Any] = list(args[1:]) + list(usual[len(args) - 2 :])
        kernel, stride, padding, dilation = given[:4]
        valid = (x, kernel, stride or kernel, 0, dilation)
        return _sliding(func, x, args, valid, kernel, stride or kernel, padding, dilation, -torch.inf)
    if name == "avg_pool2d":
        usual = ([], 0, False, True, None)
        given = list(args[1:]) + list(usual[len(args) - 2 :])
        kernel, stride, padding, hanging, counted, divisor = given
        # Where the divisor depends on the place it is no local rule.
        if hanging or (any(_pair(padding)) and not counted):
            return NotImplemented
        valid = (x, kernel, stride or kernel, 0, False, True, divisor)
        return _sliding(func, x, args, valid, kernel, stride or kernel, padding, 1, 0.0)
    return NotImplemented


def _functional(func: Any) -> Any:
    """The same operation as one that writes in no argument of its own."""
    name = func.overloadpacket.__name__
    if not name.endswith("_") or name.endswith("__"):
        return func
    return getattr(getattr(torch.ops.aten, name[:-1]), func._overloadname)


def _replaced(args: Any, own: Sequence[_Windowed], values: Sequence[Tensor]) -> Any:
    """The arguments with these values in their own one's place."""
    by = {id(a): value for a, value in zip(own, values, strict=True)}
    return tree_map(lambda a: by.get(id(a), a), args)


def _dense_call(func: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = tree_map(lambda a: a.dense() if isinstance(a, _Windowed) else a, (args, kwargs))
    return func(*args, **kwargs)


def _pair(size: Any) -> tuple[int, int]:
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes[0], sizes[-1]


def _hull(several: Sequence[_Boxes], rows: int, columns: int) -> _Boxes | None:
    """The smallest boxes of one size that hold, window by window, all of these; None where they cover all."""
    ends = []
    for starts, lengths, side in (
        ([b.tops for b in several], [b.height for b in several], rows),
        ([b.lefts for b in several], [b.width for b in several], columns),
    ):
        first = [min(places) for places in zip(*starts, strict=True)]
        last = [
            max(p + n for p, n in zip(places, lengths, strict=True)) for places in zip(*starts, strict=True)
        ]
        length = max(end - start for start, end in zip(first, last, strict=True))
        ends.append((tuple(min(start, side - length) for start in first), length))
    (tops, height), (lefts, width) = ends
    return None if height * width > _WHOLE * rows * columns else _Boxes(tops, lefts, height, width)


def _together(func: Any, own: list[_Windowed], args: Any, kwargs: Any) -> Any:
    """An operation place by place, in the boxes that hold those of all its arguments."""
    sweep, shape = own[0].sweep, own[0].shape[-2:]
    if any(a.shape[-2:] != shape or a.sweep is not sweep for a in own):
        return NotImplemented
    func = _functional(func)

    def make() -> _Step:
        clean = func(*_replaced(args, own, [a.clean for a in own]), **kwargs)
        return _Step(clean, _hull([a.boxes for a in own], *shape), clean)

    step = sweep.step(_call(func, own, args), make)
    if step.boxes is None:
        return _dense_call(func, args, kwargs)
    regions = [a.regions(a.clean, (0, 0), step.boxes) for a in own]
    return _Windowed(sweep, step.clean, step.boxes, func(*_replaced(args, own, regions), **kwargs))


def _sliding(
    func: Any, x: _Windowed, args: Any, valid: Any, kernel: Any, stride: Any, padding: Any, dilation: Any,
    value: float,
) -> Tensor:  # fmt: skip
    """An operation on a sliding window; ``valid`` are its arguments where the border is there already."""
    kernel, stride, padding, dilation = map(_pair, (kernel, stride, padding, dilation))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]

    def make() -> _Step:
        clean = func(*_replaced(args, [x], [x.clean]))
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
        if height * width > _WHOLE * sides[0] * sides[1]:
            return _Step(clean, None, clean)
        return _Step(clean, _Boxes(tops, lefts, height, width), F.pad(x.clean, borders, value=value))

    step = x.sweep.step(_call(func, [x], args), make)
    if step.boxes is None:
        return _dense_call(func, args, {})
    tops, lefts, height, width = step.boxes
    seen = _Boxes(
        tuple(top * stride[0] for top in tops),
        tuple(left * stride[1] for left in lefts),
        (height - 1) * stride[0] + spans[0],
        (width - 1) * stride[1] + spans[1],
    )
    region = x.regions(step.padded, (padding[0], padding[1]), seen)
    return _Windowed(x.sweep, step.clean, step.boxes, func(*_replaced(valid, [x], [region])))
