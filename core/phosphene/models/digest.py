"""Checksums of tensors and the SHA-256 digest of a network's weights."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor, nn

#: Bytes per block of the checksum: 16 rows of 509 words of 8 bytes, which are added up before the CRC.
_BLOCK = 8 * 16 * 509


#: Checksums computed in this run, by storage, version and layout, each with its tensor.
_Checksums = dict[object, tuple[int, Tensor]]
_computed: ContextVar[_Checksums | None] = ContextVar("phosphene_checksums", default=None)


@contextmanager
def reuse_checksums() -> Iterator[None]:
    """Inside, a tensor's checksum is computed once, until autograd records a write to it."""
    token = _computed.set({})
    try:
        yield
    finally:
        _computed.reset(token)


def checksum(tensor: Tensor) -> int:
    """A checksum of a tensor's bits: fast, and not cryptographic."""
    computed = _computed.get()
    if computed is None or tensor.is_inference():
        return _checksum(tensor)
    key = (tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride())
    # The tensor is stored as well: if it were freed, another could get its address and its checksum.
    computed[key] = entry = computed.get(key) or (_checksum(tensor), tensor)
    return entry[0]


def _checksum(tensor: Tensor) -> int:
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    if len(data) < _BLOCK + 2:
        return zlib.crc32(data.cpu().numpy().data)
    # Sums of 16 words, 4 KB apart, are computed as fast as memory is read; a CRC of all is 4 times slower.
    # Words start two bytes into the data: two flipped sign bits at the top of words would cancel in a sum.
    end = len(data) - (len(data) - 2) % _BLOCK
    words = _as_words(data[2:end]).view(-1, 16, _BLOCK // 128)
    edges = torch.cat([data[:2], data[end:]]).cpu()
    return zlib.crc32(words.sum(1).cpu().numpy().data, zlib.crc32(edges.numpy().data))


def _as_words(data: Tensor) -> Tensor:
    """Bytes as int64, on their device: without a copy on the CPU, where words need not be aligned."""
    if data.device.type == "cpu":
        return torch.from_numpy(data.numpy().view(np.int64))
    return data.clone().view(torch.int64)


def state_checksums(module: nn.Module) -> tuple[tuple[str, int], ...]:
    """Names and checksums of all weights and buffers.

    Writes through ``.data`` change neither a tensor's version nor its address, so the values are read.
    """
    return tuple([(name, checksum(value)) for name, value in _state_tensors(module)])


def _state_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Names and values of all weights and buffers; of a quantized layer's packed weights the parts."""
    return [
        (name, part.dequantize() if part.is_quantized else part)
        for name, value in module.state_dict().items()
        for part in (value if isinstance(value, tuple) else (value,))
        if isinstance(part, Tensor)
    ]


def state_digest(module: nn.Module, names: Sequence[str] = ()) -> str:
    """SHA-256 over ``names`` and over names and values of all weights and buffers."""
    sha = hashlib.sha256("".join(names).encode())
    for name, value in _state_tensors(module):
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
