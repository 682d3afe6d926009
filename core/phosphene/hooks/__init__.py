"""Hooks: read, cut, stop and replace layers (``Tap``), backward rules for ReLU, frozen networks."""

from .backward_rules import BackwardRewrite, BackwardRule, deconvnet, guided, rewrite_backward
from .guard import guard
from .tap import StopForward, Tap, active_taps, hook_lock, layer_hooks, replace_output_tensor

__all__ = [
    "BackwardRewrite",
    "BackwardRule",
    "StopForward",
    "Tap",
    "active_taps",
    "deconvnet",
    "guard",
    "guided",
    "hook_lock",
    "layer_hooks",
    "replace_output_tensor",
    "rewrite_backward",
]
