"""A test device: tensors with real values that refuse to mix with CPU tensors, as CUDA's do."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.backend_registration
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

#: The name of the device type, one for the process.
DEVICE = "pretend"

#: Operators that move values between devices, by design.
_COPIES = {aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default}
#: Operators that accept indices on the CPU.
_INDEXING = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor, aten._unsafe_index_put.default,
}  # fmt: skip


class DeviceTensor(Tensor):
    """A tensor on the test device; ``raw`` holds its values."""

    raw: Tensor

    @staticmethod
    @torch.inference_mode(False)  # wrappers cannot be inference tensors
    def __new__(cls, raw: Tensor) -> DeviceTensor:
        tensor = Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=torch.device(DEVICE, 0),
        )  # fmt: skip
        tensor.raw = raw
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {}, float64=True, types=types)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.raw!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            duplicate = DeviceTensor(self.raw.detach().clone()).requires_grad_(self.requires_grad)
            duplicate.grad = copy.deepcopy(self.grad, memo)
            if isinstance(self, nn.Parameter):
                duplicate._is_param = True
            memo[id(self)] = duplicate
        return memo[id(self)]

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __format__(self, spec: str) -> str:
        return format(self.raw, spec)

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE}:0 device type tensor to numpy: use Tensor.cpu() first")

    def __array__(self, *_: Any) -> Any:
        return self.numpy()


def _is_on_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE


def _call(func: Any, args: Any, kwargs: dict[str, Any], float64: bool, types: Any) -> Any:
    """Run an operator on the values; the result is on the device of the operands or of ``device=``."""
    if any(not issubclass(kind, (DeviceTensor, nn.Parameter)) and kind is not Tensor for kind in types):
        return NotImplemented  # another subclass, which holds tensors of the device
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [t for t in tensors if isinstance(t, DeviceTensor)]
    on_device = bool(ours)
    if func is aten.copy_.default:
        on_device = isinstance(args[0], DeviceTensor)
    elif kwargs.get("device") is not None:
        on_device = _is_on_device(kwargs["device"])
    if ours and func not in _COPIES:
        checked = args[:1] + args[2:] if func in _INDEXING else args
        for tensor in tree_leaves((checked, kwargs)):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DeviceTensor) and tensor.ndim:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found {DEVICE}:0 and cpu in {func}"
                )
    generators = [g for g in tree_leaves((args, kwargs)) if isinstance(g, torch.Generator)]
    if on_device and generators:
        raise RuntimeError(f"Expected a '{DEVICE}' device type for generator but found 'cpu' in {func}")
    if on_device and "pin_memory" in kwargs:
        kwargs = {**kwargs, "pin_memory": None}
    raw_args, raw_kwargs = tree_map(lambda x: x.raw if isinstance(x, DeviceTensor) else x, (args, kwargs))
    if _is_on_device(raw_kwargs.get("device")):
        raw_kwargs = {**raw_kwargs, "device": torch.device("cpu")}
    result = func(*raw_args, **raw_kwargs)
    if not on_device or func is aten._local_scalar_dense.default:
        return result
    originals = {id(t.raw): t for t in ours}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dtype == torch.float64 and not float64:
            raise TypeError(f"Cannot convert a {DEVICE} Tensor to float64 dtype ({func})")
        original = originals.get(id(value))  # an in-place operator returns the tensor that it changed
        if original is None:
            return DeviceTensor(value)
        if original.shape != value.shape:
            _change_shape(func, args, kwargs)
        return original

    return tree_map(wrap, result)


def _change_shape(func: Any, args: Any, kwargs: Any) -> None:
    """Apply ``unsqueeze_`` and the like to the wrapper's own sizes."""
    include = torch._C._meta_in_tls_dispatch_include()
    with no_dispatch():
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            func(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(include)


class _DeviceMode(TorchDispatchMode):
    """Creates tensors on the test device where ``device=`` names it."""

    def __init__(self, float64: bool) -> None:
        super().__init__()
        self.float64 = float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {}, self.float64, types)


@functools.cache
def register_device() -> torch.library.Library:
    """Register the device type, and the operators with which ``torch.tensor`` and lists as indices copy.

    These bypass every dispatch mode. Must precede the first backward pass of the process, at which
    torch's autograd engine fixes its number of device queues.
    """
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    # Autocast asks for the supported types, also where it is disabled.
    getattr(torch, DEVICE).get_amp_supported_dtype = lambda: [torch.bfloat16]

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
        return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    def copy_(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        assert isinstance(to, DeviceTensor)
        to.raw.copy_(source.raw if isinstance(source, DeviceTensor) else source)
        return to

    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("copy_", copy_, "PrivateUse1")
    return library


@contextmanager
def pretend_device(*, float64: bool = True) -> Iterator[torch.device]:
    """Inside, the device exists; without ``float64``, double precision on it raises TypeError, as on MPS."""
    register_device()
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with _DeviceMode(float64):
            yield torch.device(DEVICE, 0)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
