"""A faster copy of a network for repeated passes: channels last, batch norms folded."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..hooks.tap import active_taps, hook_lock

if TYPE_CHECKING:
    from .model import Model


#: From so many images, forward and backward, a twin pays: making one costs four forward ...
MIN_PASSES = 10


#: ... of pictures of this side, of larger ones sooner, which gain more.
CHANNELS_LAST_SIDE = 96


#: Bytes that a check sum looks at together: 16 times 509 words of 8.
_BLOCK = 8 * 16 * 509


#: What every module has that is no setting: its hooks, which come and go with taps.
_HOOKS = vars(nn.Module()).keys() - {"training", "_parameters", "_buffers", "_modules"}


@dataclass
class OptimizedPass:
    """One run's leave to let the twin answer; ``used`` says whether it did."""

    model: Model | None
    used: bool = False
    state: object = None
    twin: nn.Module | None = None
    sums: dict[object, tuple[int, Tensor]] = field(default_factory=dict)


_optimized_pass: ContextVar[OptimizedPass | None] = ContextVar("phosphene_tuning", default=None)


@contextmanager
def allow_optimized(model: Model | None, passes: int) -> Iterator[OptimizedPass]:
    """Inside, the twin may answer for ``model``, if so many images make it pay."""
    # On a GPU convolutions are less exact (TF32), and nothing was measured.
    known = model is not None and model.device.type == "cpu" and _convolves(model.module)
    larger = math.prod(model.input_size[1:]) // CHANNELS_LAST_SIDE**2 if model is not None else 1
    optimized = OptimizedPass(model if known and passes * max(1, larger) >= MIN_PASSES else None)
    token = _optimized_pass.set(optimized)
    try:
        yield optimized
    finally:
        _optimized_pass.reset(token)


def network_for_call(model: Model) -> nn.Module:
    """Which network answers: the twin where a run may use it and it has all that is tapped."""
    optimized, taps = _optimized_pass.get(), active_taps.get()
    if optimized is None or optimized.model is not model:
        return model.module
    for name, part in ((name, part) for tap in taps for name, part in tap.layers.items()):
        if name in model.structure.unfolded or model.layers.get(name) is not part:
            return model.module
    with torch._C.DisableTorchFunction():  # a rewrite is of the network's calls, not of these
        network = _current(model, optimized)
    if network is None:
        return model.module
    optimized.used = True
    for tap in taps:
        tap.follow(network)
    return network


def _current(model: Model, optimized: OptimizedPass) -> nn.Module | None:
    """The twin of the network as it is now; None where it has none."""
    if (state := _state(model.module)) is None:
        return None
    if optimized.state != state:  # the first call, or something was changed half-way
        # Changes through ``.data`` leave no trace but the values themselves.
        sums = [checksum(t) for t in (*model.module.parameters(), *model.module.buffers())]
        whole = (state, _traces(model.module), sums)
        if model._optimized_copy[0] != whole:
            model._optimized_copy = (whole, _optimized_copy(model))
        optimized.state, optimized.twin = state, model._optimized_copy[1]
        if optimized.twin is None:
            optimized.model = None  # a network that is another after every call is not asked again and again
    return optimized.twin


def _convolves(module: nn.Module) -> bool:
    """Whether a convolution in it does more than cut a picture into patches, as a transformer's does."""
    return any(isinstance(part, nn.Conv2d) and max(part.stride) < 4 for part in module.modules())


def checksum(tensor: Tensor) -> int:
    """A check sum of a tensor's bits; inside a run taken once, until autograd sees them change."""
    optimized = _optimized_pass.get()
    if optimized is None or tensor.is_inference():
        return _checksum(tensor)
    key = (tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride())
    # With the tensor itself, so that no other is ever found in its place.
    optimized.sums[key] = known = optimized.sums.get(key) or (_checksum(tensor), tensor)
    return known[0]


def _checksum(tensor: Tensor) -> int:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    if len(data) < _BLOCK + 2:
        return zlib.crc32(data.data)
    # Sums of 16 words each, 4 KB apart, are had as fast as memory can be read, a crc four times as slowly.
    # From the third byte on: if signs were the words' highest bits, two that change would cancel out.
    end = len(data) - (len(data) - 2) % _BLOCK
    words = torch.from_numpy(data[2:end].view(np.int64)).view(-1, 16, _BLOCK // 128)
    return zlib.crc32(words.sum(1).numpy().data, zlib.crc32(data[end:].data, zlib.crc32(data[:2].data)))


def _state(module: nn.Module) -> list[object] | None:
    """What is another once the network was changed; None while it trains or its owner's hooks look on."""
    state: list[object] = []
    for part in module.modules():
        kinds = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        with hook_lock:
            hooks = [hook for kind in kinds if kind for hook in kind.values()]
        if part.training or any(getattr(hook, "__module__", "") != "phosphene.hooks.tap" for hook in hooks):
            return None
        told = [value for name, value in vars(part).items() if name not in _HOOKS]
        settings = [value for value in told if isinstance(value, (int, float, str))]
        tensors = [t for t in (*part._parameters.values(), *part._buffers.values()) if t is not None]
        versions = [(t.data_ptr(), t.is_inference() or t._version) for t in tensors]
        state += (type(part), id(part), *settings, *versions)
    return state


def _traces(module: nn.Module) -> list[object]:
    """All that a network's owner may have set, and what it remembers: too slow for every call."""
    parts = map(vars, module.modules())
    return [_trace(value) for part in parts for name, value in part.items() if name not in _HOOKS]


def _trace(value: object) -> object:
    """A setting's value, a tensor's version, or which object it is; of a list what its items are."""
    if isinstance(value, (int, float, str)):
        return value
    if isinstance(value, Tensor):
        return (id(value), value.data_ptr(), value.is_inference() or value._version)
    if isinstance(value, dict):
        return [(key, _trace(item)) for key, item in value.items()]
    return [_trace(item) for item in value] if isinstance(value, (list, tuple)) else id(value)


def _optimized_copy(model: Model) -> nn.Module | None:
    """A copy, channels last, batch norms folded away; None where its logits differ or calls leave traces."""
    noise = torch.rand(2, *model.input_size, generator=torch.Generator().manual_seed(0))
    try:
        # A network that draws numbers must not draw others in the run that makes the twin; no tap sees noise.
        with model.guard(), torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng([]):
            with hook_lock:
                twin = copy.deepcopy(model.module)
            assert twin is not model.module
            for part in twin.modules():  # the taps that are open on the network itself
                part._forward_hooks.clear()
                part._forward_pre_hooks.clear()
            for names in model.structure.folds:
                conv, bn = cast(Any, map(twin.get_submodule, names))
                statistics = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
                conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
                parent, _, leaf = names[1].rpartition(".")
                setattr(twin.get_submodule(parent), leaf, nn.Identity())
            twin.to(memory_format=torch.channels_last)
            before = _traces(model.module)
            given = model.normalize(noise)  # once: a defence may be random
            ours, theirs = (model._output(m(given.clone())) for m in (twin, model.module))
        if _traces(model.module) != before:  # it remembers what it saw, and a target may ask for that
            return None
    except Exception:  # whatever the network has against being copied or folded: it does without
        return None
    return twin if (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max() else None
