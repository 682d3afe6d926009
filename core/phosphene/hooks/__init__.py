"""Hooks: read, cut and replace layers (``Tap``), attention, backward rules for ReLU, frozen networks."""

from .attention import RecordAttention, RecordQueries, calling_module, multi_head_attention
from .backward_calls import is_backward, run_backward
from .backward_rules import BackwardRewrite, BackwardRule, deconvnet, guided, rewrite_backward
from .guard import guard
from .rectifiers import Rectifier, read_rectifier
from .tap import StopForward, Tap, active_taps, hook_lock, layer_hooks, replace_output_tensor

__all__ = [
    "BackwardRewrite",
    "BackwardRule",
    "RecordAttention",
    "RecordQueries",
    "Rectifier",
    "StopForward",
    "Tap",
    "active_taps",
    "calling_module",
    "deconvnet",
    "guard",
    "guided",
    "hook_lock",
    "is_backward",
    "layer_hooks",
    "multi_head_attention",
    "read_rectifier",
    "replace_output_tensor",
    "rewrite_backward",
    "run_backward",
]
