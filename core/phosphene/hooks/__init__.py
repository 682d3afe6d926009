"""Hooks: read, cut and replace layers (``Tap``), attention, backward rules for ReLU, frozen networks."""

from .attention import RecordAttention
from .backward_rules import BackwardRewrite, BackwardRule, deconvnet, guided, rewrite_backward
from .guard import guard
from .tap import StopForward, Tap, active_taps, hook_lock, layer_hooks, replace_output_tensor

__all__ = [
    "BackwardRewrite",
    "BackwardRule",
    "RecordAttention",
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
