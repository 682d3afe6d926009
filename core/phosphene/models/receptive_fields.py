"""Exact receptive fields of the units of any layer, computed by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import InputError, ModelError
from ..precision import float64_device
from . import Model
from .module_copy import copy_without_hooks

Position = tuple[int, int]


def receptive_fields(
    model: Model, layer: str, size: tuple[int, int], positions: Sequence[Position]
) -> Tensor:
    """Receptive fields of the units at positions (y, x) of a layer's map, as bounding boxes in pixels.

    A unit depends on a pixel if its derivative is not zero in a network with the same connections but
    positive weights and without saturating functions: ReLUs are the identity, maxima become means.
    ``size`` is the image's (H, W). Returns (M, 4) int64 on the CPU, a row for each position: top, left,
    bottom, right (exclusive), clipped to the image. After global average pooling, squeeze-and-excitation or
    attention the box is the entire image. Raises InputError for a position outside the map; ModelError where
    the network does not accept images of that size or cannot be copied.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (model.input_size[0], int(size[0]), int(size[1]))
    with torch.inference_mode(False), torch.enable_grad():  # also for methods that run without gradients
        try:
            device = float64_device(model.device)
            positive = Model(_with_positive_weights(model.module, device, generator), input_size=shape)
            positive._cache.structures[shape] = model.structure_at(
                shape
            )  # taps need the layers' numbers of calls
            image = 0.5 + torch.rand(1, *shape, generator=generator, dtype=torch.float64)
            image = image.to(device).requires_grad_()
            with positive.guard(), _Unsaturated():
                maps = positive.maps(positive.features(image, layer), image, layer)[0]
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise ModelError(
                f"cannot find the receptive fields of layer {layer!r} of {model.name} in images of "
                f"{size[0]}x{size[1]}: {error}"
            ) from error
        # Unequal weights, because a layer norm's plain sum over channels is constant.
        mixture = 0.5 + torch.rand(len(maps), generator=generator, dtype=torch.float64)
        mixed = torch.einsum("c,chw->hw", mixture.to(maps), maps)
        boxes = {p: _bounding_box(mixed, image, p, layer) for p in dict.fromkeys(positions)}
    return torch.tensor([boxes[p] for p in positions], dtype=torch.int64).reshape(-1, 4)


def _bounding_box(mixed: Tensor, image: Tensor, position: Position, layer: str) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of the pixels with a nonzero derivative of the map at a position."""
    (height, width), (y, x) = mixed.shape, position
    if not (0 <= y < height and 0 <= x < width):
        raise InputError(f"layer {layer!r} has a map of {height}x{width}, so there is no position {position}")
    (gradient,) = torch.autograd.grad(mixed[y, x], image, retain_graph=True, materialize_grads=True)
    field = gradient[0].ne(0).any(0)
    rows, columns = (field.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    if not rows:
        raise ModelError(f"layer {layer!r} does not depend on the image at {position}")
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


def _with_positive_weights(module: nn.Module, device: torch.device, generator: torch.Generator) -> nn.Module:
    """A copy on ``device``: positive weights, zero biases, norms of mean 0, variance 1, in double precision.

    A copy, since other threads may be using the module; the original's weights are not copied.
    """
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters():
        value = torch.zeros(parameter.shape, dtype=torch.promote_types(parameter.dtype, torch.float64))
        if not name.endswith("bias"):
            # Averages over the inputs: values neither overflow nor vanish in deep networks.
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            value += (0.5 + torch.rand(parameter.shape, generator=generator)) / max(1, fan_in)
        memo[id(parameter)] = nn.Parameter(value.to(device), requires_grad=False)
    for name, buffer in module.named_buffers():
        neutral = {"running_mean": torch.zeros_like, "running_var": torch.ones_like}
        value = neutral.get(name.rpartition(".")[2], torch.clone)(buffer.detach().to(device))
        memo[id(buffer)] = value.double() if value.is_floating_point() else value
    return copy_without_hooks(module, memo)


def _identity(func: Any, input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input.clone()  # a copy, because the model may overwrite the input


def _soft_gate(func: Any, input: Tensor, *_: Any, **__: Any) -> Tensor:
    """Replaces functions that saturate (sigmoid): bounded, since products of gates would overflow."""
    return 0.5 + 0.5 * input / (1 + input.abs())


def _mean(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Replaces ``max`` in all its forms: of a tensor, along a dimension, of two tensors."""
    if args and isinstance(args[0], Tensor):
        return input + args[0]
    extreme, mean = func(input, *args, **kwargs), input.mean(*args, **kwargs)
    return mean if isinstance(extreme, Tensor) else type(extreme)((mean, extreme[1]))


def _mean_pool(
    func: Any, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Replaces max_pool2d by the windows' mean: a depthwise convolution, as avg_pool2d cannot dilate."""
    result = func(input, kernel_size, stride, padding, dilation, *args, **kwargs)
    shape = (result if isinstance(result, Tensor) else result[0]).shape
    (height, width), (down, right) = (
        (v, v) if isinstance(v, int) else v for v in (kernel_size, stride or kernel_size)
    )
    # Padded by another stride of zeros: in ceil mode the last windows extend beyond the border.
    padded = F.pad(input, (0, right, 0, down))
    weight = input.new_full((input.shape[1], 1, height, width), 1 / (height * width))
    means = F.conv2d(padded, weight, None, (down, right), padding, dilation, len(weight))
    means = means[..., : shape[-2], : shape[-1]]
    return means if isinstance(result, Tensor) else (means, result[1])


def _masked_softmax(func: Any, input: Tensor, dim: int, *_: Any, **__: Any) -> Tensor:
    """Softmax in which an additive mask of -100 (Swin's) excludes positions completely."""
    return func(input.masked_fill(input < input.amax(dim, keepdim=True) - 50, -torch.inf), dim)


def _masked_attention(func: Any, *args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.masked_fill(attn_mask < -50, -torch.inf)
    return func(*args, attn_mask=attn_mask, **kwargs)


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    name: replacement
    for replacement, names in (
        (_identity, "relu leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish softplus threshold"),
        (_identity, "softshrink hardshrink clamp_min dropout"),
        (_soft_gate, "sigmoid hardsigmoid tanh hardtanh relu6 clamp clip clamp_max"),
        (_mean, "max min amax amin maximum minimum"),
        (_mean_pool, "max_pool2d max_pool2d_with_indices"),
        (lambda func, *args, **_: F.adaptive_avg_pool2d(*args[:2]), "adaptive_max_pool2d"),
        (_masked_softmax, "softmax"),
        (_masked_attention, "scaled_dot_product_attention"),
    )
    for name in names.split()
}


class _Unsaturated(TorchFunctionMode):
    """Applies ``_REPLACEMENTS`` to all torch calls: by modules, functions, methods and in-place forms."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = _REPLACEMENTS.get(getattr(func, "__name__", "").removesuffix("_"))
        return replacement(func, *args, **(kwargs or {})) if replacement else func(*args, **(kwargs or {}))
