"""Exact receptive fields of any network, by autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import InputError, ModelError
from . import Model

Place = tuple[int, int]


def receptive_fields(model: Model, layer: str, size: tuple[int, int], places: Sequence[Place]) -> Tensor:
    """The smallest boxes of pixels around all that units at some places of a layer's map depend on.

    A unit at (y, x) depends on a pixel where its derivative is not zero in a network with the same
    connections but positive weights and no gates that could be shut: ReLUs pass everything, maxima
    become means. ``size`` is the picture's (H, W). Returns (M, 4) int64 on the CPU, a row a place:
    top, left, bottom, right (exclusive), clipped at the picture's border; the whole picture behind
    a global average, squeeze-and-excitation or attention. Raises InputError for a place outside
    the map; ModelError where the network does not take pictures of that size or cannot be copied.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (model.input_size[0], int(size[0]), int(size[1]))
    with torch.inference_mode(False), torch.enable_grad():  # a method may run without gradients
        try:
            twin = Model(_generic(model.module, generator), input_size=shape)
            twin._cache.structures[shape] = model.structure  # for how often each layer runs
            picture = 0.5 + torch.rand(1, *shape, generator=generator, dtype=torch.float64)
            picture = picture.to(model.device).requires_grad_()
            with twin.guard(), _Ungated():
                maps = twin.maps(twin.features(picture, layer), picture)[0]
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise ModelError(
                f"cannot find the receptive fields of layer {layer!r} of {model.name} in pictures of "
                f"{size[0]}x{size[1]}: {error}"
            ) from error
        # Uneven, because a layer norm's plain sum over channels is constant.
        mixture = 0.5 + torch.rand(len(maps), generator=generator, dtype=torch.float64)
        mixed = torch.einsum("c,chw->hw", mixture.to(maps), maps)
        boxes = {place: _box(mixed, picture, place, layer) for place in dict.fromkeys(places)}
    return torch.tensor([boxes[place] for place in places], dtype=torch.int64).reshape(-1, 4)


def _box(mixed: Tensor, picture: Tensor, place: Place, layer: str) -> tuple[int, int, int, int]:
    (height, width), (y, x) = mixed.shape, place
    if not (0 <= y < height and 0 <= x < width):
        raise InputError(f"layer {layer!r} has a map of {height}x{width}, so there is no place {place}")
    (gradient,) = torch.autograd.grad(mixed[y, x], picture, retain_graph=True, materialize_grads=True)
    seen = gradient[0].ne(0).any(0)
    rows, columns = (seen.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    if not rows:
        raise ModelError(f"layer {layer!r} does not depend on the picture at {place}")
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


def _generic(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy with positive weights, no biases and norms at rest, in double precision.

    A copy, since other threads may be using the module; its own weights are never copied.
    """
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters():
        value = torch.zeros(parameter.shape, dtype=torch.promote_types(parameter.dtype, torch.float64))
        if not name.endswith("bias"):
            # Averages, so that values neither grow nor vanish however deep the network is.
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            value += (0.5 + torch.rand(parameter.shape, generator=generator)) / max(1, fan_in)
        memo[id(parameter)] = nn.Parameter(value.to(parameter.device), requires_grad=False)
    for name, buffer in module.named_buffers():
        rest = {"running_mean": torch.zeros_like, "running_var": torch.ones_like}
        value = rest.get(name.rpartition(".")[2], torch.clone)(buffer.detach())
        memo[id(buffer)] = value.double() if value.is_floating_point() else value
    twin = copy.deepcopy(module, memo).eval()
    for (
        part
    ) in twin.modules():  # nobody who looks on meets the copy; torch's own hooks make weights (pruning)
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if not str(hook.__module__).startswith("torch.")]:
                del hooks[key]
    return twin


def _open(func: Any, input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input.clone()  # not the input itself, which the model may go on to overwrite


def _ajar(func: Any, input: Tensor, *_: Any, **__: Any) -> Tensor:
    """In place of gates that saturate; bounded as they are, for products of gates grow without end."""
    return 0.5 + 0.5 * input / (1 + input.abs())


def _mean(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """In place of ``max`` in all its forms: of everything, along a dimension, of two tensors."""
    if args and isinstance(args[0], Tensor):
        return input + args[0]
    extreme, mean = func(input, *args, **kwargs), input.mean(*args, **kwargs)
    return mean if isinstance(extreme, Tensor) else type(extreme)((mean, extreme[1]))


def _mean_pool(
    func: Any, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """The mean over ``max_pool2d``'s windows: a depthwise convolution, since avg_pool2d cannot dilate."""
    result = func(input, kernel_size, stride, padding, dilation, *args, **kwargs)
    shape = (result if isinstance(result, Tensor) else result[0]).shape
    (height, width), (down, right) = (
        (v, v) if isinstance(v, int) else v for v in (kernel_size, stride or kernel_size)
    )
    # A stride more of zeros, since in ceil mode the last windows reach over the border.
    padded = F.pad(input, (0, right, 0, down))
    weight = input.new_full((input.shape[1], 1, height, width), 1 / (height * width))
    means = F.conv2d(padded, weight, None, (down, right), padding, dilation, len(weight))
    means = means[..., : shape[-2], : shape[-1]]
    return means if isinstance(result, Tensor) else (means, result[1])


def _masked_softmax(func: Any, input: Tensor, dim: int, *_: Any, **__: Any) -> Tensor:
    """Softmax that takes a mask of -100 (Swin's) for the ban that it is meant to be."""
    return func(input.masked_fill(input < input.amax(dim, keepdim=True) - 50, -torch.inf), dim)


def _masked_attention(func: Any, *args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.masked_fill(attn_mask < -50, -torch.inf)
    return func(*args, attn_mask=attn_mask, **kwargs)


_INSTEAD: dict[str, Callable[..., Any]] = {
    name: instead
    for instead, names in (
        (_open, "relu leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish softplus threshold"),
        (_open, "softshrink hardshrink clamp_min dropout"),
        (_ajar, "sigmoid hardsigmoid tanh hardtanh relu6 clamp clip clamp_max"),
        (_mean, "max min amax amin maximum minimum"),
        (_mean_pool, "max_pool2d max_pool2d_with_indices"),
        (lambda func, *args, **_: F.adaptive_avg_pool2d(*args[:2]), "adaptive_max_pool2d"),
        (_masked_softmax, "softmax"),
        (_masked_attention, "scaled_dot_product_attention"),
    )
    for name in names.split()
}


class _Ungated(TorchFunctionMode):
    """Catches the calls themselves, so modules, functions, methods and in-place forms are all met."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        instead = _INSTEAD.get(getattr(func, "__name__", "").removesuffix("_"))
        return instead(func, *args, **(kwargs or {})) if instead else func(*args, **(kwargs or {}))
