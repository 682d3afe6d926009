"""``limit_parameters``: a bound on the networks that are built from a saved configuration."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.nn.modules import module as registration

from ..errors import ModelError

#: Most modules of a network that is built from a saved configuration.
_MAX_MODULES = 50_000


@contextmanager
def limit_parameters(most: int) -> Iterator[None]:
    """Inside, building more than ``most`` parameters and buffers, or very many modules, raises ModelError.

    A parameter is counted when its module registers it: its memory is reserved by then, but not written. Only
    the networks that this thread builds are counted.
    """
    thread, counts = threading.get_ident(), {"numbers": 0, "modules": 0}

    def count(kind: str, amount: int, limit: int) -> None:
        if threading.get_ident() != thread:
            return
        counts[kind] += amount
        if counts[kind] > limit:
            raise ModelError(
                f"the saved configuration asks for a network of more than {limit:,} {kind}, "
                "which its weights do not have"
            )

    def count_tensor(module: Any, name: str, tensor: Any) -> None:
        if tensor is not None:
            count("numbers", tensor.numel(), most)

    def count_module(module: Any, name: str, child: Any) -> None:
        count("modules", 1, _MAX_MODULES)

    with ExitStack() as stack:
        for register, counter in (
            (registration.register_module_parameter_registration_hook, count_tensor),
            (registration.register_module_buffer_registration_hook, count_tensor),
            (registration.register_module_module_registration_hook, count_module),
        ):
            stack.callback(register(counter).remove)
        yield


def parameter_limit(state: Mapping[str, Tensor]) -> int:
    """The bound of ``limit_parameters`` for a network with these saved weights.

    It is four times their number and a million more: some networks build parts that they then replace.
    """
    return 4 * sum(tensor.numel() for tensor in state.values()) + 1_000_000
