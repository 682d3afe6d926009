"""``limit_parameters``: a bound on the networks that are built from a saved configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.nn.modules import module as registration

from ..errors import ModelError

#: Most modules of a network that is built from a saved configuration.
_MAX_MODULES = 50_000


class _Counter:
    """The numbers and modules that were registered inside one ``limit_parameters``."""

    def __init__(self, most: int) -> None:
        self._limits = {"numbers": most, "modules": _MAX_MODULES}
        self._counts = dict.fromkeys(self._limits, 0)

    def add(self, kind: str, amount: int) -> None:
        self._counts[kind] += amount
        if self._counts[kind] > self._limits[kind]:
            raise ModelError(
                f"the saved configuration asks for a network of more than {self._limits[kind]:,} {kind}, "
                "which its weights do not have"
            )


#: The counters of the limits around the current code, the outermost first; another thread has none.
_counters: ContextVar[tuple[_Counter, ...]] = ContextVar("phosphene_parameter_limits", default=())


def _count_tensor(module: Any, name: str, tensor: Any) -> None:
    if tensor is not None:
        for counter in _counters.get():
            counter.add("numbers", tensor.numel())


def _count_module(module: Any, name: str, child: Any) -> None:
    for counter in _counters.get():
        counter.add("modules", 1)


# Registered once: torch loops over these global hooks whenever a network is built, and a hook that another
# thread adds or removes meanwhile ends that loop with a RuntimeError.
registration.register_module_parameter_registration_hook(_count_tensor)
registration.register_module_buffer_registration_hook(_count_tensor)
registration.register_module_module_registration_hook(_count_module)


@contextmanager
def limit_parameters(most: int) -> Iterator[None]:
    """Inside, building more than ``most`` parameters and buffers, or very many modules, raises ModelError.

    A parameter is counted when its module registers it: its memory is reserved by then, but not written. Only
    the networks that this thread builds are counted. Limits nest.
    """
    token = _counters.set((*_counters.get(), _Counter(most)))
    try:
        yield
    finally:
        _counters.reset(token)


def parameter_limit(state: Mapping[str, Tensor]) -> int:
    """The bound of ``limit_parameters`` for a network with these saved weights.

    It is four times their number and a million more: some networks build parts that they then replace.
    """
    return 4 * sum(tensor.numel() for tensor in state.values()) + 1_000_000
