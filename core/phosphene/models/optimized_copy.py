"""A faster copy of a network for repeated passes: channels-last memory format, batch norms folded."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..errors import ModelError
from ..hooks.tap import active_taps, hook_lock
from ..torch_state import fork_random_state, random_lock
from .digest import checksum, reuse_checksums
from .introspection import Structure


class Optimizable(Protocol):
    """The part of ``Model`` that is used here; ``models.model`` imports this module, not the reverse."""

    module: nn.Module
    input_size: tuple[int, int, int]
    _cache: Any

    @property
    def device(self) -> torch.device: ...
    @property
    def structure(self) -> Structure: ...
    @property
    def layers(self) -> Mapping[str, nn.Module]: ...
    def guard(self) -> AbstractContextManager[None]: ...
    def normalize(self, images: Tensor) -> Tensor: ...
    def _logits(self, output: Any) -> Tensor: ...


#: The fewest images, forward and backward, for which the network is copied: a copy costs four forward passes.
#: It holds for images of side ``CHANNELS_LAST_SIDE``.
MIN_PASSES = 10


#: The image side that ``MIN_PASSES`` holds for; larger images gain more from channels last and need
#: proportionally fewer passes.
CHANNELS_LAST_SIDE = 96


#: The attributes of every module that are not settings: its hooks, which taps add and remove.
_HOOKS = vars(nn.Module()).keys() - {"training", "_parameters", "_buffers", "_modules"}


#: Types whose values cannot change, and so are compared as they are.
_IMMUTABLE = frozenset((int, float, str, bool, type(None)))


@dataclass
class OptimizedPass:
    """A run's permission to use the optimized copy of a model; ``used`` says whether it was used."""

    model: Optimizable | None
    used: bool = False
    state: object = None
    network: nn.Module | None = None


_optimized_pass: ContextVar[OptimizedPass | None] = ContextVar("phosphene_optimized_pass", default=None)


#: Images that all batches of a stream pass, forward and backward; 0 outside a stream.
_stream_passes: ContextVar[int] = ContextVar("phosphene_stream_passes", default=0)


@contextmanager
def plan_passes(passes: int) -> Iterator[None]:
    """For runs that are batches of one call: whether a copy is used depends on the passes of all of them."""
    token = _stream_passes.set(passes)
    try:
        yield
    finally:
        _stream_passes.reset(token)


@contextmanager
def allow_optimized(model: Optimizable | None, passes: int) -> Iterator[OptimizedPass]:
    """Inside, the optimized copy may replace ``model``'s network, if ``passes`` images outweigh its cost."""
    # CPU only: on a GPU convolutions are less exact (TF32), and the gain there was not measured.
    suitable = model is not None and model.device.type == "cpu" and _has_convolutions(model.module)
    scale = math.prod(model.input_size[1:]) // CHANNELS_LAST_SIDE**2 if model is not None else 1
    passes = max(passes, _stream_passes.get())
    optimized = OptimizedPass(model if suitable and passes * max(1, scale) >= MIN_PASSES else None)
    token = _optimized_pass.set(optimized)
    planned = _stream_passes.set(0)  # not for the methods that this one calls
    try:
        with reuse_checksums():
            yield optimized
    finally:
        _stream_passes.reset(planned)
        _optimized_pass.reset(token)


@contextmanager
def without_optimized() -> Iterator[None]:
    """Inside, passes run through the network itself, whose modules a mode of torch's functions knows."""
    token = _optimized_pass.set(None)
    try:
        yield
    finally:
        _optimized_pass.reset(token)


def current_pass() -> OptimizedPass | None:
    """The permission of the current run to use an optimized copy; None outside runs."""
    return _optimized_pass.get()


@contextmanager
def repeat_pass(model: Optimizable | None) -> Iterator[OptimizedPass]:
    """Inside, ``model``'s optimized copy is used as in the run that permitted it; none where it is None."""
    token = _optimized_pass.set(repeated := OptimizedPass(model))
    try:
        with reuse_checksums():
            yield repeated
    finally:
        _optimized_pass.reset(token)


def network_for_call(model: Optimizable) -> nn.Module:
    """The network to run: the optimized copy where the run allows it and it has all tapped layers."""
    optimized, taps = _optimized_pass.get(), active_taps.get()
    # Views of a model at other input sizes share its cache, and the copy in it.
    if optimized is None or optimized.model is None or optimized.model._cache is not model._cache:
        return model.module
    for name, part in ((name, part) for tap in taps for name, part in tap.layers.items()):
        if name in optimized.model.structure.unfolded or model.layers.get(name) is not part:
            return model.module
    with torch._C.DisableTorchFunction():  # a backward rewrite concerns the network's calls, not these
        network = _current_copy(optimized.model, optimized)
    if network is None:
        return model.module
    optimized.used = True
    for tap in taps:
        tap.follow(network)
    return network


def _current_copy(model: Optimizable, optimized: OptimizedPass) -> nn.Module | None:
    """The copy of the network in its present state; None where there is none."""
    if (state := _state(model.module)) is None:
        return None
    if optimized.state != state:  # the first call of the run, or the network was changed during it
        try:
            folds = model.structure.folds
        except ModelError:  # no structure at this input size: no pass is possible
            optimized.model = None
            return None
        # Writes through ``.data`` change nothing but the values, so these are compared as well.
        values = [checksum(t) for t in (*model.module.parameters(), *model.module.buffers())]
        attributes = _attributes(model.module)
        key = (state, folds, attributes, values)
        if model._cache.optimized[0] != key:
            model._cache.optimized = (key, _optimized_copy(model, attributes))
        optimized.state, optimized.network = state, model._cache.optimized[1]
        if optimized.network is None:
            optimized.model = None  # a network that changes in every call would be copied again and again
    return optimized.network


def _has_convolutions(module: nn.Module) -> bool:
    """Whether it has convolutions other than a transformer's, which cut the image into patches."""
    return any(isinstance(part, nn.Conv2d) and max(part.stride) < 4 for part in module.modules())


def _state(module: nn.Module) -> list[object] | None:
    """A value that differs once the network was changed; None in training mode or with a user's hooks."""
    state: list[object] = []
    for part in module.modules():
        kinds = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        with hook_lock:
            hooks = [hook for kind in kinds if kind for hook in kind.values()]
        if part.training or any(getattr(hook, "__module__", "") != "phosphene.hooks.tap" for hook in hooks):
            return None
        attributes = vars(part).items()
        settings = [v for name, v in attributes if isinstance(v, (int, float, str)) and name not in _HOOKS]
        tensors = (*part._parameters.values(), *part._buffers.values())
        versions = [(t.data_ptr(), t.is_inference() or t._version) for t in tensors if t is not None]
        state += (type(part), id(part), *settings, *versions)
    return state


def _attributes(module: nn.Module) -> list[object]:
    """All attributes of all modules as comparable values: complete, but too slow for every call."""
    return [
        # Most attributes are numbers, strings, tuples of these or empty dicts: none of them needs a call.
        value
        if type(value) in _IMMUTABLE or (type(value) is tuple and _IMMUTABLE.issuperset(map(type, value)))
        else ()
        if type(value) is dict and not value
        else _comparable(value)
        for part in map(vars, module.modules())
        for name, value in part.items()
        if name not in _HOOKS
    ]


def _comparable(value: object) -> object:
    """A number or string itself, a tensor's version, the items of a container, the identity of the rest."""
    if isinstance(value, (int, float, str)):
        return value
    if isinstance(value, Tensor):
        return (id(value), value.data_ptr(), value.is_inference() or value._version)
    if isinstance(value, dict):
        return [(key, _comparable(item)) for key, item in value.items()]
    return [_comparable(item) for item in value] if isinstance(value, (list, tuple)) else id(value)


def _optimized_copy(model: Optimizable, attributes: list[object]) -> nn.Module | None:
    """A channels-last copy with folded batch norms; None where logits differ or a call leaves state.

    ``attributes`` are the network's at present.
    """
    noise = torch.rand(2, *model.input_size, generator=torch.Generator().manual_seed(0), device="cpu")
    try:
        # A random network must draw the same numbers with and without a copy; no tap reads noise.
        with random_lock, model.guard(), torch.inference_mode(False), torch.no_grad(), fork_random_state():
            with hook_lock:
                network = copy.deepcopy(model.module)
            assert network is not model.module
            for part in network.modules():  # the hooks of taps that are open on the original
                part._forward_hooks.clear()
                part._forward_pre_hooks.clear()
            for names in model.structure.folds:
                conv, bn = cast(Any, map(network.get_submodule, names))
                statistics = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
                conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
                parent, _, leaf = names[1].rpartition(".")
                setattr(network.get_submodule(parent), leaf, nn.Identity())
            network.to(memory_format=torch.channels_last)
            normalized = model.normalize(noise)  # once: a defense may be random
            logits, expected = (model._logits(m(normalized.clone())) for m in (network, model.module))
        if _attributes(model.module) != attributes:  # the network stores activations, which a target may read
            return None
    except Exception:  # for whatever reason it cannot be copied or folded, it runs without a copy
        return None
    return network if (logits - expected).abs().max() <= 1e-4 * expected.abs().max() else None
