"""Copies of a network that other threads may be using."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..hooks.tap import hook_lock


def copy_without_hooks(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy in eval mode, without users' hooks and taps; ``memo`` as in ``copy.deepcopy``."""
    with hook_lock:
        duplicate = copy.deepcopy(module, memo).eval()
    for part in duplicate.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            # Torch's own hooks compute weights (pruning).
            for key in [k for k, hook in hooks.items() if not str(hook.__module__).startswith("torch.")]:
                del hooks[key]
    return duplicate
